"""The numbers of an evaluation against brute force and numbers by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
import pytest
from emberl.rewards.verdict import Status
from emberl.rl.evaluation.measures import (
    Outcome,
    best_at_k,
    compare,
    interval,
    majority_at_k,
    pass_at_k,
    powers,
    sign_flip_p_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def outcome(problem: str, right: int, n: int) -> Outcome:
    statuses = (Status.CORRECT,) * right + (Status.WRONG,) * (n - right)
    return Outcome(
        problem=problem,
        source="s",
        statuses=statuses,
        scores=(1.0,) * right + (0.0,) * (n - right),
        votes=(0,) * right + (1,) * (n - right),
        tokens=(5,) * n,
        thoughts=(0,) * n,
        cut=(False,) * n,
    )


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * correct + [False] * (n - correct)
        subsets = list(itertools.combinations(answers, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(share)


def test_best_at_k_draws_with_replacement() -> None:
    for n, correct, k in [(3, 1, 2), (4, 3, 3), (4, 0, 2)]:
        draws = list(itertools.product(range(n), repeat=k))
        share = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
        assert best_at_k(n, correct, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([0, 0, 1], 1.0),
        ([0, 1, 1], 0.0),
        ([0, 1, 2], 1 / 3),  # three have one vote each
        ([0, 0, 1, 1, 2], 1 / 2),  # two share the lead
        ([0, 1, 1, 2, 2], 0.0),  # a tie of wrong ones
        ([0, None, None, None], 1.0),  # what has no answer does not vote
        ([None, None], 0.0),
        ([1, None], 0.0),
    ],
)
def test_a_majority_of_all_by_hand(votes: list[int | None], expected: float) -> None:
    assert majority_at_k(votes, len(votes)) == pytest.approx(expected)


def by_brute_force(votes: Sequence[int | None], k: int) -> float:
    total = 0.0
    for subset in itertools.combinations(votes, k):
        counts = Counter(vote for vote in subset if vote is not None)
        leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
        total += (0 in leaders) / max(1, len(leaders))
    return total / comb(len(votes), k)


@given(
    votes=st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=8),
    k=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_a_majority_of_k_is_the_mean_over_all_subsets(votes: list[int | None], k: int) -> None:
    k = min(k, len(votes))
    assert majority_at_k(votes, k) == pytest.approx(by_brute_force(votes, k), abs=1e-12)


def test_a_majority_of_many_is_still_a_number() -> None:
    votes = [0] * 300 + [None] * 100 + list(range(1, 501))
    assert 0.99 < majority_at_k(votes, 400) <= 1.0
    with pytest.raises(ValueError, match=r"maj@2 of 1001 answers"):
        majority_at_k([0] * 1001, 2)


def test_the_interval_is_that_of_all_resamples() -> None:
    """Of three problems, one of them solved, there are 27 resamples: the mean is 0 in 8 of them,
    1/3 in 12, 2/3 in 6 and 1 in 1. The quantiles 2.5 % and 97.5 % are 0 and 1 (its chance is
    3.7 %)."""
    assert interval([0.0, 0.0, 1.0]) == (0.0, 1.0)
    assert interval([1.0]) is None
    assert interval([0.5] * 9) == (0.5, 0.5)


def test_the_interval_is_as_wide_as_the_normal_one_of_many_problems() -> None:
    values = [1.0] * 300 + [0.0] * 700
    found = interval(values)
    assert found is not None
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found == (pytest.approx(0.3 - half, abs=0.002), pytest.approx(0.3 + half, abs=0.002))
    assert found == interval(values), "the same for the same numbers"


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0, 0, 0], 1.0),
        ([1], 1.0),  # + and - are as far from 0
        ([1, 1, 1, 1, 1], 2 / 32),
        ([1] * 8 + [-1] * 2, 2 * (1 + 10 + 45) / 1024),  # McNemar's exact test of 8 against 2
        ([3, 1, 1], 2 / 8),  # sums 5 and -5
        ([2, -1], 1.0),  # |sum| 1 is the smallest there is
        ([3 * 64**3, 64**3, 64**3], 2 / 8),  # of many answers, counted in their common unit
    ],
)
def test_the_paired_test_by_hand(differences: list[int], p: float) -> None:
    assert sign_flip_p_value(differences) == pytest.approx(p)


@given(differences=st.lists(st.integers(-4, 4), max_size=9))
@settings(max_examples=100, deadline=None)
def test_the_paired_test_is_the_share_of_all_sign_patterns(differences: list[int]) -> None:
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    far = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= abs(sum(differences))
        for signs in patterns
    ]
    assert sign_flip_p_value(differences) == pytest.approx(sum(far) / len(patterns))


def test_a_paired_test_whose_sums_are_too_many_is_drawn() -> None:
    """11 differences of some ten million each; exact over all 2,048 patterns here."""
    differences = [10_000_019 + 7919 * i for i in range(8)] + [-10_000_079, -9_999_991, -12_345_677]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=11)
    ]
    exact = sum(abs(s) >= abs(sum(differences)) for s in sums) / 2048
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.015)  # 3 sigma
    assert sign_flip_p_value(differences) == sign_flip_p_value(differences)


def test_models_with_other_numbers_of_answers_are_compared_by_their_means() -> None:
    ours = [outcome("a", 4, 4), outcome("b", 2, 4), outcome("c", 1, 4)]
    others = [outcome("a", 1, 2), outcome("b", 1, 2), outcome("c", 1, 2)]
    found = compare(ours, others)
    assert found.difference == pytest.approx((1.0 + 0.5 + 0.25) / 3 - 0.5)
    assert (found.better, found.worse, found.problems) == (1, 1, 3)
    # differences 4, 0 and -2 of 8: |sum| is at least 2 in all four patterns
    assert found.p_value == pytest.approx(1.0)


def test_the_k_that_are_shown() -> None:
    assert [powers(n) for n in (1, 2, 6, 8)] == [[1], [2], [2, 4, 6], [2, 4, 8]]
