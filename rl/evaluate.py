"""Evaluation on held-out problems: mean@n, pass@k, best@k and maj@n.

pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374,
equation 1), of k answers drawn without replacement. best@k/mean is verl's figure, of k drawn with
replacement: what its bootstrap estimates, exactly.

maj@n is the majority vote over answers, not over texts: all correct answers are one answer,
whatever their wording; others are the same where their final answers read the same, or where the
reward takes one for the other. An answer without a verdict, cut off by a limit or without anything
to parse does not vote. Where several answers have the most votes, the score is shared among them.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from ..rewards.inputs import RewardInput
from ..rewards.suite import RewardSuite
from ..rewards.verdict import Status
from .eval_sets import HELD_OUT
from .groups import Group
from .run import Run
from .watch.tracking import sample_rows

Pair = tuple[Group, str, str]
"""A problem, and two final answers to it."""
Same = Callable[[Sequence[Pair]], Sequence[bool]]
"""Whether each pair is the same answer in other words."""
MOST_PAIRS = 28
"""Pairs of wrong answers to one problem that a reward is asked about: all of 8 different ones."""
_LONGEST_ANSWER = 200
_VOTES = (Status.CORRECT, Status.WRONG, Status.PARTIAL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    accuracy: float
    """mean@n over all problems: the fraction of answers that are correct."""
    reward: float
    """The mean score of the answers that have one."""
    metrics: dict[str, float]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers drawn without replacement from n, of which
    `correct` are right, is right."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def best_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers drawn with replacement from n, of which `correct`
    are right, is right."""
    return float(1.0 - (1.0 - correct / n) ** k)


def majority_at_k(answers: Sequence[Hashable], correct: Sequence[bool]) -> float:
    """1 if the most frequent answer is right; where several are equally frequent, the share of
    these that are right; 0 where nobody votes. None does not vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    right = dict(zip(answers, correct, strict=True))
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(right[answer] for answer in tied) / len(tied)


async def evaluate(run: Run) -> Evaluation:
    """Samples answers to all sets of held-out problems with the weights that the engines serve,
    marks and logs them."""
    await run.weights.delivered()
    step, shown = run.progress.step, run.config.tracking.samples
    metrics: dict[str, float] = {}
    show: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    results: list[Evaluation] = []
    for problems in run.eval_sets:
        sampling = problems.sampled(run.sampling(0))
        groups = await run.sample_groups(
            problems.prompts, problems.samples, sampling, problems.suite
        )
        texts = [[run.text(group.prompt, c) for c in group.completions] for group in groups]
        result = await asyncio.to_thread(
            summarise, groups, texts, by_reward(problems.suite), problems.name
        )
        problems.suite.metrics()  # a training step's figures of the reward are to be its own
        metrics |= result.metrics
        results.append(result)
        show |= _line(problems.name or "held-out", result)
        first = groups[:shown]
        answers, questions = [t[0] for t in texts[:shown]], [run.problem(g.prompt) for g in first]
        rows += sample_rows(first, answers, questions)
    if not any(problems.name == HELD_OUT for problems in run.eval_sets):
        metrics["val-core/accuracy"] = float(np.mean([r.accuracy for r in results]))
        metrics["val-core/reward"] = float(np.mean([r.reward for r in results]))
    run.tracker.log(step, metrics, "eval", show)
    run.tracker.samples(step, rows)
    return Evaluation(
        accuracy=metrics["val-core/accuracy"], reward=metrics["val-core/reward"], metrics=metrics
    )


def _line(name: str, result: Evaluation) -> dict[str, str]:
    """What the console shows of a set."""
    line = {f"{name} accuracy": f"{result.accuracy:.1%}"}
    # a graded reward, of which "correct" says little
    if abs(result.reward - result.accuracy) > 1e-9:
        line[f"{name} reward"] = f"{result.reward:.3f}"
    return line


def summarise(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    same: Same | None = None,
    name: str = HELD_OUT,
) -> Evaluation:
    """Metrics of graded groups of n answers each; an answer without a verdict counts as not correct
    and is counted. `same` is asked where a majority depends on whether wrong answers are one.
    `name`: of the whole set, in the metrics; without one they go by the problems' data sources."""
    n = len(groups[0].completions)
    rights = [[v.status == Status.CORRECT for v in g.verdicts] for g in groups]
    majorities = majority_votes(groups, texts, rights, same) if n > 1 else [0.0] * len(groups)
    by_source: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        by_source[name or group.prompt.source].append(i)
    metrics: dict[str, float] = {}
    for source, members in by_source.items():
        metrics |= _of_source(source, [groups[i] for i in members], [rights[i] for i in members])
        if n > 1:
            metrics[f"val-core/{source}/acc/maj@{n}"] = float(
                np.mean([majorities[i] for i in members])
            )
    accuracy, reward = float(np.mean(rights)), _mean_score(groups)
    place = f"val-aux/{name}" if name else "val-aux"
    if not name:
        for kind, members_right in _by_kind(groups).items():
            metrics[f"val-aux/{kind}/accuracy"] = float(np.mean(members_right))
        metrics |= {"val-core/accuracy": accuracy, "val-core/reward": reward}
    metrics[f"{place}/verifier_errors"] = float(
        sum(not v.trains for group in groups for v in group.verdicts)
    )
    lengths = [c.num_sampled for group in groups for c in group.completions]
    metrics[f"{place}/response_length/mean"] = float(np.mean(lengths))
    return Evaluation(accuracy=accuracy, reward=reward, metrics=metrics)


def _of_source(
    source: str, groups: Sequence[Group], rights: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """verl's figures of one data source, and pass@k, for 2, 4, ... and n."""
    n = len(rights[0])
    found = {f"val-core/{source}/acc/mean@{n}": float(np.mean(rights))}
    found[f"val-aux/{source}/reward/mean@{n}"] = _mean_score(groups)
    if n == 1:
        return found
    found[f"val-aux/{source}/acc/std@{n}"] = float(np.mean([np.std(r) for r in rights]))
    for k in sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n}):
        section = "val-core" if k == n else "val-aux"
        found[f"val-core/{source}/acc/pass@{k}"] = float(
            np.mean([pass_at_k(n, sum(r), k) for r in rights])
        )
        found[f"{section}/{source}/acc/best@{k}/mean"] = float(
            np.mean([best_at_k(n, sum(r), k) for r in rights])
        )
    return found


def _mean_score(groups: Sequence[Group]) -> float:
    scores = [v.score for group in groups for v in group.verdicts if v.score is not None]
    return float(np.mean(scores)) if scores else 0.0


def majority_votes(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    rights: Sequence[Sequence[bool]],
    same: Same | None,
) -> list[float]:
    """maj@n of each group."""
    ballots: list[list[Hashable]] = []
    asked: list[tuple[int, str, str]] = []
    for i, (group, answers, right) in enumerate(zip(groups, texts, rights, strict=True)):
        votes: list[Hashable] = [
            (True if r else final_answer(text)) if v.status in _VOTES else None
            for text, r, v in zip(answers, right, group.verdicts, strict=True)
        ]
        ballots.append(votes)
        wrong = Counter(str(vote) for vote in votes if vote is not None and vote is not True)
        # only then may it matter which of the wrong ones are the same
        if same is not None and 0 < sum(right) <= sum(wrong.values()):
            names = [name for name, _ in wrong.most_common()]
            pairs = [(a, b) for j, b in enumerate(names) for a in names[:j]]
            asked += [(i, a, b) for a, b in pairs[:MOST_PAIRS]]
    if same is not None and asked:
        for (i, a, b), equal in zip(
            asked, same([(groups[i], a, b) for i, a, b in asked]), strict=True
        ):
            if equal:
                ballots[i] = _united(ballots[i], a, b)
    return [majority_at_k(votes, right) for votes, right in zip(ballots, rights, strict=True)]


def _united(votes: Sequence[Hashable], a: str, b: str) -> list[Hashable]:
    """The votes with b's counted for what a's are counted for; classes are tuples of the answers in
    them."""

    def of(answer: str) -> Hashable:
        return next(
            (v for v in votes if v == answer or (isinstance(v, tuple) and answer in v)), answer
        )

    one, other = of(a), of(b)
    if one == other:
        return list(votes)
    members = [
        *(one if isinstance(one, tuple) else (one,)),
        *(other if isinstance(other, tuple) else (other,)),
    ]
    return [tuple(members) if vote in (one, other) else vote for vote in votes]


def by_reward(suite: RewardSuite) -> Same:
    """Two answers are the same where the reward marks either correct with the other as its
    reference, and each of them with itself: one that cannot be a reference (a program, a piece of
    prose) is compared by its text alone."""

    def same(pairs: Sequence[Pair]) -> list[bool]:
        directions = [[(g, a, b), (g, b, a), (g, a, a), (g, b, b)] for g, a, b in pairs]
        verdicts = suite.grade([_as_input(*one) for four in directions for one in four])
        right = [verdict.status == Status.CORRECT for verdict in verdicts]
        fours = [right[i : i + 4] for i in range(0, len(right), 4)]
        return [(ab or ba) and aa and bb for ab, ba, aa, bb in fours]

    return same


def _as_input(group: Group, answer: str, reference: str) -> RewardInput:
    prompt = group.prompt
    completion = f"\\boxed{{{answer}}}"
    return RewardInput(
        completion=completion,
        answer=reference,
        messages=prompt.messages,
        source=prompt.source,
        columns=prompt.columns,
    )


def final_answer(text: str) -> str:
    """What a majority vote compares first: of the text after the reasoning the last \\boxed{...},
    what follows `####`, the last number of a sentence, or all of it; without dollar signs, spaces
    and a full stop."""
    said = text.rsplit("</think>", 1)[-1].strip()
    boxed = _last_boxed(said)
    if boxed is not None:
        said = boxed
    elif "####" in said:
        said = said.rsplit("####", 1)[1].strip().split("\n")[0]
    elif len(said.split()) > 1 and (numbers := _NUMBER.findall(said)):
        said = numbers[-1]
    said = re.sub(r"\s+", "", said.strip().strip("$")).rstrip(".,")
    return re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", said)[:_LONGEST_ANSWER]


def _last_boxed(text: str) -> str | None:
    """What stands in the braces of the last \\boxed{...} that is closed."""
    for start in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[start:i]
    return None


def _by_kind(groups: Sequence[Group]) -> dict[str, list[bool]]:
    """Problems that name a `kind` in their columns, kept apart."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for group in groups:
        if "kind" in group.prompt.columns:
            kinds[str(group.prompt.columns["kind"])] += [
                v.status == "correct" for v in group.verdicts
            ]
    return kinds
