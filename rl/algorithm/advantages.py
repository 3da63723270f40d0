"""Advantages, per completion from the scores of groups, or per token from rewards and a critic.

Pure NumPy in float64. A score of NaN is a completion without a verdict: it never enters a mean or a
deviation, and its advantage is 0. A group of one, and a group whose scores are all equal, has the
advantage 0 exactly. (verl's GRPO and RLOO hand out the raw score for a group of one; its vectorised
RLOO and prime-rl give 0 as here.)

Shape legend: G completions of a group, T tokens of a batch, S sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config.algorithm import ADVANTAGES, AdvantageConfig, Estimator, KLConfig

Floats = NDArray[np.float64]
WHITEN_EPS = 1e-8
ROUNDING = 1e-9
"""Scores that differ by less than this (relative to the largest if that is above 1) count as equal:
such a difference comes from the order of a sum."""
LOG_RATIO_LIMIT = 20.0
KL_BOUND: float | None = KLConfig().bound


def all_equal(values: NDArray[Any]) -> bool:
    """Whether all values but NaN are equal up to `ROUNDING`; true for fewer than two."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return True
    lowest, highest = float(known.min()), float(known.max())
    return highest - lowest <= ROUNDING * max(1.0, abs(lowest), abs(highest))


def group_advantages(scores: Sequence[NDArray[Any]], config: AdvantageConfig) -> list[Floats]:
    """One [G] array of advantages for each [G] array of scores; lengths may differ.

    For `return` and `gae`, whose advantages are made by `batch_advantages`, these are the scores
    themselves.
    """
    groups = [np.asarray(s, np.float64) for s in scores]
    if config.kind in ("return", "gae"):
        return [np.nan_to_num(s, nan=0.0) for s in groups]
    if config.kind not in ADVANTAGES:
        from .plugins import load_advantage

        return load_advantage(config.kind, config.options)(groups)
    advantages = [
        centred(
            s,
            leave_one_out=config.leave_one_out,
            divide_by_std=config.std == "group",
            unbiased=config.std_unbiased,
            eps=config.eps,
        )
        for s in groups
    ]
    factor = gpg_rescale(groups, config.rescale)
    if config.std == "batch":
        spread = deviation(np.concatenate(groups or [np.zeros(0)]), unbiased=config.std_unbiased)
        # without any spread every advantage is 0 already
        factor /= spread + config.eps if spread else 1.0
    return [a * factor for a in advantages]


def centred(
    scores: NDArray[Any],
    *,
    leave_one_out: bool = False,
    divide_by_std: bool = False,
    unbiased: bool = True,
    eps: float = 1e-6,
) -> Floats:
    """Scores [G] minus the group's mean, or minus the mean of the others, optionally divided by the
    group's deviation.

    Plain difference: Dr.GRPO, arXiv 2503.20783. Over (deviation + eps): GRPO, arXiv 2402.03300.
    Others' mean: RLOO, arXiv 2402.14740, which is n / (n - 1) times the plain difference for n
    scores.
    """
    scores = np.asarray(scores, np.float64)
    valid = ~np.isnan(scores)
    known = scores[valid]
    advantages = np.zeros_like(scores)
    if all_equal(known):
        return advantages
    difference = known - known.mean()
    if leave_one_out:
        difference *= len(known) / (len(known) - 1)
    if divide_by_std:
        difference /= deviation(known, unbiased=unbiased) + eps
    advantages[valid] = difference
    return advantages


def deviation(scores: NDArray[Any], *, unbiased: bool = True) -> float:
    """The standard deviation of all scores that are not NaN; 0 for fewer than two."""
    known = np.asarray(scores, np.float64)
    known = known[~np.isnan(known)]
    return float(np.std(known, ddof=int(unbiased))) if len(known) > 1 else 0.0


def gpg_rescale(
    scores: Sequence[NDArray[Any]], kind: Literal["none", "signal", "nonzero-score"]
) -> float:
    """GPG's alpha (arXiv 2504.02546): the number of scores over that of useful ones; 1 if none is.

    `signal` counts scores of groups in which two differ (the paper); `nonzero-score` scores other
    than 0 (verl).
    """
    known = [s[~np.isnan(s)] for s in (np.asarray(s, np.float64) for s in scores)]
    total = sum(len(s) for s in known)
    if kind == "signal":
        useful = sum(len(s) for s in known if not all_equal(s))
    elif kind == "nonzero-score":
        useful = sum(int(np.count_nonzero(s)) for s in known)
    else:
        return 1.0
    return total / useful if useful else 1.0


def batch_advantages(
    scores: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    config: AdvantageConfig,
    *,
    values: NDArray[Any] | None = None,
    kl_penalty: NDArray[Any] | None = None,
) -> tuple[Floats, Floats | None]:
    """The advantages [T] of tokens and, for `return` and `gae`, the returns [T], which are the
    critic's targets; 0 where `mask` is false.

    Args:
        scores: [T] the result of `group_advantages` for each token's completion.
        mask: [T] which tokens train; others (a tool's output) are skipped as if they were not
            there.
        sequence_ids: [T] integers from 0.
        values: [T] the critic's estimate *before* each token; needed for `gae`.
        kl_penalty: [T] taken from the reward of each token (kl.place=reward): kl.coef times the
            estimate.

    Raises:
        ValueError: `gae` without values.
    """
    mask = np.asarray(mask, bool)
    targets: Floats | None = None
    if config.kind in ("return", "gae"):
        rewards = token_rewards(scores, mask, sequence_ids, kl_penalty)
    if config.kind == "return":
        advantages = targets = gae(
            rewards, np.zeros(len(mask)), mask, sequence_ids, gamma=config.gamma, lam=1.0
        )
    elif config.kind == "gae":
        if values is None:
            raise ValueError(
                "advantage.kind=gae needs a critic's values; configure a critic or set"
                " advantage.kind=group"
            )
        lam: float | Floats = config.lam
        if config.vapo_alpha is not None:
            lam = length_adaptive_lambda(sequence_counts(mask, sequence_ids), config.vapo_alpha)
        lam_critic = config.lam if config.lam_critic is None else config.lam_critic
        advantages = gae(rewards, values, mask, sequence_ids, gamma=config.gamma, lam=lam)
        of_critic = gae(rewards, values, mask, sequence_ids, gamma=config.gamma, lam=lam_critic)
        targets = value_targets(of_critic, values, mask)
    else:
        advantages = np.where(mask, scores, 0.0)
    if config.whiten:
        advantages = whiten(advantages, mask, unbiased=config.whiten_unbiased)
    return advantages, targets


def token_rewards(
    scores: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    kl_penalty: NDArray[Any] | None = None,
) -> Floats:
    """Rewards [T]: the score at the last loss token of each sequence, minus the KL penalty at every
    loss token."""
    mask = np.asarray(mask, bool)
    rewards = (
        np.zeros(len(mask))
        if kl_penalty is None
        else np.where(mask, -np.asarray(kl_penalty, np.float64), 0.0)
    )
    places = np.flatnonzero(mask)
    ids = np.asarray(sequence_ids)[places]
    last = places[np.append(ids[1:] != ids[:-1], True)] if len(places) else places
    rewards[last] += np.asarray(scores, np.float64)[last]
    return rewards


def kl_estimate(
    logp: NDArray[Any],
    reference_logp: NDArray[Any],
    estimator: Estimator,
    *,
    bound: float | None = KL_BOUND,
) -> Floats:
    """Estimates [T] of KL(policy || reference) from the tokens' log-probs, to be subtracted from
    rewards; 0 where a log-prob is not finite, so that it affects no other token.

    With l = logp - reference_logp: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l
    (http://joschu.net/blog/kl-approx.html), the last for l within +-20 and at most `bound`; `k3+`
    differs from k3 in its derivative only, which a reward has none of.
    """
    both = np.asarray(logp, np.float64), np.asarray(reference_logp, np.float64)
    finite = np.isfinite(both[0]) & np.isfinite(both[1])
    log_ratio = np.where(finite, both[0], 0.0) - np.where(finite, both[1], 0.0)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return np.asarray(log_ratio**2 / 2)
    log_ratio = np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    estimate: Floats = np.minimum(
        np.expm1(-log_ratio) + log_ratio, np.inf if bound is None else bound
    )
    return estimate


def gae(
    rewards: NDArray[Any],
    values: NDArray[Any],
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    *,
    gamma: float,
    lam: float | NDArray[Any],
) -> Floats:
    """[T] generalised advantage estimation (arXiv 1506.02438) over the loss tokens of each
    sequence:

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}

    with V = A = 0 after the last one, also where a completion was cut. Tokens outside `mask` are
    skipped, V and A reaching over them (verl, AReaL; OpenRLHF takes their values as 0, slime
    ignores the mask). They may hold NaN.

    Args:
        lam: one number, or [S] one for each sequence.
    """
    places, ids, position, shape = _layout(mask, sequence_ids)
    result = np.zeros(len(mask))
    if not len(places):
        return result
    padded_rewards, padded_values = np.zeros(shape), np.zeros(shape)
    padded_rewards[ids, position] = np.asarray(rewards, np.float64)[places]
    padded_values[ids, position] = np.asarray(values, np.float64)[places]
    decay = gamma * np.broadcast_to(np.asarray(lam, np.float64), shape[0])
    advantages, following = np.zeros(shape), np.zeros(shape[0])
    value_after = np.zeros(shape[0])
    for t in reversed(range(shape[1])):
        delta = padded_rewards[:, t] + gamma * value_after - padded_values[:, t]
        following = delta + decay * following  # 0 in the padding on the right, which comes first
        value_after = padded_values[:, t]
        advantages[:, t] = following
    result[places] = advantages[ids, position]
    return result


def value_targets(
    advantages: NDArray[Any], values: NDArray[Any], mask: NDArray[np.bool_]
) -> Floats:
    """The critic's targets [T], A + V, from advantages before any whitening; 0 outside `mask`. VAPO
    (arXiv 2504.05118) uses advantages of lambda = 1 here, whatever the policy's lambda is."""
    return np.where(mask, advantages + np.where(mask, values, 0.0), 0.0)


def length_adaptive_lambda(lengths: NDArray[Any], alpha: float) -> Floats:
    """[S] VAPO's lambda of the policy, 1 - 1 / (alpha * length), never below 0 (arXiv 2504.05118,
    section 4.2)."""
    return np.maximum(0.0, 1.0 - 1.0 / (alpha * np.maximum(np.asarray(lengths, np.float64), 1.0)))


def whiten(values: NDArray[Any], mask: NDArray[np.bool_], *, unbiased: bool = True) -> Floats:
    """[T] (x - mean) / sqrt(variance + 1e-8) over all loss tokens of the step; 0 elsewhere, and for
    fewer than two tokens or no variance. The variance has N - 1 as in verl, or N as in OpenRLHF."""
    mask = np.asarray(mask, bool)
    known = np.asarray(values, np.float64)[mask]
    result = np.zeros(len(mask))
    if not all_equal(known):
        result[mask] = (known - known.mean()) / np.sqrt(known.var(ddof=int(unbiased)) + WHITEN_EPS)
    return result


def overlong_penalty(lengths: NDArray[Any], max_length: int, buffer: int) -> Floats:
    """[G] DAPO's soft punishment (arXiv 2503.14476, eq. 13), to be added to scores: 0 up to
    max_length - buffer tokens, then linearly down to -1 at max_length and beyond."""
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"the buffer of the overlong punishment is {buffer}; it must be in 1..{max_length}"
            " (max_length)"
        )
    return -np.clip((np.asarray(lengths, np.float64) - (max_length - buffer)) / buffer, 0.0, 1.0)


def sequence_counts(mask: NDArray[np.bool_], sequence_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Number of loss tokens [S] of each sequence."""
    ids = np.asarray(sequence_ids)
    return np.bincount(ids[np.asarray(mask, bool)], minlength=int(ids.max()) + 1 if len(ids) else 0)


def _layout(
    mask: NDArray[np.bool_], sequence_ids: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64], tuple[int, int]]:
    """(indices among T, row, column) of the loss tokens in a rectangle [S, longest], and its
    shape."""
    places = np.flatnonzero(mask)
    ids = np.asarray(sequence_ids)[places]
    counts = sequence_counts(mask, sequence_ids)
    starts = np.concatenate(([0], np.cumsum(counts)))
    return (
        places,
        ids,
        np.arange(len(places)) - starts[ids],
        (len(counts), int(counts.max(initial=0))),
    )
