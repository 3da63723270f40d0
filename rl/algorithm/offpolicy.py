"""Corrections for tokens that another policy than the learner's old one has sampled: weights, masks and their figures.

Pure NumPy over the T tokens of a batch, before it is split. `old` is the learner's own log-prob of each token under the
weights that sampled it (or were closest), `behaviour` the engine's. The result multiplies the policy-gradient term of
each token; a rejected token has weight 0 and keeps its place in the denominators (see `aggregation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config.algorithm import OffPolicyConfig

Floats = NDArray[np.float64]
LOG_RATIO_LIMIT = 20.0
"""Logarithms of weights are cut here before they become numbers, as in verl and OpenRLHF: exp(20) is 4.9e8."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Correction:
    """What `correction` found, over the T tokens of a batch."""

    weights: Floats
    """[T] multiplies each token's policy-gradient term; 0 where rejected or not a loss token."""
    kept: NDArray[np.bool_]
    """[T] loss tokens that were not rejected."""
    metrics: dict[str, float]
    """`rollout_corr/*`, names as in verl."""


def correction(
    old: NDArray[Any],
    behaviour: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    config: OffPolicyConfig,
) -> Correction:
    """The weight of every token as `config` asks for it. A loss token whose log-probs are not finite is rejected.

    - weight=token, mode=truncate: TIS, min(w, high) (https://fengyao.notion.site/off-policy-rl). With the clipped ratio
      against `old` this is decoupled PPO (arXiv 2110.00641, AReaL arXiv 2505.24298).
    - weight=token, mode=mask: MIS, and IcePop with 0.5 and 5.0 (arXiv 2510.18855).
    - weight=sequence or geometric: one weight for the sequence, the product or the geometric mean.
    - seq_mask_*: drops sequences by their geometric mean, whatever the weight (OpenRLHF's and NeMo's seq-mask-tis with
      weight=token and high large).
    """
    mask = np.asarray(mask, bool)
    finite = mask & np.isfinite(np.where(mask, old, 0.0)) & np.isfinite(np.where(mask, behaviour, 0.0))
    log_w = np.where(finite, np.where(finite, old, 0.0) - np.where(finite, behaviour, 0.0), 0.0).astype(np.float64)
    weights, inside = token_weight(log_w, finite, sequence_ids, config.weight, config.mode, config.low, config.high)
    geometric = np.exp(_bounded(pooled(log_w, finite, sequence_ids, "mean")))
    accepted = np.ones(len(mask), bool)
    if config.seq_mask_low is not None:
        accepted &= geometric >= config.seq_mask_low
    if config.seq_mask_high is not None:
        accepted &= geometric <= config.seq_mask_high
    kept = finite & accepted & (inside if config.mode == "mask" else True)
    weights = np.where(kept, weights, 0.0)
    metrics = mismatch_metrics(log_w, finite, sequence_ids) | weight_metrics(weights, mask, kept, inside)
    return Correction(weights=weights, kept=kept, metrics=metrics)


def token_weight(
    log_w: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    weight: Literal["none", "token", "sequence", "geometric"],
    mode: Literal["truncate", "mask"],
    low: float,
    high: float,
) -> tuple[Floats, NDArray[np.bool_]]:
    """[T] importance weights and [T] which were inside [low, high]: outside they are cut to it, or 0 with mode=mask."""
    if weight == "none":
        return np.ones(len(log_w)), np.ones(len(log_w), bool)
    if weight != "token":
        log_w = pooled(log_w, mask, sequence_ids, "sum" if weight == "sequence" else "mean")
    raw = np.exp(_bounded(log_w))
    inside = (raw >= low) & (raw <= high)
    return np.where(inside, raw, 0.0) if mode == "mask" else np.clip(raw, low, high), inside


def pooled(values: NDArray[Any], mask: NDArray[np.bool_], sequence_ids: NDArray[Any], how: str) -> Floats:
    """[T] the sum or mean over the loss tokens of each token's sequence; 0 for a sequence without any."""
    ids = np.asarray(sequence_ids)
    if not len(ids):
        return np.zeros(0)
    totals: Floats = np.bincount(ids, weights=np.where(mask, values, 0.0)).astype(np.float64)
    if how == "mean":
        totals /= np.maximum(np.bincount(ids, weights=np.asarray(mask, np.float64)), 1.0)
    result: Floats = totals[ids]
    return result


def _bounded(log_w: NDArray[Any]) -> Floats:
    bounded: Floats = np.clip(log_w, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded


def mismatch_metrics(log_w: NDArray[Any], mask: NDArray[np.bool_], sequence_ids: NDArray[Any]) -> dict[str, float]:
    """How far the rollouts' policy is from the old one, from log w = old - behaviour at the loss tokens.

    kl is the plain estimate of KL(rollout || old), k3_kl the one that is never negative; chi2 is E[w^2] - 1, of tokens
    and of whole sequences; ppl_ratio is old perplexity over the rollouts.
    """
    if not np.any(mask):
        return {}
    tokens = _bounded(log_w[mask])
    _, first = np.unique(np.asarray(sequence_ids)[mask], return_index=True)
    mean = _bounded(pooled(log_w, mask, sequence_ids, "mean")[mask][first])
    total = _bounded(pooled(log_w, mask, sequence_ids, "sum")[mask][first])
    found = {
        "kl": -tokens.mean(),
        "k3_kl": (np.expm1(tokens) - tokens).mean(),
        "log_ppl_abs_diff": np.abs(mean).mean(),
        "ppl_ratio": np.exp(-mean).mean(),
        "chi2_token": np.exp(2 * tokens).mean() - 1,
        "chi2_seq": np.exp(2 * total).mean() - 1,
    }
    return {f"rollout_corr/{name}": float(value) for name, value in found.items()}


def weight_metrics(
    weights: NDArray[Any], mask: NDArray[np.bool_], kept: NDArray[np.bool_], inside: NDArray[np.bool_]
) -> dict[str, float]:
    """Figures of the weights over the loss tokens: mean, largest, effective sample share, what was cut or rejected."""
    if not np.any(mask):
        return {}
    used = weights[mask]
    squares = float((used**2).sum())
    found = {
        "rollout_is_mean": used.mean(),
        "rollout_is_max": used.max(),
        "rollout_is_eff_sample_size": float(used.sum()) ** 2 / squares / len(used) if squares else 0.0,
        "rollout_is_ratio_fraction_outside": 1.0 - np.asarray(inside)[mask].mean(),
        "rollout_rs_masked_fraction": 1.0 - kept[mask].mean(),
    }
    return {f"rollout_corr/{name}": float(value) for name, value in found.items()}


def renormalised(weights: NDArray[Any], kept: NDArray[np.bool_]) -> Floats:
    """[T] aggregation weights after a rejection under loss.denominator=kept: divided by 1 - the share of the rejected.

    For token-mean this is 1 / N_kept, for seq-mean-token-mean with whole sequences rejected 1 / (S_kept n_i). Weights
    of a mean add up to 1 over the whole step, so that sequences which are not in this batch stay counted.
    """
    share = float(np.where(kept, 0.0, weights).sum())
    return np.where(kept, weights, 0.0) / (1.0 - share) if share < 1.0 else np.zeros(len(weights))
