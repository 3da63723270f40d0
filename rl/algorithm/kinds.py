"""The loss kinds of `loss.kind`: each gives the terms of a chunk's tokens from the mathematics of
`surrogates`, at the settings' ratio level and with the tokens' weights multiplied in.

Shape legend: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.loss.terms import TokenTerms
from ..config.algorithm import LossConfig
from .surrogates import (
    cispo,
    dppo_tv,
    k2_5,
    ppo_clip,
    reinforce,
    sapo,
    squared_log_ratio,
    topr,
)
from .token_batch import TokenBatch


def weighted(terms: TokenTerms, weights: Tensor) -> TokenTerms:
    """Loss and derivative times the tokens' weights."""
    return TokenTerms(loss=terms.loss * weights, dlogp=terms.dlogp * weights, metrics=terms.metrics)


def _ratio(logp: Tensor, batch: TokenBatch, loss: LossConfig) -> Tensor:
    """[n] the log-ratio at `loss.ratio_level`."""
    log_ratio = logp - batch.old_logp
    if loss.ratio_level == "token":
        return log_ratio
    return batch.sums(log_ratio) if loss.ratio_level == "trajectory" else batch.means(log_ratio)


def _through_ratio(
    terms: TokenTerms, batch: TokenBatch, weights: Tensor, loss: LossConfig
) -> TokenTerms:
    """`terms` with derivatives by the ratio of `_ratio`, as terms with derivatives by each token's
    log-prob."""
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
