"""Corrections for tokens that were sampled by another policy than the learner's old one: importance
weights, masks and their metrics.

Pure NumPy over the T tokens of a batch, before it is split. `old` is the learner's own log-prob of
each token under the weights that sampled it (or were closest), `behaviour` the engine's. The result
multiplies the policy-gradient term of each token; a rejected token has weight 0 and keeps its place
in the denominators (see `batch.token_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config.algorithm import OffPolicyConfig

Floats = NDArray[np.float64]
LOG_RATIO_LIMIT = 20.0
"""Log-weights are clamped to this magnitude before exp, as in verl and OpenRLHF: exp(20) is
4.9e8."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Correction:
    """The result of `correction` over the T tokens of a batch."""

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
    """The weight of every token as `config` asks for it. A loss token whose log-probs are not
    finite is rejected.

    - weight=token, mode=truncate: TIS, min(w, high) (https://fengyao.notion.site/off-policy-rl).
      With the clipped ratio against `old` this is decoupled PPO (arXiv 2110.00641, AReaL arXiv
      2505.24298).
    - weight=token, mode=mask: MIS, and IcePop with 0.5 and 5.0 (arXiv 2510.18855).
    - weight=sequence or geometric: one weight for the sequence, the product or the geometric mean.
    - seq_mask_*: drops sequences by their geometric mean, whatever the weight (OpenRLHF's and
      NeMo's seq-mask-tis with weight=token and high large).
    """
    mask = np.asarray(mask, bool)
    finite = (
        mask & np.isfinite(np.where(mask, old, 0.0)) & np.isfinite(np.where(mask, behaviour, 0.0))
    )
    log_w = np.where(
        finite, np.where(finite, old, 0.0) - np.where(finite, behaviour, 0.0), 0.0
    ).astype(np.float64)
    raw_weights, inside = token_weight(
        log_w, finite, sequence_ids, config.weight, config.mode, config.low, config.high
    )
    geometric = np.exp(_bounded(pooled(log_w, finite, sequence_ids, "mean")))
    accepted = np.ones(len(mask), bool)
    if config.seq_mask_low is not None:
        accepted &= geometric >= config.seq_mask_low
    if config.seq_mask_high is not None:
        accepted &= geometric <= config.seq_mask_high
    kept = finite & accepted & (inside if config.mode == "mask" else True)
    weights = np.where(kept, raw_weights, 0.0)
    metrics = mismatch_metrics(old, behaviour, finite, sequence_ids)
    metrics |= rejection_metrics(kept, finite, sequence_ids)
    if config.weight != "none":
        used = np.where(finite & (inside if config.mode == "mask" else True), raw_weights, 0.0)
        metrics |= weight_metrics(used, log_w, finite, sequence_ids, config)
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
    """Importance weights [T], and whether each was inside [low, high] [T] bool. Weights outside are
    clamped to the interval, or 0 with mode=mask."""
    if weight == "none":
        return np.ones(len(log_w)), np.ones(len(log_w), bool)
    if weight != "token":
        log_w = pooled(log_w, mask, sequence_ids, "sum" if weight == "sequence" else "mean")
    raw = np.exp(_bounded(log_w))
    inside = (raw >= low) & (raw <= high)
    return np.where(inside, raw, 0.0) if mode == "mask" else np.clip(raw, low, high), inside


def pooled(
    values: NDArray[Any], mask: NDArray[np.bool_], sequence_ids: NDArray[Any], how: str
) -> Floats:
    """The sum or mean [T] over the loss tokens of each token's sequence; 0 for a sequence without
    any."""
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


def mismatch_metrics(
    old: NDArray[Any], behaviour: NDArray[Any], mask: NDArray[np.bool_], sequence_ids: NDArray[Any]
) -> dict[str, float]:
    """Metrics of the difference between the rollouts' policy and the old one at the loss tokens, by
    verl's definitions and names; tokens whose log-probs are not finite are left out. With l = old -
    behaviour and w = exp(l), per token:

    kl = -l, the plain estimate of KL(rollout || old); k3_kl = w - 1 - l; chi2_token = w^2 - 1;
    rollout_probs_diff = |p_old - p_rollout|, and the correlation of the two. Per sequence, whose
    mean log-probs are m_old and m_rollout: training_log_ppl = -m_old; rollout_log_ppl = -m_rollout;
    log_ppl_diff = m_rollout - m_old; ppl_ratio = exp(log_ppl_diff); chi2_seq = exp(2 sum l) - 1.
    Exponents are held within +-20.
    """
    finite = np.asarray(mask, bool) & np.isfinite(old) & np.isfinite(behaviour)
    if not finite.any():
        return {}
    ours, theirs = (np.asarray(row, np.float64)[finite] for row in (old, behaviour))
    _, ids, counts = np.unique(
        np.asarray(sequence_ids)[finite], return_inverse=True, return_counts=True
    )
    gap = ours - theirs
    w = np.exp(_bounded(gap))
    log_ppl, their_log_ppl = (-np.bincount(ids, weights=row) / counts for row in (ours, theirs))
    difference = log_ppl - their_log_ppl
    total = _bounded(np.bincount(ids, weights=gap))
    metrics = {
        "kl": -gap.mean(),
        "k3_kl": (np.expm1(_bounded(gap)) - gap).mean(),
        "training_ppl": np.exp(np.minimum(log_ppl, LOG_RATIO_LIMIT)).mean(),
        "training_log_ppl": log_ppl.mean(),
        "rollout_ppl": np.exp(np.minimum(their_log_ppl, LOG_RATIO_LIMIT)).mean(),
        "rollout_log_ppl": their_log_ppl.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": np.abs(difference).mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": np.exp(_bounded(difference)).mean(),
        "chi2_token": (w**2).mean() - 1,
        "chi2_seq": np.exp(2 * total).mean() - 1,
    }
    probabilities = np.exp(ours), np.exp(theirs)
    apart = np.abs(probabilities[0] - probabilities[1])
    shown = {
        "rollout_probs_diff_mean": apart.mean(),
        "rollout_probs_diff_max": apart.max(),
        "rollout_probs_diff_std": apart.std(ddof=1) if len(apart) > 1 else 0.0,
    }
    if min(p.std() for p in probabilities) > 0:
        shown["rollout_actor_probs_pearson_corr"] = np.corrcoef(*probabilities)[0, 1]
    return {f"rollout_corr/{name}": float(value) for name, value in metrics.items()} | {
        f"training/{name}": float(value) for name, value in shown.items()
    }


def worker_mismatch(
    old: NDArray[Any],
    behaviour: NDArray[Any],
    mask: NDArray[np.bool_],
    workers: NDArray[Any] | None,
) -> dict[str, float]:
    """`training/rollout_probs_diff_mean` of each rollout worker's tokens; nothing where there is
    one worker."""
    if workers is None:
        return {}
    finite = np.asarray(mask, bool) & np.isfinite(old) & np.isfinite(behaviour)
    apart = np.abs(np.exp(np.asarray(old, np.float64)) - np.exp(np.asarray(behaviour, np.float64)))
    return {
        f"training/rollout_probs_diff_mean/worker_{worker}": float(
            apart[finite & (workers == worker)].mean()
        )
        for worker in np.unique(workers[finite])
    }


def weight_metrics(
    weights: NDArray[Any],
    log_w: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    config: OffPolicyConfig,
) -> dict[str, float]:
    """verl's metrics of importance weights over the tokens of `mask`, ignoring sequence masks as
    verl does. `weights` [T] are clamped or masked, `log_w` [T] is before that. Maximum and minimum
    are of the clamped weights for weight=token, else of the sequences' unclamped ones; high and low
    are the shares above config.high and below config.low (1 / config.high if that is 0)."""
    if not np.any(mask):
        return {}
    used = np.asarray(weights)[mask]
    low = config.low or 1 / config.high
    if config.weight == "token":
        before = np.exp(_bounded(log_w[mask]))
        largest, smallest = used.max(), used.min()
    else:
        _, first = np.unique(np.asarray(sequence_ids)[mask], return_index=True)
        how = "sum" if config.weight == "sequence" else "mean"
        before = np.exp(_bounded(pooled(log_w, mask, sequence_ids, how)[mask][first]))
        largest, smallest = before.max(), before.min()
    squares = float((used**2).mean())
    metrics = {
        "rollout_is_mean": used.mean(),
        "rollout_is_std": used.std(),
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        "rollout_is_eff_sample_size": float(used.mean()) ** 2 / squares if squares else 0.0,
        "rollout_is_ratio_fraction_high": (before > config.high).mean(),
        "rollout_is_ratio_fraction_low": (before < low).mean(),
    }
    return {f"rollout_corr/{name}": float(value) for name, value in metrics.items()}


def rejection_metrics(
    kept: NDArray[np.bool_], mask: NDArray[np.bool_], sequence_ids: NDArray[Any]
) -> dict[str, float]:
    """The shares of loss tokens that were rejected, and of sequences that lost one."""
    if not np.any(mask):
        return {}
    lost = mask & ~kept
    ids = np.asarray(sequence_ids)
    sequences = np.unique(ids[mask])
    return {
        "rollout_corr/rollout_rs_masked_fraction": float(lost[mask].mean()),
        "rollout_corr/rollout_rs_seq_masked_fraction": len(np.unique(ids[lost])) / len(sequences),
    }


def renormalised(weights: NDArray[Any], kept: NDArray[np.bool_]) -> Floats:
    """Aggregation weights [T] after a rejection under loss.denominator=kept: divided by 1 - the
    share of the rejected.

    For token-mean this is 1 / N_kept, for seq-mean-token-mean with whole sequences rejected 1 /
    (S_kept n_i). Weights of a mean add up to 1 over the whole step, so that sequences which are not
    in this batch stay counted.
    """
    share = float(np.where(kept, 0.0, weights).sum())
    return np.where(kept, weights, 0.0) / (1.0 - share) if share < 1.0 else np.zeros(len(weights))
