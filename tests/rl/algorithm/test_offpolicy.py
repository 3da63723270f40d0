"""Importance weights, masks and their figures by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from emberl.rl.algorithm.offpolicy import correction, mismatch_metrics, renormalised
from emberl.rl.config.algorithm import OffPolicyConfig

IDS = np.array([0, 0, 0, 1, 1, 2])
MASK = np.array([False, True, True, True, True, True])
W = np.array([math.nan, 4.0, 0.25, 3.0, 1.0, 0.4])
"""Weights of the loss tokens. Products 1, 3, 0.4; geometric means 1, 1.732, 0.4."""
BEHAVIOUR = np.array([math.nan, -2.0, -1.0, -2.0, -1.0, -1.0])
OLD = BEHAVIOUR + np.log(W)


def corrected(**config: Any) -> Any:
    return correction(OLD, BEHAVIOUR, MASK, IDS, OffPolicyConfig(old_logp="recompute", **config))


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({}, [0, 1, 1, 1, 1, 1]),
        ({"weight": "token"}, [0, 2, 0.25, 2, 1, 0.4]),
        ({"weight": "token", "low": 0.5, "high": 3.5}, [0, 3.5, 0.5, 3, 1, 0.5]),
        ({"weight": "token", "mode": "mask", "low": 0.5, "high": 3.5}, [0, 0, 0, 3, 1, 0]),
        ({"weight": "sequence"}, [0, 1, 1, 2, 2, 0.4]),
        ({"weight": "sequence", "mode": "mask", "high": 2.9}, [0, 1, 1, 0, 0, 0.4]),
        ({"weight": "geometric", "high": 10}, [0, 1, 1, math.sqrt(3), math.sqrt(3), 0.4]),
        ({"seq_mask_low": 0.5}, [0, 1, 1, 1, 1, 0]),
        ({"seq_mask_high": 1.7}, [0, 1, 1, 0, 0, 1]),
        (
            {"weight": "token", "high": 99, "seq_mask_low": 0.5, "seq_mask_high": 1.7},
            [0, 4, 0.25, 0, 0, 0],
        ),
    ],
)
def test_weights_by_hand(config: dict[str, Any], weights: list[float]) -> None:
    found = corrected(**config)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-12)
    assert found.kept.tolist() == [w != 0 for w in weights]


def test_the_figures_by_hand() -> None:
    """Log-probs -2, -1 | -2, -1 | -1 of the engine, of three sequences."""
    found = corrected(weight="token", mode="mask", low=0.5, high=3.5).metrics
    log = np.log(W[1:])
    means = np.array([0.0, math.log(3) / 2, math.log(0.4)])
    theirs = np.array([1.5, 1.5, 1.0])
    expected = {
        "kl": -log.mean(),
        "k3_kl": (W[1:] - 1 - log).mean(),
        "rollout_log_ppl": theirs.mean(),
        "rollout_ppl": np.exp(theirs).mean(),
        "training_log_ppl": (theirs - means).mean(),
        "training_ppl": np.exp(theirs - means).mean(),
        "log_ppl_diff": -means.mean(),
        "log_ppl_diff_max": math.log(2.5),
        "log_ppl_diff_min": -math.log(3) / 2,
        "log_ppl_abs_diff": np.abs(means).mean(),
        "ppl_ratio": (1 + 3**-0.5 + 2.5) / 3,
        "chi2_token": (16 + 0.0625 + 9 + 1 + 0.16) / 5 - 1,
        "chi2_seq": (1 + 9 + 0.16) / 3 - 1,
        "rollout_is_mean": 4 / 5,
        "rollout_is_std": math.sqrt(10 / 5 - (4 / 5) ** 2),
        "rollout_is_max": 3.0,
        "rollout_is_min": 0.0,
        "rollout_is_eff_sample_size": 16 / 10 / 5,
        "rollout_is_ratio_fraction_high": 1 / 5,
        "rollout_is_ratio_fraction_low": 2 / 5,
        "rollout_rs_masked_fraction": 3 / 5,
        "rollout_rs_seq_masked_fraction": 2 / 3,
    }
    corrections = {name: value for name, value in found.items() if name.startswith("rollout_corr/")}
    assert corrections == pytest.approx(
        {f"rollout_corr/{name}": value for name, value in expected.items()}
    )


def test_the_engines_and_the_learners_probabilities() -> None:
    """.5 and .25 of the learner, .4 and .3 of the engine: differences .1 and .05, of which the
    deviation with N - 1 is .0353553; the third token is NaN and the fourth does not count."""
    old, behaviour = np.log([0.5, 0.25, 0.5, 0.9]), np.log([0.4, 0.3, math.nan, 0.1])
    found = mismatch_metrics(
        old, behaviour, np.array([True, True, True, False]), np.array([0, 0, 1, 1])
    )
    assert found["training/rollout_probs_diff_mean"] == pytest.approx(0.075)
    assert found["training/rollout_probs_diff_max"] == pytest.approx(0.1)
    assert found["training/rollout_probs_diff_std"] == pytest.approx(0.0353553, rel=1e-5)
    assert found["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1.0)
    alone = mismatch_metrics(old[:1], behaviour[:1], np.ones(1, bool), np.zeros(1, int))
    assert alone["training/rollout_probs_diff_std"] == 0
    assert "training/rollout_actor_probs_pearson_corr" not in alone


def test_the_largest_sequence_weight_is_that_before_it_was_cut() -> None:
    # products 1, 3 and .4; the second is cut to 2
    found = corrected(weight="sequence", high=2.0).metrics
    assert found["rollout_corr/rollout_is_max"] == pytest.approx(3.0)
    assert found["rollout_corr/rollout_is_min"] == pytest.approx(0.4)
    assert found["rollout_corr/rollout_is_mean"] == pytest.approx((1 + 1 + 2 + 2 + 0.4) / 5)
    assert found["rollout_corr/rollout_is_ratio_fraction_high"] == pytest.approx(1 / 3)


def test_a_log_prob_that_is_not_finite_is_rejected_alone() -> None:
    behaviour = BEHAVIOUR.copy()
    behaviour[3] = -math.inf
    config = OffPolicyConfig(old_logp="recompute", weight="geometric", high=10)
    found = correction(OLD, behaviour, MASK, IDS, config)
    np.testing.assert_allclose(found.weights, [0, 1, 1, 0, 1, 0.4])
    assert all(math.isfinite(value) for value in found.metrics.values())


def test_extreme_log_probs_give_finite_weights() -> None:
    config = OffPolicyConfig(old_logp="recompute", weight="sequence", high=1e30)
    found = correction(
        np.array([-1.0, -900.0]), np.array([-900.0, -1.0]), np.ones(2, bool), np.arange(2), config
    )
    np.testing.assert_allclose(found.weights, [math.exp(20), math.exp(-20)])


def test_renormalising_after_a_rejection() -> None:
    """Three of five tokens stay: 1/5 each becomes 1/3. Where a fifth weight belongs to another
    batch it stays counted."""
    kept = np.array([True, True, False, True, False])
    np.testing.assert_allclose(renormalised(np.full(5, 0.2), kept), [1 / 3, 1 / 3, 0, 1 / 3, 0])
    np.testing.assert_allclose(renormalised(np.full(4, 0.2), kept[:4]), [1 / 4, 1 / 4, 0, 1 / 4])
    assert renormalised(np.full(5, 0.2), np.zeros(5, bool)).tolist() == [0] * 5


def test_an_empty_batch() -> None:
    empty = np.zeros(0)
    found = correction(
        empty,
        empty,
        empty.astype(bool),
        empty.astype(int),
        OffPolicyConfig(old_logp="recompute", weight="sequence"),
    )
    assert len(found.weights) == 0
    assert found.metrics == {}
