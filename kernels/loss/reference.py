"""The specification: log-probs and loss of a linear head in plain torch, by autograd alone, in
float32 or float64.

Everything faster is tested against this file. It holds all [N, V] logits, so it is also the
quickest way for a vocabulary of a few hundred entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .head import Head, accumulator
from .terms import TokenLoss, TokenStats, TokenTerms


def logprob(hidden: Tensor, targets: Tensor, head: Head, *, entropy: bool) -> TokenStats:
    """Statistics of all tokens, differentiable. `hidden` [N, H], `targets` [N] int64."""
    wide = accumulator(hidden.dtype)
    logits = hidden.to(wide) @ head.weight.to(wide).t()
    if head.bias is not None:
        logits = logits + head.bias.to(wide)
    scale = head.scale(slice(None))
    scale = scale[:, None] if isinstance(scale, Tensor) else scale
    return from_logits(head.logits(logits, scale), targets, entropy=entropy)


def from_logits(logits: Tensor, targets: Tensor, *, entropy: bool) -> TokenStats:
    """Statistics of `logits` [n, V], already scaled, at `targets` [n]; differentiable."""
    logits = logits.to(accumulator(logits.dtype))
    target = targets[:, None]
    everything = torch.log_softmax(logits, -1)
    logp = everything.gather(1, target)[:, 0]
    return TokenStats(
        logp=logp,
        one_minus_p=-torch.expm1(logp.detach()),
        entropy=_Entropy.apply(everything) if entropy else None,  # type: ignore[no-untyped-call]
    )


class _Entropy(torch.autograd.Function):
    """-sum p log p over rows of log-probs [n, V]. Nothing is kept for a gradient but the log-probs,
    which log_softmax keeps anyway, and none is formed unless it is asked for: most losses only look
    at the entropy."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor) -> Tensor:
        ctx.save_for_backward(logp)
        # clamped: 0 * -inf of an entry without probability would be NaN
        entropy: Tensor = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
        return entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (logp,) = ctx.saved_tensors
        slope: Tensor = -upstream[:, None] * logp.exp() * (logp.clamp(min=-1e30) + 1)
        return slope


def loss_of(stats: TokenStats, loss: TokenLoss, index: Tensor) -> tuple[Tensor, TokenTerms]:
    """The total loss of differentiable `stats` as a scalar whose gradient is the one that `loss`
    states."""
    entropy = None if stats.entropy is None else stats.entropy.detach()
    terms = loss(
        TokenStats(logp=stats.logp.detach(), one_minus_p=stats.one_minus_p, entropy=entropy), index
    )
    total: Tensor = _Stated.apply(stats.logp, stats.entropy, terms)  # type: ignore[no-untyped-call]
    return total, terms


class _Stated(torch.autograd.Function):
    """A sum whose derivative was stated by a `TokenTerms` instead of being traced."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, terms: TokenTerms) -> Tensor:
        ctx.save_for_backward(terms.dlogp, terms.dentropy if entropy is not None else None)
        return terms.loss.sum().to(logp.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dlogp, dentropy = ctx.saved_tensors
        return dlogp * upstream, None if dentropy is None else dentropy * upstream, None
