"""Advantages: hand-computed numbers, a NumPy-free implementation by loops, and what has no verdict
or no signal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rewards.verdict import LARGEST_SCORE
from emberl.rl.algorithm.advantages import (
    ROUNDING,
    all_equal,
    batch_advantages,
    centred,
    deviation,
    gae,
    gpg_rescale,
    group_advantages,
    kl_estimate,
    length_adaptive_lambda,
    overlong_penalty,
    token_rewards,
    value_targets,
    whiten,
)
from emberl.rl.algorithm.losses import Objective
from emberl.rl.config.algorithm import AdvantageConfig, KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.presets import PRESETS, preset
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = math.nan
quick = settings(max_examples=60, deadline=None)
scores = st.lists(
    st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 1.0, 0.1, NAN])), min_size=1, max_size=8
)


@pytest.mark.parametrize(
    ("group", "config", "expected"),
    [
        ([1, 1, 0], {"std": "none"}, [1 / 3, 1 / 3, -2 / 3]),
        # deviation of 1, 1, 0 with N - 1: sqrt(1/3) = .5773503; with N: sqrt(2/9) = .4714045
        ([1, 1, 0], {"eps": 0}, [0.5773503, 0.5773503, -1.1547005]),
        ([1, 1, 0], {"eps": 0, "std_unbiased": False}, [0.7071068, 0.7071068, -1.4142136]),
        ([1, 0], {"eps": 0}, [0.7071068, -0.7071068]),
        ([1, 0], {"eps": 0, "std_unbiased": False}, [1.0, -1.0]),
        ([1, 0], {"eps": 0.1}, [0.6194967, -0.6194967]),  # .5 / .8071068
        ([1, 0, 0, 1], {"std": "none", "leave_one_out": True}, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([3, 1, NAN, 2], {"std": "none", "leave_one_out": True}, [1.5, -1.5, 0.0, 0.0]),
        ([1, NAN, 0], {"std": "none"}, [0.5, 0.0, -0.5]),
        ([0.7], {"std": "none"}, [0.0]),
        ([0.7], {"leave_one_out": True}, [0.0]),
        ([NAN, 0.7], {}, [0.0, 0.0]),
        ([NAN, NAN], {}, [0.0, 0.0]),
        ([0.1, 0.1, 0.1], {"eps": 0}, [0.0, 0.0, 0.0]),  # their mean is 0.10000000000000002
    ],
)
def test_a_group_by_hand(group: list[float], config: dict[str, Any], expected: list[float]) -> None:
    [found] = group_advantages([np.array(group)], AdvantageConfig(**config))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert all(a == 0.0 for a, e in zip(found, expected, strict=True) if e == 0.0), (
        "no signal is exactly 0"
    )


def test_the_deviation_of_the_batch() -> None:
    """1, 0, 1, 1, 1, 1 without a verdict-less one: mean 5/6, deviation with N - 1 sqrt(5/30) =
    .4082483."""
    groups = [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([1.0, NAN, 1.0])]
    found = group_advantages(groups, AdvantageConfig(std="batch", eps=0))
    np.testing.assert_allclose(found[0], [1.2247449, -1.2247449], atol=1e-6)
    assert [a.tolist() for a in found[1:]] == [[0, 0], [0, 0, 0]]
    assert group_advantages([np.ones(2)], AdvantageConfig(std="batch", eps=0))[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("kind", "alpha"), [("none", 1.0), ("signal", 7 / 4), ("nonzero-score", 7 / 5)]
)
def test_gpgs_rescaling(kind: Any, alpha: float) -> None:
    """Seven scores, four in groups with a signal, five other than 0."""
    groups = [np.array([1.0, 0.0, NAN]), np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.5])]
    assert gpg_rescale(groups, kind) == pytest.approx(alpha)
    found = group_advantages(groups, AdvantageConfig(std="none", rescale=kind))
    np.testing.assert_allclose(found[0], [alpha / 2, -alpha / 2, 0])
    assert gpg_rescale([np.zeros(3)], kind) == 1.0


@quick
@given(
    groups=st.lists(scores, min_size=1, max_size=5),
    loo=st.booleans(),
    std=st.sampled_from(["none", "group"]),
)
def test_groups_of_any_shape_by_loops(groups: list[list[float]], loo: bool, std: Any) -> None:
    config = AdvantageConfig(leave_one_out=loo, std=std)
    for group, found in zip(
        groups, group_advantages([np.array(g) for g in groups], config), strict=True
    ):
        known = [s for s in group if not math.isnan(s)]
        for i, score in enumerate(group):
            expected = 0.0
            if not math.isnan(score) and max(known) - min(known) > ROUNDING * max(
                1.0, *map(abs, known)
            ):
                mean = sum(known) / len(known)
                others = (sum(known) - score) / (len(known) - 1)
                expected = score - (others if loo else mean)
                if std == "group":
                    expected /= (
                        math.sqrt(sum((s - mean) ** 2 for s in known) / (len(known) - 1)) + 1e-6
                    )
            assert found[i] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(group=scores, where=st.integers(0, 8))
def test_a_completion_without_a_verdict_changes_no_other(group: list[float], where: int) -> None:
    more = [*group[:where], NAN, *group[where:]]
    place = min(where, len(group))
    for options in ({}, {"leave_one_out": True}, {"divide_by_std": True}):
        alone, beside = centred(np.array(group), **options), centred(np.array(more), **options)
        assert beside[place] == 0.0
        np.testing.assert_array_equal(np.delete(beside, place), alone)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [1e-6, 1.0, LARGEST_SCORE])
def test_the_largest_scores_train_without_an_overflow(
    name: str, size: float, columns: Callable[..., Any]
) -> None:
    """From scores to the loss in float32, also where the policy has moved as far as a log-ratio is
    followed."""
    tree = preset(name)
    advantage, loss = AdvantageConfig(**tree["advantage"]), LossConfig(**tree["loss"])
    policy = OffPolicyConfig(**tree.get("offpolicy", {}))
    per_answer = np.concatenate(
        group_advantages([np.array([size, 0.0, -size]), np.array([NAN, size, size])], advantage)
    )
    ids = np.repeat(np.arange(6), 2)
    mask = np.repeat(~np.isnan([1, 1, 1, NAN, 1, 1]), 2)
    given, _ = batch_advantages(per_answer[ids], mask, ids, advantage, values=np.zeros(12))
    logp = np.linspace(-12.0, -0.1, 12)
    rows = dict.fromkeys(("old", "behaviour", "reference"), logp[::-1].copy())
    step = columns(
        ids, mask, loss.aggregation, logp=logp, advantages=given, entropy=np.ones(12), **rows
    )
    step = replace(step, batch=replace(step.batch, correct_T=mask))
    terms = step.terms(Objective.of(loss, KLConfig(place="loss"), policy), dtype=torch.float32)
    assert torch.isfinite(terms.loss).all() and torch.isfinite(terms.dlogp).all()
    assert terms.dlogp.abs().max() > 0
    if advantage.std == "group" or advantage.whiten:
        assert np.abs(given[mask]).max() < 3, "of one size whatever the scores' size is"


# Token rewards, GAE
# ------------------------------------------------------------------------------------------------

IDS = np.array([0, 0, 0, 0, 0, 1, 1])
MASK = np.array([False, True, True, False, True, False, True])
VALUES = np.array([NAN, 0.5, 0.2, NAN, 0.4, NAN, 0.3])
SCORES = np.array([1.0, 1, 1, 1, 1, -0.5, -0.5])


def test_the_score_stands_at_the_last_loss_token() -> None:
    assert token_rewards(SCORES, MASK, IDS).tolist() == [0, 0, 0, 0, 1, 0, -0.5]
    penalty = np.array([NAN, 0.1, 0.2, NAN, 0.3, NAN, 0.1])
    np.testing.assert_allclose(
        token_rewards(SCORES, MASK, IDS, penalty), [0, -0.1, -0.2, 0, 0.7, 0, -0.6]
    )
    assert token_rewards(SCORES, np.array([1, 1, 1, 0, 0, 0, 0], bool), IDS).tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
        0,
    ]


def test_gae_by_hand() -> None:
    """gamma .9, lambda .5: deltas of the loss tokens .9 x .2 - .5 = -.32, .9 x .4 - .2 = .16, 1 -
    .4 = .6, then A = .6, .16 + .45 x .6 = .43, -.32 + .45 x .43 = -.1265; the tool's token in the
    middle is skipped."""
    rewards = token_rewards(SCORES, MASK, IDS)
    found = gae(rewards, VALUES, MASK, IDS, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(found, [0, -0.1265, 0.43, 0, 0.6, 0, -0.8], atol=1e-12)
    targets = value_targets(found, VALUES, MASK)
    np.testing.assert_allclose(targets, [0, 0.3735, 0.63, 0, 1.0, 0, -0.5], atol=1e-12)


def test_vapos_lambdas() -> None:
    np.testing.assert_allclose(
        length_adaptive_lambda(np.array([10, 20, 40, 400]), 0.05), [0, 0, 0.5, 0.95]
    )
    config = AdvantageConfig(kind="gae", std="none", lam_critic=1.0, vapo_alpha=0.5)
    advantages, targets = batch_advantages(SCORES, MASK, IDS, config, values=VALUES)
    # lengths 3 and 1: lambda 1 - 2/3 = 1/3 and 0; deltas -.3, .2, .6; targets with lambda 1 are the
    # returns
    np.testing.assert_allclose(advantages, [0, -0.3 + 0.4 / 3, 0.4, 0, 0.6, 0, -0.8], atol=1e-12)
    assert targets is not None
    np.testing.assert_allclose(targets, [0, 1, 1, 0, 1, 0, -0.5], atol=1e-12)


@quick
@given(seed=st.integers(0, 2**31), gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_gae_by_its_sum(seed: int, gamma: float, lam: float) -> None:
    """A_t as the sum over k of (gamma lambda)^k delta_{t+k}, over the loss tokens alone."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, rng.integers(1, 6))
    ids = np.repeat(np.arange(len(lengths)), lengths)
    mask = rng.random(len(ids)) < 0.6
    rewards, values = (np.where(mask, rng.standard_normal(len(ids)), NAN) for _ in range(2))
    found = gae(rewards, values, mask, ids, gamma=gamma, lam=lam)
    assert not found[~mask].any()
    for s in range(len(lengths)):
        places = np.flatnonzero(mask & (ids == s))
        r, v = rewards[places], np.append(values[places], 0.0)
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t, place in enumerate(places):
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            assert found[place] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_returns_to_go_and_whitening() -> None:
    """REINFORCE++: scores 1 and -.5, penalties .1 a token; then mean 0, variance 1 over the four
    loss tokens."""
    config = AdvantageConfig(kind="return", std="none")
    penalty = np.where(MASK, 0.1, NAN)
    returns, same = batch_advantages(SCORES, MASK, IDS, config, kl_penalty=penalty)
    np.testing.assert_allclose(returns, [0, 0.7, 0.8, 0, 0.9, 0, -0.6])
    np.testing.assert_array_equal(same, returns)
    white, plain = batch_advantages(
        SCORES, MASK, IDS, AdvantageConfig(kind="return", whiten=True), kl_penalty=penalty
    )
    known = np.array(
        [0.7, 0.8, 0.9, -0.6]
    )  # mean .45, variance with N - 1 (.0625 + .1225 + .2025 + 1.1025) / 3 = .4966667
    np.testing.assert_allclose(
        white[MASK], (known - 0.45) / math.sqrt(0.4966666667 + 1e-8), atol=1e-8
    )
    assert not white[~MASK].any()
    np.testing.assert_array_equal(plain, returns)


def test_whitening_with_n_and_without_spread() -> None:
    mask = np.array([True, True, False])
    np.testing.assert_allclose(
        whiten(np.array([1.0, 3.0, NAN]), mask, unbiased=False), [-1, 1, 0], atol=1e-7
    )
    np.testing.assert_allclose(
        whiten(np.array([1.0, 3.0, NAN]), mask), [-0.7071068, 0.7071068, 0], atol=1e-7
    )
    # their mean is 0.10000000000000002
    assert whiten(np.full(3, 0.1), np.ones(3, bool)).tolist() == [0, 0, 0]
    assert whiten(np.ones(3), np.array([True, False, False])).tolist() == [0, 0, 0]


def test_reinforce_pp_with_a_baseline_whitens_over_tokens() -> None:
    """Group differences .5 (three tokens) and -.5 (one): mean .25, variance with N - 1 .25."""
    config = AdvantageConfig(std="none", whiten=True)
    [sequence] = group_advantages([np.array([1.0, 0.0])], config)
    found, _ = batch_advantages(sequence[IDS], MASK, IDS, config)
    np.testing.assert_allclose(found[MASK], [0.5, 0.5, 0.5, -1.5], atol=1e-6)


def test_gae_without_a_critic_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"advantage.kind=gae needs a critic's values"):
        batch_advantages(SCORES, MASK, IDS, AdvantageConfig(kind="gae"))


@pytest.mark.parametrize("kind", ["return", "gae"])
def test_scores_pass_where_tokens_are_compared(kind: str) -> None:
    assert group_advantages([np.array([1.0, NAN, 0.2])], AdvantageConfig(kind=kind))[
        0
    ].tolist() == [1.0, 0.0, 0.2]


def test_an_empty_batch() -> None:
    empty = np.zeros(0)
    advantages, _ = batch_advantages(
        empty, empty.astype(bool), empty.astype(int), AdvantageConfig(kind="return", whiten=True)
    )
    assert advantages.shape == (0,)
    assert group_advantages([], AdvantageConfig(std="batch")) == []
    assert deviation(empty) == 0.0


@pytest.mark.parametrize(
    ("length", "expected"), [(79, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (130, -1)]
)
def test_the_soft_punishment_of_long_answers(length: int, expected: float) -> None:
    assert overlong_penalty(np.array([length]), 100, 20)[0] == expected


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_buffer_that_does_not_fit(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"is {buffer}; it must be in 1..100"):
        overlong_penalty(np.array([1]), 100, buffer)


@pytest.mark.parametrize(
    "scores",
    [[0.1 + 0.2, 0.3], [0.3 - 0.1 - 0.2, 0.0], [1e6 / 3, 1e6 / 3 + 1e-10], [1.0, math.nan]],
)
def test_scores_that_differ_by_rounding_are_no_signal(scores: list[float]) -> None:
    row = np.array(scores)
    assert all_equal(row)
    for config in (
        AdvantageConfig(),
        AdvantageConfig(std="none", leave_one_out=True),
        AdvantageConfig(std="batch"),
    ):
        assert not group_advantages([row], config)[0].any()
    assert gpg_rescale([row, np.array([0.0, 1.0])], "signal") == pytest.approx(
        (np.isfinite(row).sum() + 2) / 2
    )


def test_scores_that_differ_a_little_are_a_signal() -> None:
    assert not all_equal(np.array([0.0, 1e-6])) and not all_equal(np.array([1e6, 1e6 + 1]))


@pytest.mark.parametrize(
    ("log_ratio", "bound", "expected"),
    [
        (-25.0, 10.0, 10.0),
        (-5.0, 10.0, 10.0),
        (-2.62, 10.0, 10.0),
        (-2.5, 10.0, math.exp(2.5) - 3.5),
        (-5.0, None, math.exp(5) - 6),
        (-25.0, None, math.exp(20) - 21),
        (-800.0, 10.0, 10.0),
        (5.0, 10.0, math.exp(-5) + 4),
        (math.nan, 10.0, 0.0),
        (math.inf, 10.0, 0.0),
    ],
)
def test_the_penalty_in_the_reward_is_bounded(
    log_ratio: float, bound: float | None, expected: float
) -> None:
    logp = np.array([log_ratio - 1.0])
    for estimator in ("k3", "k3+"):
        found = kl_estimate(logp, np.array([-1.0]), estimator, bound=bound)  # type: ignore[arg-type]
        assert found[0] == pytest.approx(expected, rel=1e-9)
