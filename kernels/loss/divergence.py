"""Divergences between an output layer's distributions and given ones, chunk by chunk: the gradients
are formed in the forward pass, as `linear_loss` forms them, and no more than a chunk's logits are
ever held.

Shape legend: n tokens, V vocabulary entries, H hidden size, k entries that are compared one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .chunked import Formed
from .head import Head, accumulator, product_dtype

CHUNK_BYTES = 128 << 20
"""Bytes of a chunk's logits; about six tensors of this size are held at once."""
REST = 8
"""Least probability of all entries outside the k together, in units of the dtype's eps: it is 1
minus a sum, which is not known better."""
LOWEST = -100.0
"""The least log-prob of a given distribution, so that KL(policy || teacher) stays finite."""

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teaching:
    """The distributions that n tokens' own are compared with, and the measure."""

    logp: Tensor
    """[n, k] the teacher's log-probs."""
    ids: Tensor | None
    """[n, k] int64 vocabulary ids of `logp`, all others counting as one entry; None: `logp` has all
    V in order."""
    weights: Tensor
    """[n] weight of each token's divergence in the total."""
    kind: Kind
    """forward_kl: KL(teacher || policy); reverse_kl: KL(policy || teacher); jsd: beta KL(teacher ||
    m) + (1 - beta) KL(policy || m), m = beta teacher + (1 - beta) policy (arXiv 2306.13649)."""
    beta: float = 0.5
    coef: float = 1.0
    """Coefficient of the total in a loss; the caller applies it."""


def divergence(logits: Tensor, teaching: Teaching) -> tuple[Tensor, Tensor]:
    """[n] the divergence of softmax(logits [n, V]) and [n, V] its derivative by the logits, without
    weights."""
    everything = torch.log_softmax(logits, -1)
    ids, theirs = teaching.ids, teaching.logp.to(logits.dtype).clamp(min=LOWEST)
    ours = everything
    if ids is not None:
        ours, theirs = _with_rest(everything.gather(1, ids)), _with_rest(theirs)
    value, slope = _compare(ours, theirs, teaching.kind, teaching.beta)
    # `slope` is p dD/dp of each entry; by the logits of a softmax that is itself less p times its
    # sum, and an entry of the rest has its share of the rest's
    total = slope.sum(-1, keepdim=True)
    if ids is None:
        return value, slope - ours.exp() * total
    probs = everything.exp()
    by_logits = probs * (slope[:, -1:] / ours[:, -1:].exp() - total)
    by_logits.scatter_(1, ids, (slope - ours.exp() * total)[:, :-1])
    return value, by_logits


def _compare(ours: Tensor, theirs: Tensor, kind: Kind, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence [n] of log-probs [n, entries], and p dD/dp [n, entries] up to a term c p with
    the same c for all entries of a token, which a softmax's gradient cancels."""
    p, q = ours.exp(), theirs.exp()
    if kind == "forward_kl":
        return (q * (theirs - ours)).sum(-1), -q
    if kind == "reverse_kl":
        gap = p * (ours - theirs)
        return gap.sum(-1), gap
    mixed = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    gap = (1 - beta) * p * (ours - mixed)
    return (beta * q * (theirs - mixed) + gap).sum(-1), gap


def _with_rest(logp: Tensor) -> Tensor:
    """Log-probs [n, k + 1] of [n, k]: the last is that of all other entries together."""
    least = REST * torch.finfo(logp.dtype).eps
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=least).log()
    return torch.cat([logp, rest], -1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Gradients:
    """A value and its gradients, in the form that `Formed` takes."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teaching: Teaching,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted total of the tokens' divergences (differentiable), and each token's [n].

    Args are those of `linear_loss`, without targets.
    """
    wide = accumulator(hidden.dtype)
    operands = [hidden, weight] if bias is None else [hidden, weight, bias]
    dtype = product_dtype(hidden.dtype, hidden.device)
    held = [each.detach().to(dtype) for each in operands]
    values = hidden.new_zeros(len(hidden), dtype=wide)
    grads = [torch.zeros_like(each, dtype=wide) for each in operands]
    size = max(1, CHUNK_BYTES // (len(weight) * wide.itemsize))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        leaves = [each.detach().requires_grad_() for each in (held[0][part], *held[1:])]
        with torch.enable_grad():
            head = Head(
                weight=leaves[1], temperature=temperature, logit_scale=logit_scale, softcap=softcap
            )
            raw = (leaves[0] @ leaves[1].t()).to(wide)
            raw = raw if bias is None else raw + leaves[2].to(wide)
            logits = head.logits(raw, head.scale(part))
        values[part], slope = divergence(logits.detach(), _part(teaching, part))
        slope *= teaching.weights[part, None].to(wide)
        gradients = torch.autograd.grad(logits, leaves, slope)
        grads[0][part] = gradients[0]
        for grad, more in zip(grads[1:], gradients[1:], strict=True):
            grad += more
    formed = _Gradients(
        value=(values * teaching.weights.to(wide)).sum(),
        gradients=(
            *(g.to(each.dtype) for g, each in zip(grads, operands, strict=True)),
            *([None] if bias is None else []),
        ),
    )
    total: Tensor = Formed.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, formed
    )
    return total, values


def logits_divergence(logits: Tensor, teaching: Teaching) -> tuple[Tensor, Tensor]:
    """`linear_divergence` of finished logits [n, V], already scaled."""
    values, slope = divergence(logits.detach(), teaching)
    weights = teaching.weights.to(logits.dtype)
    # of value 0, and with the gradient that is known already: autograd need not trace the rest
    linear = (logits * slope * weights[:, None]).sum()
    return (values * weights).sum() + linear - linear.detach(), values


def _part(teaching: Teaching, part: slice) -> Teaching:
    return Teaching(
        logp=teaching.logp[part],
        ids=None if teaching.ids is None else teaching.ids[part],
        weights=teaching.weights[part],
        kind=teaching.kind,
        beta=teaching.beta,
    )
