"""Evaluation on held-out problems: mean@n, pass@k and maj@k.

pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1); maj@k takes
the most frequent answer text, ties shared among the tied.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from .groups import Group
from .run import Run
from .watch.tracking import sample_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    accuracy: float
    """mean@n over all problems: the fraction of answers that are correct."""
    metrics: dict[str, float]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers drawn without replacement from n, of which `correct` are right, is right."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_at_k(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """1 if the most frequent answer is right; where several are equally frequent, the share of these that are right."""
    counts = Counter(answers)
    most = max(counts.values())
    right = dict(zip(answers, correct, strict=True))
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(right[answer] for answer in tied) / len(tied)


def evaluate(run: Run) -> Evaluation:
    """Samples answers to the held-out problems with the weights that the engines serve, marks and logs them."""
    config = run.config
    run.settle()
    problems = list(run.source.heldout[: config.eval.size])
    sampling = replace(run.sampling(0), temperature=config.eval.temperature, top_p=1.0, top_k=0, seed=config.seed)
    groups = run.sample_groups(problems, config.eval.samples, sampling)
    result = summarise(groups, [[run.text(c) for c in group.completions] for group in groups])
    run.suite.metrics()  # a training step's figures of the reward are to be its own
    step = run.progress.step
    run.tracker.log(step, result.metrics, "eval", {"held-out accuracy": f"{result.accuracy:.1%}"})
    shown = groups[: config.tracking.samples]
    run.tracker.samples(
        step,
        sample_rows(
            shown,
            [run.text(g.completions[0]) for g in shown],
            [run.problem(g.prompt) for g in shown],
        ),
    )
    return result


def summarise(groups: Sequence[Group], texts: Sequence[Sequence[str]]) -> Evaluation:
    """Metrics of graded groups of n answers each; an answer without a verdict counts as not correct and is counted."""
    by_source: dict[str, list[tuple[Group, Sequence[str]]]] = defaultdict(list)
    for group, answers in zip(groups, texts, strict=True):
        by_source[group.prompt.source].append((group, answers))
    n = len(groups[0].completions)
    metrics: dict[str, float] = {}
    for source, members in by_source.items():
        right = [
            [v.score is not None and v.score > 0 and v.status == "correct" for v in g.verdicts] for g, _ in members
        ]
        metrics[f"val-core/{source}/mean@{n}"] = float(np.mean(right))
        if n > 1:
            for k in sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n}):
                metrics[f"val-core/{source}/best@{k}"] = float(np.mean([pass_at_k(n, sum(r), k) for r in right]))
            metrics[f"val-core/{source}/maj@{n}"] = float(
                np.mean([majority_at_k([_final(t) for t in a], r) for (_, a), r in zip(members, right, strict=True)])
            )
    for kind, members_right in _by_kind(groups).items():
        metrics[f"val-aux/{kind}/accuracy"] = float(np.mean(members_right))
    everything = [v.status == "correct" for group in groups for v in group.verdicts]
    metrics["val-core/accuracy"] = float(np.mean(everything))
    metrics["val-aux/verifier_errors"] = float(sum(not v.trains for group in groups for v in group.verdicts))
    lengths = [len(c) for group in groups for c in group.completions]
    metrics["val-aux/response_length/mean"] = float(np.mean(lengths))
    return Evaluation(accuracy=metrics["val-core/accuracy"], metrics=metrics)


def _by_kind(groups: Sequence[Group]) -> dict[str, list[bool]]:
    """Problems that name a `kind` in their columns, kept apart."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for group in groups:
        if "kind" in group.prompt.columns:
            kinds[str(group.prompt.columns["kind"])] += [v.status == "correct" for v in group.verdicts]
    return kinds


def _final(text: str) -> str:
    """What a majority vote compares: the text after the reasoning."""
    return text.rsplit("</think>", 1)[-1].strip()
