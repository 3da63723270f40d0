"""The metrics of an evaluation, from the outcomes of the answers to each problem.

pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374,
equation 1), of k answers drawn without replacement. best@k is verl's figure, of k drawn with
replacement: what its bootstrap estimates, exactly. maj@k is the expected score of a majority of k
answers drawn without replacement; where several answers have the most votes, the score is shared
among them.

Intervals and tests treat problems as the sample: answers to one problem are not independent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, gcd

import numpy as np
from numpy.typing import NDArray

from ...rewards.verdict import Status

RESAMPLES = 10_000
LEVEL = 0.95
_LARGEST_N = 1000
"""Answers to one problem up to which binomial coefficients are finite floats."""
_LONGEST_SUMS = 500_000_000
"""Additions of an exact paired test: about a second."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcomes of the n answers to one problem: aligned tuples of length n."""

    problem: str
    """Its id."""
    source: str
    statuses: tuple[Status, ...]
    scores: tuple[float | None, ...]
    votes: tuple[int | None, ...]
    """The number of the answer that each gives: 0 is the right one, whatever its wording; None: no
    vote."""
    tokens: tuple[int, ...]
    """Sampled tokens."""
    thoughts: tuple[int, ...]
    """Those of them that are thoughts; 0 if they are not told apart."""
    cut: tuple[bool, ...]
    """Whether the answer was truncated at the most tokens."""
    kind: str | None = None

    @property
    def n(self) -> int:
        return len(self.statuses)

    @property
    def right(self) -> int:
        return sum(status is Status.CORRECT for status in self.statuses)

    @property
    def mean(self) -> float:
        return self.right / self.n

    def passed(self, k: int) -> float:
        return pass_at_k(self.n, self.right, k)

    def majority(self, k: int) -> float:
        return majority_at_k(self.votes, k)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers drawn without replacement from n, of which
    `correct` are right, is right."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def best_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k answers drawn with replacement from n, of which `correct`
    are right, is right."""
    return float(1.0 - (1.0 - correct / n) ** k)


def majority_at_k(votes: Sequence[int | None], k: int) -> float:
    """The chance that the most frequent answer among k drawn without replacement is right, a tie
    between t answers counting 1/t; votes as in `Outcome`.

    Counted, not sampled: for each number a of right answers drawn, the ways in which no wrong
    answer has more than a votes, by how many of them have just as many.
    """
    n, counts = len(votes), Counter(votes)
    right, silent = counts.pop(0, 0), counts.pop(None, 0)
    wrong = list(counts.values())
    if k == n:
        most = max(wrong, default=0)
        return 0.0 if right < max(most, 1) else 1 / (1 + wrong.count(right))
    if n > _LARGEST_N:
        raise ValueError(f"maj@{k} of {n} answers cannot be counted; ask for maj@{n}")
    score = 0.0
    for a in range(1, min(right, k) + 1):
        ties = (k - a) // a
        ways: Floats = np.zeros((k - a + 1, ties + 1))  # [drawn, tied]
        ways[0, 0] = 1.0
        for count in wrong:
            if count > 1:
                ways = _with_others(ways, 1, count, a)
        # answers with one vote are the many, so all of them are convolved at once
        ways = _with_others(ways, wrong.count(1), 1, a)
        # the rest of the k drawn have no vote
        total = (
            ways * np.array([comb(silent, k - a - drawn) for drawn in range(k - a + 1)])[:, None]
        )
        score += comb(right, a) * float((total.sum(0) / np.arange(1, ties + 2)).sum())
    return min(1.0, score / comb(n, k))


def _with_others(ways: Floats, answers: int, count: int, a: int) -> Floats:
    """[drawn, tied] ways once further answers may be drawn too, none of them more than `a` times:
    one answer with `count` votes, or `answers` answers with one vote each."""
    after = np.zeros_like(ways)
    most = min(count, a) if answers == 1 else answers
    for drawn in range(min(most, len(ways) - 1) + 1):
        tied = int(drawn == a) if answers == 1 else (drawn if a == 1 else 0)
        if tied < ways.shape[1]:
            part = ways[: len(ways) - drawn, : ways.shape[1] - tied]
            after[drawn:, tied:] += comb(count * answers, drawn) * part
    return after


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % bootstrap interval (percentiles) of the mean over problems; None of fewer than
    two."""
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // len(sample))  # resamples: their indices take 16 MB
    means = np.concatenate(
        [
            sample[
                rng.integers(0, len(sample), (min(at_once, RESAMPLES - done), len(sample)))
            ].mean(1)
            for done in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """The two-sided p-value of paired whole differences under the hypothesis that each might as
    well have the other sign: the share of all 2^m sign patterns whose sum is as far from 0.

    Exact, by the distribution of the sum. With one answer to each problem it is McNemar's exact
    test. Where that distribution would be too long (numbers of answers without a common factor,
    many problems) the share among `RESAMPLES` patterns drawn with a fixed seed, and the observed
    one.
    """
    sizes = [abs(int(d)) for d in differences if d]
    unit = gcd(*sizes) or 1  # n answers of both models: multiples of n, a distribution 1/n as long
    sizes = [size // unit for size in sizes]
    if sum(sizes) * len(sizes) > _LONGEST_SUMS:
        drawn = np.random.default_rng(0).choice((-1, 1), (RESAMPLES, len(sizes))) @ sizes
        far = np.count_nonzero(np.abs(drawn) >= abs(sum(differences)) // unit)
        return float((far + 1) / (RESAMPLES + 1))
    chances = np.ones(1)
    for size in sizes:
        longer = np.zeros(len(chances) + 2 * size)
        longer[: len(chances)] += 0.5 * chances
        longer[2 * size :] += 0.5 * chances
        chances = longer
    sums = np.arange(len(chances)) - sum(sizes)
    return float(min(1.0, chances[np.abs(sums) >= abs(sum(differences)) // unit].sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the same problems: mean@n of the first less that of the second."""

    problems: int
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    better: int
    """Problems that the first solves more often."""
    worse: int


def compare(ours: Sequence[Outcome], others: Sequence[Outcome]) -> Comparison:
    """The comparison of two models' outcomes, of the same problems in the same order."""
    pairs = list(zip(ours, others, strict=True))
    assert all(a.problem == b.problem for a, b in pairs)
    # differences times a.n * b.n: the exact test needs whole numbers
    whole = [a.right * b.n - b.right * a.n for a, b in pairs]
    plain = [a.mean - b.mean for a, b in pairs]
    return Comparison(
        problems=len(pairs),
        difference=float(np.mean(plain)),
        interval=interval(plain),
        p_value=sign_flip_p_value(whole),
        better=sum(d > 0 for d in whole),
        worse=sum(d < 0 for d in whole),
    )


def powers(n: int) -> list[int]:
    """The k of pass@k by default: 2, 4, ... and n."""
    return sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n})


def metrics(outcomes: Sequence[Outcome], name: str = "") -> dict[str, float]:
    """The metrics of a set by verl's names. An answer without a verdict counts as not correct, and
    in `verifier_errors`. name: of the whole set; without one, figures go by data source."""
    by_source: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_source[name or outcome.source].append(outcome)
    figures: dict[str, float] = {}
    for source, members in by_source.items():
        figures |= _of_source(source, members)
    place = f"val-aux/{name}" if name else "val-aux"
    if not name:
        for kind, right in _by_kind(outcomes).items():
            figures[f"val-aux/{kind}/accuracy"] = right
        figures |= {"val-core/accuracy": accuracy(outcomes), "val-core/reward": reward(outcomes)}
    figures[f"{place}/verifier_errors"] = float(sum(s is None for o in outcomes for s in o.scores))
    figures[f"{place}/response_length/mean"] = mean_tokens(outcomes)
    return figures


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """mean@n: the fraction of answers that are correct."""
    return sum(o.right for o in outcomes) / sum(o.n for o in outcomes)


def reward(outcomes: Sequence[Outcome]) -> float:
    """The mean score of the answers that have one."""
    scores = [score for o in outcomes for score in o.scores if score is not None]
    return float(np.mean(scores)) if scores else 0.0


def mean_tokens(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([tokens for o in outcomes for tokens in o.tokens]))


def _of_source(source: str, members: Sequence[Outcome]) -> dict[str, float]:
    """verl's metrics of one data source, and pass@k, for k = 2, 4, ... and n."""
    n = members[0].n
    figures = {f"val-core/{source}/acc/mean@{n}": accuracy(members)}
    figures[f"val-aux/{source}/reward/mean@{n}"] = reward(members)
    if n == 1:
        return figures
    figures[f"val-aux/{source}/acc/std@{n}"] = float(
        np.mean([np.sqrt(o.mean * (1 - o.mean)) for o in members])
    )
    for k in powers(n):
        section = "val-core" if k == n else "val-aux"
        figures[f"val-core/{source}/acc/pass@{k}"] = float(np.mean([o.passed(k) for o in members]))
        figures[f"{section}/{source}/acc/best@{k}/mean"] = float(
            np.mean([best_at_k(n, o.right, k) for o in members])
        )
    figures[f"val-core/{source}/acc/maj@{n}"] = float(np.mean([o.majority(n) for o in members]))
    return figures


def _by_kind(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Kind -> accuracy, of the problems that have a `kind` in their columns."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind is not None:
            kinds[outcome.kind].append(outcome)
    return {kind: accuracy(members) for kind, members in kinds.items()}
