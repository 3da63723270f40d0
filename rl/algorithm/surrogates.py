"""The losses as functions that return, token by token, a loss and its derivative in closed form,
and the kinds of `loss.kind` that are made of them.

Everything is minimised. r = exp(l) is policy over old policy, l = log r; A is the advantage.
Functions know no mask, weight or mean, which `losses` applies; only the kinds (`KINDS`) multiply by
the tokens' weights, at the settings' ratio level.
`TokenTerms.dlogp` is here the derivative by the first argument, with the stop-gradients of the
paper respected. l is held within +-20 (verl, OpenRLHF), with derivative 0 beyond, so that exp never
overflows.

Arguments and results are [n] tensors of float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.loss.terms import TokenTerms
from ..config.algorithm import Estimator, KLConfig, LossConfig
from .token_batch import TokenBatch

LOG_RATIO_LIMIT = 20.0
KL_BOUND: float | None = KLConfig().bound
TAU_TERM = "actor/tau_loss"
"""Metric of the term that `loss.tau` multiplies."""


def bounded(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """l clamped to +-20, and whether it was inside (bool)."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), log_ratio.abs() <= LOG_RATIO_LIMIT


def ppo_clip(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenTerms:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -dual_clip A.

    PPO, arXiv 1707.06347, eq. 7; the second bound ("dual clip") arXiv 1912.09729, eq. 5; unequal
    bounds DAPO, arXiv 2503.14476, eq. 8; with the l of a sequence GSPO, arXiv 2507.18071, eq. 5.
    `pg_clipfrac` counts tokens whose clipped loss is strictly the larger, `pg_clipfrac_lower` those
    at the second bound, as in verl.
    """
    log_r, moving = bounded(log_ratio)
    ratio = log_r.exp()
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = held > plain
    loss = torch.maximum(plain, held)
    slope = torch.where(moving & ~clipped, plain, 0.0)
    metrics = {"actor/pg_clipfrac": clipped.to(log_r.dtype), "actor/ratio": ratio}
    if dual_clip is not None:
        limit = -advantages * dual_clip
        capped = (advantages < 0) & (loss > limit)
        loss, slope = torch.where(capped, limit, loss), torch.where(capped, 0.0, slope)
        metrics["actor/pg_clipfrac_lower"] = capped.to(log_r.dtype)
    return TokenTerms(loss=loss, dlogp=slope, metrics=metrics)


def sapo(
    log_ratio: Tensor, advantages: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> TokenTerms:
    """-A (4 / tau) sigmoid(tau (r - 1)), with one tau for A > 0 and another otherwise: a smooth
    gate instead of a clip.

    SAPO, arXiv 2511.20347, eq. 5 and 6.
    """
    log_r, moving = bounded(log_ratio)
    ratio = log_r.exp()
    # torch.where would round plain Python numbers to float32
    tau = torch.where(
        advantages > 0, log_r.new_tensor(tau_positive), log_r.new_tensor(tau_negative)
    )
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = -4 * advantages * gate * (1 - gate) * ratio
    return TokenTerms(
        loss=-advantages * (4 / tau) * gate,
        dlogp=torch.where(moving, slope, 0.0),
        metrics={"actor/ratio": ratio},
    )


def reinforce(logp: Tensor, advantages: Tensor) -> TokenTerms:
    """-A logp (Williams 1992): RLOO, GPG (arXiv 2504.02546)."""
    return TokenTerms(loss=-advantages * logp, dlogp=-advantages)


def nll(logp: Tensor) -> TokenTerms:
    """-logp: supervised fine-tuning."""
    return TokenTerms(loss=-logp, dlogp=-torch.ones_like(logp))


def cispo(
    logp: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> TokenTerms:
    """-c A logp with c = clip(r, 1 - clip_low, 1 + clip_high) held constant: every token keeps a
    gradient.

    MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, which bounds r from above only (clip_low=1). verl's
    default of 0.2 on both sides and TRL's absolute bound are reached with other values.
    """
    ratio = bounded(log_ratio)[0].exp()
    held = ratio.clamp(1 - clip_low, 1 + clip_high)
    coefficient = -advantages * held
    metrics = {"actor/pg_clipfrac": (held != ratio).to(logp.dtype), "actor/ratio": ratio}
    return TokenTerms(loss=coefficient * logp, dlogp=coefficient, metrics=metrics)


def topr(logp: Tensor, log_ratio: Tensor, advantages: Tensor) -> TokenTerms:
    """A > 0: -A logp; else -clip(r, 0, 1) A logp with the clipped ratio held constant.

    TOPR, arXiv 2503.14286, where r is the trajectory's and good and bad are told by the reward;
    here by the sign of A. ROLL takes each token's r (ratio_level=token).
    """
    ratio = bounded(log_ratio)[0].exp()
    cut = (advantages <= 0) & (ratio > 1)
    coefficient = -advantages * torch.where(advantages > 0, 1.0, ratio.clamp(max=1.0))
    metrics = {"actor/pg_clipfrac": cut.to(logp.dtype), "actor/ratio": ratio}
    return TokenTerms(loss=coefficient * logp, dlogp=coefficient, metrics=metrics)


def dppo_tv(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, low: float, high: float, tau: float
) -> TokenTerms:
    """-A r + tau l^2, the first term only while the probability p has not moved too far from the
    sampler's mu: dropped where A > 0 and p - mu > high, or A < 0 and p - mu < -low.

    DPPO with total variation, arXiv 2602.04879; the second term as in prime-rl.
    """
    log_r, moving = bounded(logp - old_logp)
    ratio = log_r.exp()
    moved = logp.exp() - old_logp.exp()
    dropped = ((advantages > 0) & (moved > high)) | ((advantages < 0) & (moved < -low))
    gain = torch.where(dropped, 0.0, -advantages * ratio)
    metrics = {
        "actor/pg_clipfrac": dropped.to(logp.dtype),
        "actor/ratio": ratio,
        TAU_TERM: log_r.square(),
    }
    slope = torch.where(moving, gain + 2 * tau * log_r, 0.0)
    return TokenTerms(loss=gain + tau * log_r.square(), dlogp=slope, metrics=metrics)


def squared_log_ratio(log_ratio: Tensor, share: Tensor, tau: float) -> TokenTerms:
    """(tau / 2) l^2 times `share`: with -A logp per token the loss of Kimi k1.5, arXiv 2501.12599,
    eq. 3.

    There l is the sum over a sequence and `share` 1 / its length, so that the tokens of a sequence
    add up to one square.
    """
    square = 0.5 * share * log_ratio.square()
    return TokenTerms(loss=tau * square, dlogp=tau * share * log_ratio, metrics={TAU_TERM: square})


def k2_5(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, tau: float
) -> TokenTerms:
    """-A clip(r, 1 - clip_low, 1 + clip_high) + tau l^2: outside the bounds the first term has no
    gradient, whatever the sign of A; the second pulls back as far as l is followed.

    Kimi K2.5, arXiv 2602.02276, eq. 1, which prints no bounds and no tau.
    """
    log_r, moving = bounded(log_ratio)
    ratio = log_r.exp()
    held = ratio.clamp(1 - clip_low, 1 + clip_high)
    slope = torch.where(held == ratio, -advantages * ratio, 0.0) + 2 * tau * log_r
    metrics = {
        "actor/pg_clipfrac": (held != ratio).to(log_r.dtype),
        "actor/ratio": ratio,
        TAU_TERM: log_r.square(),
    }
    return TokenTerms(
        loss=-advantages * held + tau * log_r.square(),
        dlogp=torch.where(moving, slope, 0.0),
        metrics=metrics,
    )


def kl_penalty(
    logp: Tensor,
    reference_logp: Tensor,
    estimator: Estimator,
    *,
    old_logp: Tensor | None = None,
    bound: float | None = KL_BOUND,
) -> TokenTerms:
    """An estimate of KL(policy || reference) from one token, with l = logp - reference_logp.

    k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). k3+ is verl's: the value of k3 with the derivative of
    k2. Both are at most `bound`, where k3 has no derivative any more, as in verl (low_var_kl),
    AReaL and NeMo-RL; None: no bound but that on l (TRL).

    With `old_logp` the estimate k becomes r k, and r is differentiated too
    (DeepSeek-V3.2, arXiv 2512.02556): the derivative of r k3 is r l, whose mean over old samples is
    the true gradient.
    """
    log_r, moving = bounded(logp - reference_logp)
    if estimator == "k1":
        value, slope = log_r, torch.ones_like(log_r)
    elif estimator == "k2":
        value, slope = 0.5 * log_r.square(), log_r
    else:
        value = torch.expm1(-log_r) + log_r
        slope = log_r if estimator == "k3+" else -torch.expm1(-log_r)
        if bound is not None:
            slope = slope if estimator == "k3+" else torch.where(value <= bound, slope, 0.0)
            value = value.clamp(max=bound)
    slope = torch.where(moving, slope, 0.0)
    if old_logp is not None:
        log_ratio, ratio_moves = bounded(logp - old_logp)
        ratio = log_ratio.exp()
        value, slope = ratio * value, ratio * (slope + torch.where(ratio_moves, value, 0.0))
    return TokenTerms(loss=value, dlogp=slope)


def value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, *, clip: float | None = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """The critic's loss [n], its derivative [n] by `values`, and 1 where the clipped value decided.

    0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) as in verl and OpenRLHF (0.5 in
    both); `clip=None` is the plain square.
    """
    error = values - targets
    loss, slope = 0.5 * error.square(), error
    if clip is None:
        return loss, slope, torch.zeros_like(loss)
    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    other = 0.5 * (held - targets).square()
    clipped = other > loss
    return torch.maximum(loss, other), torch.where(clipped, 0.0, slope), clipped.to(loss.dtype)


def off_policy_sequences(mean_log_gap: Tensor, advantages: Tensor, delta: float) -> Tensor:
    """Whether [n] bool DeepSeek-V3.2's off-policy sequence mask (arXiv 2512.02556) drops a token's
    sequence: A < 0 and the sequence's mean of log(rollout / policy) above `delta`."""
    return (advantages < 0) & (mean_log_gap > delta)


def weighted(terms: TokenTerms, weights: Tensor) -> TokenTerms:
    """Loss and derivative times the tokens' weights."""
    return TokenTerms(loss=terms.loss * weights, dlogp=terms.dlogp * weights, metrics=terms.metrics)


def _ratio(logp: Tensor, batch: TokenBatch, loss: LossConfig) -> Tensor:
    """The log-ratio [n] at `loss.ratio_level`."""
    log_ratio = logp - batch.old_logp
    if loss.ratio_level == "token":
        return log_ratio
    return batch.sums(log_ratio) if loss.ratio_level == "trajectory" else batch.means(log_ratio)


def _through_ratio(
    terms: TokenTerms, batch: TokenBatch, weights: Tensor, loss: LossConfig
) -> TokenTerms:
    """The weighted `terms`, whose derivatives are by `_ratio`, with derivatives by each token's
    log-prob instead."""
    slope = terms.dlogp * weights
    if loss.ratio_level == "sequence":
        slope = batch.means(slope)
    elif loss.ratio_level == "trajectory":
        slope = batch.sums(slope)
    return TokenTerms(loss=terms.loss * weights, dlogp=slope, metrics=terms.metrics)


def _ppo_clip(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    bounds = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    terms = ppo_clip(
        _ratio(logp, batch, loss), batch.advantages, **bounds, dual_clip=loss.dual_clip
    )
    return _through_ratio(terms, batch, weights, loss)


def _sapo(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    taus = {"tau_positive": loss.sapo_tau_positive, "tau_negative": loss.sapo_tau_negative}
    return _through_ratio(
        sapo(_ratio(logp, batch, loss), batch.advantages, **taus), batch, weights, loss
    )


def _cispo(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    bounds = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    return weighted(cispo(logp, _ratio(logp, batch, loss), batch.advantages, **bounds), weights)


def _topr(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    return weighted(topr(logp, _ratio(logp, batch, loss), batch.advantages), weights)


def _reinforce(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    return weighted(reinforce(logp, batch.advantages), weights)


def _dppo_tv(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    bounds = {"low": loss.clip_low, "high": loss.clip_high, "tau": loss.tau}
    return weighted(dppo_tv(logp, batch.old_logp, batch.advantages, **bounds), weights)


def _k1_5(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    gain = weighted(reinforce(logp, batch.advantages), weights)
    square = squared_log_ratio(_ratio(logp, batch, loss), 1 / batch.length, loss.tau)
    pull = _through_ratio(square, batch, weights, loss)
    return TokenTerms(
        loss=gain.loss + pull.loss, dlogp=gain.dlogp + pull.dlogp, metrics=pull.metrics
    )


def _k2_5(logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig) -> TokenTerms:
    bounds = {"clip_low": loss.clip_low, "clip_high": loss.clip_high, "tau": loss.tau}
    return weighted(k2_5(logp - batch.old_logp, batch.advantages, **bounds), weights)


KINDS: dict[str, Callable[[Tensor, TokenBatch, Tensor, LossConfig], TokenTerms]] = {
    "ppo_clip": _ppo_clip,
    "cispo": _cispo,
    "reinforce": _reinforce,
    "sapo": _sapo,
    "dppo_tv": _dppo_tv,
    "topr": _topr,
    "k1_5": _k1_5,
    "k2_5": _k2_5,
}
"""Each takes log-probs, the chunk, the tokens' weights and settings, and gives terms with the
weights multiplied in."""
