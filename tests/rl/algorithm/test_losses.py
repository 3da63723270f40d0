"""The assembled losses: hand-computed numbers, plain formulas by autograd, a NumPy implementation,
and splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.loss.fused_loss import linear_loss
from emberl.rl.algorithm.losses import Objective, token_loss
from emberl.rl.algorithm.surrogates import kl_penalty, sapo
from emberl.rl.algorithm.token_batch import TokenBatch
from emberl.rl.config.algorithm import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.presets import PRESETS, preset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"kind": "ppo_clip"},
    "ppo dual": {"kind": "ppo_clip", "dual_clip": 1.5},
    "dapo": {"kind": "ppo_clip", "clip_high": 0.28},
    "ppo trajectory": {"kind": "ppo_clip", "ratio_level": "trajectory"},
    "gspo": {"kind": "ppo_clip", "ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "gspo_token": {
        "kind": "ppo_clip",
        "ratio_level": "sequence-token",
        "clip_low": 0.03,
        "clip_high": 0.04,
    },
    "cispo": {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.5},
    "cispo verl": {"kind": "cispo"},
    "cispo sequence": {"kind": "cispo", "ratio_level": "sequence"},
    "reinforce": {"kind": "reinforce"},
    "sapo": {"kind": "sapo"},
    "sapo sequence": {"kind": "sapo", "ratio_level": "sequence"},
    "dppo_tv": {"kind": "dppo_tv", "tau": 0.05},
    "topr": {"kind": "topr"},
    "topr trajectory": {"kind": "topr", "ratio_level": "trajectory"},
    "k1_5": {"kind": "k1_5", "ratio_level": "trajectory", "tau": 0.3},
    "k2_5": {"kind": "k2_5", "clip_high": 0.28, "tau": 0.05},
}
hypothesis = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)


def plain(logp: Tensor, old: Tensor, advantage: Tensor, loss: LossConfig) -> Tensor:
    """[k] the losses of one sequence's k loss tokens, written as the papers write them, to be
    differentiated by autograd."""
    log_ratio = logp - old
    if loss.ratio_level == "sequence":
        log_ratio = log_ratio.mean().expand(len(logp))
    elif loss.ratio_level == "trajectory":
        log_ratio = log_ratio.sum().expand(len(logp))
    elif loss.ratio_level == "sequence-token":
        log_ratio = log_ratio.mean().detach() + logp - logp.detach()
    ratio = log_ratio.exp()
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if loss.kind == "ppo_clip":
        value = torch.max(-advantage * ratio, -advantage * ratio.clamp(low, high))
        if loss.dual_clip is not None:
            value = torch.where(advantage < 0, torch.min(value, -advantage * loss.dual_clip), value)
        return value
    if loss.kind == "cispo":
        return -ratio.clamp(low, high).detach() * advantage * logp
    if loss.kind == "reinforce":
        return -advantage * logp
    if loss.kind == "sapo":
        taus = torch.tensor([loss.sapo_tau_negative, loss.sapo_tau_positive], dtype=logp.dtype)
        tau = taus[(advantage > 0).long()]
        return -advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    if loss.kind == "dppo_tv":
        moved = (logp.exp() - old.exp()).detach()
        keep = ~(
            ((advantage > 0) & (moved > loss.clip_high))
            | ((advantage < 0) & (moved < -loss.clip_low))
        )
        return -advantage * ratio * keep + loss.tau * log_ratio**2
    if loss.kind == "topr":
        return torch.where(
            advantage > 0, -advantage * logp, -advantage * ratio.clamp(0, 1).detach() * logp
        )
    # of the sequence: -(A sum(logp) - tau / 2 (sum log r)^2), shared out among its tokens
    if loss.kind == "k1_5":
        return -advantage * logp + loss.tau / 2 * log_ratio**2 / len(logp)
    assert loss.kind == "k2_5"
    return -advantage * ratio.clamp(low, high) + loss.tau * log_ratio**2


def by_autograd(step: Any, loss: LossConfig) -> tuple[np.ndarray, np.ndarray]:
    """[T] each token's weighted loss, and [T] the gradient of the total by the log-probs."""
    logp = torch.from_numpy(np.where(step.batch.loss_mask_T, step.logp, 0.0)).requires_grad_(True)
    values = torch.zeros(len(logp), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for places in step.sequences():
        old, advantages = (
            torch.from_numpy(step.old[places]),
            torch.from_numpy(step.batch.advantages_T[places]),
        )
        part = plain(logp[places], old, advantages, loss) * torch.from_numpy(
            step.batch.weights_T[places]
        )
        values[places] = part.detach()
        total = total + part.sum()
    total.backward()
    assert logp.grad is not None
    return values.numpy(), logp.grad.numpy()


def in_numpy(step: Any, loss: LossConfig, aggregation: str) -> float:
    """The total of a tier 1 loss, by loops over sequences and tokens that share nothing with the
    code under test."""
    sums, counts = [], []
    for places in step.sequences():
        log_ratios = [step.logp[t] - step.old[t] for t in places]
        level = (
            [sum(log_ratios) / len(places)] * len(places)
            if loss.ratio_level.startswith("sequence")
            else log_ratios
        )
        total = 0.0
        for t, log_ratio in zip(places, level, strict=True):
            ratio, advantage = math.exp(log_ratio), step.batch.advantages_T[t]
            held = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            if loss.kind == "ppo_clip":
                value = -min(advantage * ratio, advantage * held)
                if loss.dual_clip is not None and advantage < 0:
                    value = min(value, -loss.dual_clip * advantage)
            else:
                value = -advantage * step.logp[t] * (held if loss.kind == "cispo" else 1.0)
            total += value
        sums.append(total)
        counts.append(len(places))
    if aggregation == "token-mean":
        return sum(sums) / sum(counts)
    if aggregation == "seq-mean-token-mean":
        return sum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums)
    return sum(sums) / len(sums) / (7.0 if aggregation.endswith("norm") else 1.0)


# Hand-computed
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", -0.0717453),
        ("seq-mean-token-mean", 0.0185410),
        ("seq-mean-token-sum", -0.2511086),
        ("seq-mean-token-sum-norm", -0.0502217),
    ],
)
def test_the_clipped_loss_of_four_ragged_sequences(
    hand: Callable[..., Any], objective: Callable[..., Objective], aggregation: str, expected: float
) -> None:
    """The four values that verl, OpenRLHF, AReaL and slime give: by the aggregation alone the sign
    changes."""
    terms = hand(aggregation).terms(objective(clip_high=0.28))
    assert terms.loss.sum().item() == pytest.approx(expected, abs=1e-7)
    assert terms.metrics["actor/pg_clipfrac"].mean().item() == pytest.approx(5 / 14)
    assert terms.metrics["actor/ppo_kl"].mean().item() == pytest.approx(-0.0392857, abs=1e-7)


TWO = {"logp": [-1.0, -1.0, -2.0], "old": [-1.5, -0.5, -2.1], "advantages": [2.0, 2.0, -1.0]}
"""Sequences of 2 and 1 tokens with log-ratios 0.5, -0.5, 0.1; token-mean weights are 1/3."""


@pytest.mark.parametrize(
    ("loss", "losses", "slopes"),
    [
        # 1.2 x -2 (clipped); -2 exp(-.5); exp(.1)
        ({"kind": "ppo_clip"}, [-2.4, -1.2130613, 1.1051709], [0.0, -1.2130613, 1.1051709]),
        # the second bound: 1.05 x 1 < exp(.1)
        ({"kind": "ppo_clip", "dual_clip": 1.05}, [-2.4, -1.2130613, 1.05], [0.0, -1.2130613, 0.0]),
        # the geometric mean of exp(+-.5) is 1; of the last exp(.1), where max(1.1051709, 1.0004) is
        # unclipped
        (
            {"kind": "ppo_clip", "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            [-2.0, -2.0, 1.1051709],
            [-2.0, -2.0, 1.1051709],
        ),
        (
            {
                "kind": "ppo_clip",
                "ratio_level": "sequence-token",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
            },
            [-2.0, -2.0, 1.1051709],
            [-2.0, -2.0, 1.1051709],
        ),
        # coefficients min(r, 1.2): 1.2, .6065307, 1.1051709
        (
            {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.2},
            [2.4, 1.2130613, -2.2103418],
            [-2.4, -1.2130613, 1.1051709],
        ),
        ({"kind": "reinforce"}, [2.0, 2.0, -2.0], [-2.0, -2.0, 1.0]),
        # 4 sigmoid(r - 1): sigmoid(.6487213)=.6567222, sigmoid(-.3934693)=.4028824; 4/1.05
        # sigmoid(1.05 x .1051709)=.5275793
        (
            {"kind": "sapo"},
            [-5.2537780, -3.2230593, 2.0098261],
            [-2.9734772, -1.1672958, 1.1018085],
        ),
        # p - mu = .1447493 > .1 drops the first; tau l^2 = .025, .025, .001 and 2 tau l = .1, -.1,
        # .02
        (
            {"kind": "dppo_tv", "clip_low": 0.1, "clip_high": 0.1, "tau": 0.1},
            [0.025, -1.1880613, 1.1061709],
            [0.1, -1.3130613, 1.1251709],
        ),
        # A > 0 unweighted; min(exp(.1), 1) = 1
        ({"kind": "topr"}, [2.0, 2.0, -2.0], [-2.0, -2.0, 1.0]),
        # sums of log-ratios 0 and .1: (tau / 2) .01 = .001 and tau .1 = .02 for the last
        (
            {"kind": "k1_5", "ratio_level": "trajectory", "tau": 0.2},
            [2.0, 2.0, -1.999],
            [-2.0, -2.0, 1.02],
        ),
        # clip to 1.2 and .8, without gradient on either side though A > 0 in both; tau l^2 as above
        ({"kind": "k2_5", "tau": 0.1}, [-2.375, -1.575, 1.1061709], [0.1, -0.1, 1.1251709]),
    ],
    ids=lambda value: (
        value.get("kind") + value.get("ratio_level", "") if isinstance(value, dict) else ""
    ),
)
def test_each_loss_by_hand(
    columns: Callable[..., Any],
    objective: Callable[..., Objective],
    loss: dict[str, Any],
    losses: list[float],
    slopes: list[float],
) -> None:
    rows = {name: np.array(values) for name, values in TWO.items()}
    zeros = np.zeros(3)
    step = columns(
        np.array([0, 0, 1]),
        np.ones(3, bool),
        behaviour=rows["old"],
        reference=zeros,
        entropy=zeros,
        **rows,
    )
    terms = step.terms(objective(**loss))
    np.testing.assert_allclose(3 * terms.loss.numpy(), losses, rtol=0, atol=1e-6)
    np.testing.assert_allclose(3 * terms.dlogp.numpy(), slopes, rtol=0, atol=1e-6)


def test_supervised_fine_tuning_is_the_mean_of_minus_logp(hand: Callable[..., Any]) -> None:
    step = hand()
    terms = step.terms(Objective.sft())
    assert terms.loss.sum().item() == pytest.approx(-step.logp.mean())
    np.testing.assert_allclose(terms.dlogp.numpy(), -1 / 14)


@pytest.mark.parametrize(
    ("estimator", "unbiased", "value", "slope"),
    [
        ("k1", False, 0.0392857, 1.0),
        ("k2", False, 0.0963393, 0.0392857),
        ("k3", False, 0.0991011, None),
        ("k3+", False, 0.0991011, 0.0392857),
        ("k3", True, None, None),
    ],
)
def test_the_kl_penalty(
    hand: Callable[..., Any],
    objective: Callable[..., Objective],
    estimator: str,
    unbiased: bool,
    value: float | None,
    slope: float | None,
) -> None:
    """Against the old policy as reference; the mean of each estimate is the third hand-computed
    row."""
    step = hand()
    without = step.terms(objective())
    kl = {"place": "loss", "estimator": estimator, "coef": 0.5, "unbiased": unbiased}
    terms = step.terms(objective(kl=kl))
    added, slopes = (terms.loss - without.loss).numpy(), (terms.dlogp - without.dlogp).numpy()
    log_ratio = step.logp - step.old
    if unbiased:  # r (exp(-l) - 1 + l) = 1 - r + r l, whose derivative is r l
        ratio = np.exp(log_ratio)
        np.testing.assert_allclose(added, 0.5 / 14 * (1 - ratio + ratio * log_ratio), atol=1e-12)
        np.testing.assert_allclose(slopes, 0.5 / 14 * ratio * log_ratio, atol=1e-12)
        return
    assert added.sum() == pytest.approx(0.5 * value, abs=5e-8)
    assert terms.metrics["actor/kl_loss"].sum().item() == pytest.approx(value, abs=1e-7), (
        "averaged as the loss is"
    )
    expected = 0.5 * slope if slope is not None else 0.5 * np.mean(1 - np.exp(-log_ratio))
    assert slopes.sum() == pytest.approx(expected, abs=5e-8)


def test_the_entropy_bonus_is_a_term_of_its_own(
    hand: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    step = hand("seq-mean-token-mean")
    terms, without = step.terms(objective(entropy_coef=0.3)), step.terms(objective())
    assert (terms.loss - without.loss).sum().item() == pytest.approx(-0.3)  # every entropy is 1
    np.testing.assert_allclose(terms.dentropy.numpy(), -0.3 * step.batch.weights_T, rtol=1e-12)
    np.testing.assert_array_equal(terms.dlogp.numpy(), without.dlogp.numpy())
    assert without.dentropy is None


def test_correct_answers_are_imitated_too(
    hand: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    """VAPO, arXiv 2504.05118, section 4.3: 0.1 times the mean of -logp over the tokens of correct
    answers, whatever the aggregation is; of two correct sequences here."""
    step = hand("seq-mean-token-sum")
    correct = step.batch.sequence_ids_T % 2 == 0
    step = replace(step, batch=replace(step.batch, correct_T=correct))
    terms, without = step.terms(objective(nll_coef=0.1)), step.terms(objective())
    logp, shown = step.logp[step.batch.loss_mask_T], correct[step.batch.loss_mask_T]
    assert 0 < shown.sum() < len(shown)
    assert (terms.loss - without.loss).sum().item() == pytest.approx(-0.1 * logp[shown].mean())
    np.testing.assert_allclose(
        (terms.dlogp - without.dlogp).numpy(), -0.1 / shown.sum() * shown, atol=1e-12
    )


def test_a_huge_log_ratio_gives_finite_numbers(
    columns: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    row = np.array([-1.0, -900.0])
    rows = {
        "logp": row,
        "old": row[::-1],
        "behaviour": row[::-1],
        "reference": row[::-1],
        "entropy": np.ones(2),
    }
    step = columns(np.array([0, 1]), np.ones(2, bool), advantages=np.array([-1.0, -1.0]), **rows)
    for case in CASES.values():
        terms = step.terms(
            objective(kl={"place": "loss", "coef": 0.1}, **case), dtype=torch.float32
        )
        assert torch.isfinite(terms.loss).all(), case
        assert torch.isfinite(terms.dlogp).all(), case


# Off-policy weights in the loss
# ---------------------------------------------------------------------------------------


def test_weights_multiply_the_policy_gradient_and_not_the_penalty(
    ragged: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    step = ragged(11)
    index = np.flatnonzero(step.batch.loss_mask_T)
    kl = {"place": "loss", "estimator": "k2", "coef": 0.7}
    plain_terms = step.terms(objective())
    both = step.terms(
        objective(kl=kl, offpolicy={"old_logp": "recompute", "weight": "token", "high": 1.3})
    )
    weight = np.minimum(np.exp(step.old - step.batch.behaviour_logp_T)[index], 1.3)
    gap = (step.logp - step.reference)[index]
    penalty = 0.7 * step.batch.weights_T[index] * gap
    np.testing.assert_allclose(
        both.dlogp.numpy(), plain_terms.dlogp.numpy() * weight + penalty, rtol=1e-10
    )


def test_deepseeks_mask_drops_what_is_bad_and_far_from_its_sampler(
    columns: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    ids = np.array([0, 0, 1, 1, 2, 2])
    logp = np.array([-2.0, -1.0, -2.0, -1.0, -1.2, -1.0])
    behaviour = np.full(6, -0.5)  # means of log(rollout / policy): 1, 1, 0.6
    advantages = np.array([-1.0, 1.0, -1.0])[ids]
    rows = {"old": behaviour, "behaviour": behaviour, "reference": behaviour, "entropy": behaviour}
    step = columns(ids, np.ones(6, bool), logp=logp, advantages=advantages, **rows)
    terms = step.terms(objective(offpolicy={"opsm_delta": 0.7}, kind="reinforce"))
    np.testing.assert_allclose(6 * terms.dlogp.numpy(), [0, 0, -1, -1, 1, 1])
    assert terms.metrics["rollout_corr/opsm_masked_fraction"].tolist() == [1, 1, 0, 0, 0, 0]


def test_the_denominator_after_a_rejection(
    columns: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    """Four tokens of which one is rejected: divided by 4, or by 3."""
    ids, ones = np.zeros(4, int), np.ones(4)
    behaviour = np.array([-1.0, -1.0, -1.0, -5.0])
    rows = {
        "logp": -ones,
        "old": -ones,
        "behaviour": behaviour,
        "reference": ones,
        "entropy": ones,
        "advantages": ones,
    }
    step = columns(ids, np.ones(4, bool), **rows)
    masked = {"old_logp": "recompute", "weight": "token", "mode": "mask", "low": 0.5, "high": 5.0}
    for denominator, expected in (("all", 3 / 4), ("kept", 1.0)):
        terms = step.terms(objective(offpolicy=masked, denominator=denominator, kind="reinforce"))
        assert terms.loss.sum().item() == pytest.approx(expected)


# Plain formulas
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@hypothesis
@given(seed=seeds, aggregation=st.sampled_from(AGGREGATIONS))
def test_the_closed_form_is_what_autograd_finds(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    case: dict[str, Any],
    seed: int,
    aggregation: str,
) -> None:
    step = ragged(seed, aggregation)
    index = np.flatnonzero(step.batch.loss_mask_T)
    values, gradient = by_autograd(step, LossConfig(**case))
    terms = step.terms(objective(**case))
    np.testing.assert_allclose(terms.loss.numpy(), values[index], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(terms.dlogp.numpy(), gradient[index], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "name", ["ppo", "ppo dual", "dapo", "gspo", "gspo_token", "cispo", "reinforce"]
)
@hypothesis
@given(seed=seeds, aggregation=st.sampled_from(AGGREGATIONS))
def test_tier_one_in_numpy(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    name: str,
    seed: int,
    aggregation: str,
) -> None:
    step, case = ragged(seed, aggregation), CASES[name]
    expected = in_numpy(step, LossConfig(**case), aggregation)
    assert step.terms(objective(**case)).loss.sum().item() == pytest.approx(
        expected, rel=1e-10, abs=1e-12
    )


DIFFERENTIABLE = {
    n: CASES[n]
    for n in ("ppo", "ppo dual", "gspo", "sapo", "sapo sequence", "ppo trajectory", "k1_5", "k2_5")
}


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_the_derivative_is_the_numerical_one(
    ragged: Callable[..., Any], objective: Callable[..., Objective], case: dict[str, Any]
) -> None:
    """Where no stop-gradient is meant."""
    for seed in range(5):
        step = ragged(seed, "seq-mean-token-mean")
        index = np.flatnonzero(step.batch.loss_mask_T)
        loss = token_loss(objective(**case), step.batch, torch.device("cpu"), old_logp=step.old)
        stated = step.terms(objective(**case)).dlogp.numpy()
        for i, t in enumerate(index):
            totals = []
            for h in (1e-6, -1e-6):
                moved = step.logp.copy()
                moved[t] += h
                stats = type(step)(step.batch, moved, step.old, step.reference, step.entropy).stats(
                    index
                )
                totals.append(loss(stats, torch.from_numpy(index)).loss.sum().item())
            assert (totals[0] - totals[1]) / 2e-6 == pytest.approx(stated[i], rel=1e-5, abs=1e-8)


def test_gspo_and_gspo_token_agree_when_the_advantage_is_constant(
    ragged: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    for seed in range(20):
        step = ragged(seed, "seq-mean-token-mean")
        both = [step.terms(objective(**CASES[name])) for name in ("gspo", "gspo_token")]
        torch.testing.assert_close(both[0].loss, both[1].loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(both[0].dlogp, both[1].dlogp, rtol=1e-12, atol=1e-15)


# Splits, masks, bad numbers
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=seeds, order=st.randoms(use_true_random=False))
def test_no_split_into_micro_batches_changes_anything(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    case: dict[str, Any],
    aggregation: str,
    seed: int,
    order: Any,
) -> None:
    step = ragged(seed, aggregation)
    wanted = objective(
        kl={"place": "loss", "coef": 0.1, "unbiased": True},
        offpolicy={
            "old_logp": "recompute",
            "weight": "token",
            "seq_mask_low": 0.2,
            "opsm_delta": 0.5,
        },
        entropy_coef=0.1,
        **case,
    )
    whole = step.terms(wanted)
    index = np.flatnonzero(step.batch.loss_mask_T)
    place = {t: i for i, t in enumerate(index)}
    sequences = step.sequences()
    order.shuffle(sequences)
    cuts = sorted(order.sample(range(len(sequences) + 1), order.randint(0, len(sequences))))
    total = 0.0
    for first, last in zip([0, *cuts], [*cuts, len(sequences)], strict=True):
        if first == last:
            continue
        part = np.concatenate(sequences[first:last])
        terms = step.terms(wanted, part)
        total += terms.loss.sum().item()
        there = [place[t] for t in part]
        for name in ("loss", "dlogp", "dentropy"):
            found, expected = getattr(terms, name).numpy(), getattr(whole, name)[there].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-16)
    assert total == pytest.approx(whole.loss.sum().item(), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("name", ["dapo", "cispo", "sapo", "dppo_tv"])
def test_tokens_of_a_sequence_may_be_split_where_nothing_couples_them(
    ragged: Callable[..., Any], objective: Callable[..., Objective], name: str
) -> None:
    step = ragged(5)
    loss = token_loss(objective(**CASES[name]), step.batch, torch.device("cpu"), old_logp=step.old)
    assert not loss.whole_sequences
    index = np.flatnonzero(step.batch.loss_mask_T)
    whole = step.terms(objective(**CASES[name]))
    alone = [step.terms(objective(**CASES[name]), index[i : i + 1]) for i in range(len(index))]
    torch.testing.assert_close(torch.cat([a.dlogp for a in alone]), whole.dlogp, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_nothing_under_the_mask_leaks(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    case: dict[str, Any],
    garbage: float,
) -> None:
    """Tokens that do not train may hold anything, also where a chunk contains them."""
    wanted = objective(
        kl={"place": "loss", "coef": 0.1},
        offpolicy={"old_logp": "recompute", "weight": "sequence", "opsm_delta": 0.5},
        **case,
    )
    clean, dirty = ragged(7, garbage=-1.0), ragged(7, garbage=garbage)
    everything = np.arange(len(dirty.logp))
    expected, found = clean.terms(wanted), dirty.terms(wanted, everything)
    mask = dirty.batch.loss_mask_T
    np.testing.assert_array_equal(found.loss.numpy()[mask], expected.loss.numpy())
    np.testing.assert_array_equal(found.dlogp.numpy()[mask], expected.dlogp.numpy())
    for tensor in (found.loss, found.dlogp, *found.metrics.values()):
        np.testing.assert_array_equal(tensor.numpy()[~mask], 0.0)


@pytest.mark.parametrize("column", ["logp", "old", "behaviour", "reference"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_loss_token_whose_log_prob_is_not_finite_is_left_out_and_counted(
    columns: Callable[..., Any], objective: Callable[..., Objective], column: str, bad: float
) -> None:
    ids = np.array([0, 0, 1])
    rows = {
        name: np.full(3, -1.0)
        for name in ("logp", "old", "behaviour", "reference", "entropy", "advantages")
    }
    rows[column][0] = bad
    kl = {"place": "loss", "coef": 0.1}
    token = columns(ids, np.ones(3, bool), **rows).terms(objective(kl=kl))
    np.testing.assert_allclose(3 * token.dlogp.numpy(), [0, 1, 1])
    assert token.metrics["actor/nonfinite_logp"].tolist() == [1, 0, 0]
    sequence = columns(ids, np.ones(3, bool), **rows).terms(
        objective(kl=kl, ratio_level="sequence")
    )
    np.testing.assert_allclose(3 * sequence.dlogp.numpy(), [0, 0, 1])


def test_an_advantage_that_is_not_finite_is_an_error(
    columns: Callable[..., Any], objective: Callable[..., Objective]
) -> None:
    rows = {
        name: np.full(2, -1.0)
        for name in ("logp", "old", "behaviour", "reference", "entropy", "advantages")
    }
    rows["advantages"][1] = np.nan
    with pytest.raises(ValueError, match="1 of 2 loss tokens have an advantage that is not finite"):
        columns(np.zeros(2, int), np.ones(2, bool), **rows).terms(objective())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32_is_close_to_float64(
    ragged: Callable[..., Any], objective: Callable[..., Objective], case: dict[str, Any]
) -> None:
    step = ragged(3)
    wide, narrow = step.terms(objective(**case)), step.terms(objective(**case), dtype=torch.float32)
    assert narrow.loss.dtype == narrow.dlogp.dtype == torch.float32
    torch.testing.assert_close(narrow.dlogp.double(), wide.dlogp, rtol=1e-5, atol=1e-6)


def whole_batch(wanted: Objective, step: Any) -> Sequence[Tensor]:
    return token_loss(
        wanted, step.batch, torch.device("cpu"), old_logp=step.old, reference_logp=step.reference
    )


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "k1_5"])
def test_the_gradient_that_reaches_a_head_through_the_fused_loss(
    ragged: Callable[..., Any], objective: Callable[..., Objective], name: str
) -> None:
    """The same gradient by the weights of an output layer as when autograd differentiates the plain
    formula."""
    step = ragged(21, "seq-mean-token-mean")
    batch = step.batch
    torch.manual_seed(0)
    count = batch.num_tokens
    hidden = torch.randn(count, 4, dtype=torch.float64)
    targets = torch.randint(0, 9, (count,))
    head = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        logp = torch.log_softmax(hidden @ head.T, -1).gather(1, targets[:, None])[:, 0].numpy()
    moved = type(step)(
        batch, logp, logp - 0.3 * (step.logp - step.old), step.reference, step.entropy
    )
    value, _, _ = linear_loss(
        hidden,
        head,
        targets,
        whole_batch(objective(**CASES[name]), moved),
        sequence_ids=torch.from_numpy(batch.sequence_ids_T),
    )
    (found,) = torch.autograd.grad(value, head)
    traced = torch.log_softmax(hidden @ head.T, -1).gather(1, targets[:, None])[:, 0]
    total = torch.zeros((), dtype=torch.float64)
    for places in moved.sequences():
        old, advantages = (
            torch.from_numpy(moved.old[places]),
            torch.from_numpy(batch.advantages_T[places]),
        )
        weights = torch.from_numpy(batch.weights_T[places])
        total = (
            total
            + (plain(traced[places], old, advantages, LossConfig(**CASES[name])) * weights).sum()
        )
    (expected,) = torch.autograd.grad(total, head)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(value, total, rtol=1e-10, atol=1e-14)


def test_what_an_objective_asks_for(objective: Callable[..., Objective]) -> None:
    assert not objective(offpolicy={"old_logp": "rollout"}).needs_old_logp
    assert objective(offpolicy={"old_logp": "recompute"}).needs_old_logp
    assert not objective().needs_all_tokens
    assert objective(entropy_coef=0.1).needs_all_tokens
    assert objective(kind="k2_5", tau=0.1).needs_all_tokens
    assert objective(kl={"place": "loss"}).needs_all_tokens
    assert objective(kl={"place": "loss"}).needs_reference
    assert not objective(kl={"place": "loss", "coef": 0.0}).needs_reference
    assert Objective.sft().needs_all_tokens
    assert not Objective.sft().on_samples


@pytest.mark.parametrize(
    ("gap", "bound", "value", "slope"),
    [
        (-5.0, 10.0, 10.0, 0.0),
        (-2.0, 10.0, math.exp(2) - 3, 1 - math.exp(2)),
        (-5.0, None, math.exp(5) - 6, 1 - math.exp(5)),
        (-20.0, 10.0, 10.0, 0.0),
        (12.0, 10.0, 10.0, 0.0),
        (5.0, 10.0, math.exp(-5) + 4, 1 - math.exp(-5)),
        (-5.0, 3.0, 3.0, 0.0),
    ],
)
def test_k3_is_bounded_and_has_no_gradient_beyond(
    gap: float, bound: float | None, value: float, slope: float
) -> None:
    """log(policy / reference) = -5 gave a loss of 142 with a slope of -147."""
    logp, reference = (
        torch.tensor([gap - 1.0], dtype=torch.float64),
        torch.tensor([-1.0], dtype=torch.float64),
    )
    found = kl_penalty(logp, reference, "k3", bound=bound)
    assert (found.loss.item(), found.dlogp.item()) == (pytest.approx(value), pytest.approx(slope))
    through = kl_penalty(logp, reference, "k3+", bound=bound)
    assert (through.loss.item(), through.dlogp.item()) == (
        pytest.approx(value),
        pytest.approx(gap),
    ), "the slope is k2's"
    # r = 1: the value is differentiated, too
    unbiased = kl_penalty(logp, reference, "k3", bound=bound, old_logp=logp)
    assert unbiased.dlogp.item() == pytest.approx(slope + value)


def test_sapos_constants_are_of_the_batchs_dtype() -> None:
    """A negative advantage, l = .3: 1.05 rounded to float32 first would be off by 4e-8."""
    ratio = math.exp(0.3)
    found = sapo(
        torch.tensor([0.3], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    )
    assert found.loss.item() == pytest.approx(
        4 / 1.05 / (1 + math.exp(-1.05 * (ratio - 1))), rel=1e-14
    )


def test_sums_over_a_long_answer_are_exact() -> None:
    """A hundred thousand tokens in float32, whose sum in float64 is rounded once."""
    values = torch.linspace(-1, 1.001, 100_000)
    zeros = torch.zeros_like(values)
    batch = TokenBatch(
        old_logp=zeros,
        behaviour_logp=zeros,
        advantages=zeros,
        sequence=torch.zeros(100_000, dtype=torch.int64),
        length=zeros,
    )
    expected = values.double().sum()
    assert batch.sums(values)[0].item() == pytest.approx(expected.item(), rel=1e-7)
    assert batch.sums(values).dtype == torch.float32


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_shows_its_entropy(name: str, columns: Callable[..., Any]) -> None:
    tree = preset(name)
    loss = LossConfig(**tree["loss"])
    policy = OffPolicyConfig(**tree.get("offpolicy", {}))
    ids = np.array([0, 0, 1])
    rows = {key: np.array([-1.0, -2.0, -0.5]) for key in ("logp", "old", "behaviour", "reference")}
    step = columns(
        ids, np.ones(3, bool), advantages=np.ones(3), entropy=np.array([0.3, 0.6, 0.9]), **rows
    )
    batch = replace(step.batch, correct_T=np.ones(3, bool))
    function = token_loss(
        Objective.of(loss, KLConfig(), policy), batch, torch.device("cpu"), old_logp=step.old
    )
    assert function.needs_entropy
    terms = function(step.stats(np.arange(3)), torch.arange(3))
    assert terms.metrics["actor/entropy_per_token"].tolist() == pytest.approx([0.3, 0.6, 0.9])
    assert terms.dentropy is None, "only shown"
