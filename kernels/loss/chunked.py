"""The shifted-exp scheme over whole batches: log-probs in one product, a loss with its gradients in
three.

`logprob` is differentiable by recomputation (four products over forward and backward).
`formed_loss` calls the loss chunk by chunk and forms the gradients in the forward pass, so that
backward only scales them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .shifted_exp import (
    Gradients,
    Job,
    Scored,
    backward,
    chunk_size,
    flat_buffer,
    forward,
    plan,
    plan_sequences,
    target_logits,
)
from .terms import TokenLoss, TokenStats, TokenTerms

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def log_once(message: str) -> None:
    log.warning(message)


def usable_shift(shift: Tensor | None, index: Tensor, like: Tensor) -> Tensor:
    """Log-prob estimates of the tokens `index`; 0 where there is none, which is near enough for
    every token more likely than e^-40 (`MAX_SHIFT_ERROR`)."""
    if shift is None:
        return like.new_zeros(len(index))
    return shift[index].to(like.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(max=0.0)


class _Collected:
    """Statistics of all N tokens, 0 where a token was not scored."""

    def __init__(self, job: Job, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(
            3 if job.entropy else 2, len(job.hidden), dtype=dtype, device=job.hidden.device
        )

    def take(self, scored: Scored) -> None:
        stats = scored.stats
        values = [
            stats.logp,
            stats.one_minus_p,
            *([] if stats.entropy is None else [stats.entropy]),
        ]
        self.rows.index_copy_(1, scored.index, torch.stack(values))

    def stats(self) -> TokenStats:
        return TokenStats(
            logp=self.rows[0],
            one_minus_p=self.rows[1],
            entropy=self.rows[2] if len(self.rows) == 3 else None,
        )


class _LogProb(torch.autograd.Function):
    """Statistics [2 or 3, N]; backward scores every chunk again, with the log-prob itself as the
    shift."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, index: Tensor,
        shift: Tensor | None, chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        raw = target_logits(job, index)
        collected = _Collected(job, raw.dtype)
        chunks = plan(index, chunk_size(job, chunk_bytes, keep=False))
        buffer = flat_buffer(job, chunks, keep=False)
        for part, values in zip(chunks, torch.split(raw, [len(c) for c in chunks]), strict=True):
            collected.take(
                forward(job, part, usable_shift(shift, part, raw), values, buffer, keep=False)
            )
        stats = collected.stats()
        ctx.job = job
        ctx.index = index
        ctx.chunk_bytes = chunk_bytes
        ctx.save_for_backward(hidden, weight, bias, raw, stats.logp)
        ctx.mark_non_differentiable(stats.one_minus_p)
        # a missing gradient stays None: zeros for the entropy would cost a pass over the tile
        ctx.set_materialize_grads(False)
        return stats.logp, stats.one_minus_p, stats.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dlogp: Tensor | None, _: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        job = ctx.job
        chunks = plan(ctx.index, chunk_size(job, ctx.chunk_bytes, keep=True))
        raw, logp = ctx.saved_tensors[3:]
        grads = Gradients(job, ctx.needs_input_grad[:3], len(chunks))
        buffer = flat_buffer(job, chunks, keep=True)
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
        for part, values in zip(chunks, torch.split(raw, [len(c) for c in chunks]), strict=True):
            scored = forward(job, part, logp[part], values, buffer, keep=True)
            backward(job, scored, dlogp[part], None if dentropy is None else dentropy[part], grads)
        return (*grads.finished(job), None, None, None, None)


def logprob(job: Job, index: Tensor, *, shift: Tensor | None, chunk_bytes: int) -> TokenStats:
    """Statistics [N] of the tokens `index`, 0 elsewhere; differentiable by hidden, weight and
    bias."""
    head = job.head
    logp, rest, entropy = _LogProb.apply(  # type: ignore[no-untyped-call]
        job.hidden, head.weight, head.bias, job, index, shift, chunk_bytes
    )
    return TokenStats(logp=logp, one_minus_p=rest, entropy=entropy)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormedLoss:
    """A total loss with its gradients by hidden, weight and bias (None: not wanted)."""

    value: Tensor
    stats: TokenStats
    metrics: dict[str, Tensor]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


class _Run:
    """One pass over a batch: the accumulators to which its chunks add."""

    def __init__(self, job: Job, loss: TokenLoss, shift: Tensor | None, raw: Tensor) -> None:
        self.job = job
        self.loss = loss
        self.shift = shift
        self.raw = raw
        self.value = raw.new_zeros(())
        self.collected = _Collected(job, raw.dtype)
        self.metrics: dict[str, Tensor] = {}
        self.grads: Gradients | None = None

    def score(self, part: Tensor, shift: Tensor, buffer: Tensor, *, keep: bool) -> Scored:
        return forward(self.job, part, shift, self.raw[part], buffer, keep=keep)

    def evaluate(self, stats: TokenStats, index: Tensor, recomputed: Tensor) -> TokenTerms:
        terms = self.loss(stats, index)
        self.value += terms.loss.sum()
        for name, values in {**terms.metrics, "actor/head_recomputed": recomputed}.items():
            whole = self.metrics.setdefault(name, self.raw.new_zeros(len(self.raw)))
            whole.index_copy_(0, index, values.to(whole.dtype))
        return terms

    def fused(self, part: Tensor, buffer: Tensor) -> None:
        keep = self.grads is not None
        scored = self.score(part, usable_shift(self.shift, part, self.raw), buffer, keep=keep)
        self.collected.take(scored)
        terms = self.evaluate(scored.stats, part, scored.recomputed)
        if self.grads is not None:
            backward(self.job, scored, terms.dlogp, terms.dentropy, self.grads)

    def two_pass(self, parts: Sequence[Tensor], buffer: Tensor) -> None:
        """A sequence of coupled tokens that is longer than a chunk: scores all its chunks for the
        loss, then each again for the gradients (four products)."""
        index = torch.cat(list(parts))
        recomputed = []
        for part in parts:
            scored = self.score(part, usable_shift(self.shift, part, self.raw), buffer, keep=False)
            self.collected.take(scored)
            recomputed.append(scored.recomputed)
        stats = self.collected.stats()
        entropy = None if stats.entropy is None else stats.entropy[index]
        stats = TokenStats(
            logp=stats.logp[index], one_minus_p=stats.one_minus_p[index], entropy=entropy
        )
        terms = self.evaluate(stats, index, torch.cat(recomputed))
        if self.grads is None:
            return
        lengths = [len(part) for part in parts]
        slopes = (
            [None] * len(parts) if terms.dentropy is None else torch.split(terms.dentropy, lengths)
        )
        for part, dlogp, logp, slope in zip(
            parts,
            torch.split(terms.dlogp, lengths),
            torch.split(stats.logp, lengths),
            slopes,
            strict=True,
        ):
            backward(self.job, self.score(part, logp, buffer, keep=True), dlogp, slope, self.grads)


def formed_loss(
    job: Job,
    index: Tensor,
    loss: TokenLoss,
    *,
    needs: tuple[bool, bool, bool],
    sequence_ids: Tensor | None,
    shift: Tensor | None,
    chunk_bytes: int,
) -> FormedLoss:
    """The loss over the tokens `index` [N] int64, and the gradients by those of hidden, weight and
    bias for which `needs` is true."""
    run = _Run(job, loss, shift, target_logits(job, index))
    limit = chunk_size(job, chunk_bytes, keep=any(needs))
    units = _units(index, loss, sequence_ids, limit)
    chunks = [chunk for unit in units for chunk in unit]
    if any(needs):
        run.grads = Gradients(job, needs, len(chunks))
    buffer = flat_buffer(job, chunks, keep=any(needs))
    for unit in units:
        if len(unit) == 1:
            run.fused(unit[0], buffer)
        else:
            log_once(
                f"fused loss: a sequence of {sum(map(len, unit))} coupled tokens does not fit into"
                f" a chunk of {limit}; it takes four matrix products instead of three"
            )
            run.two_pass(unit, buffer)
    gradients = (None, None, None) if run.grads is None else run.grads.finished(job)
    stats = run.collected.stats()
    return FormedLoss(value=run.value, stats=stats, metrics=run.metrics, gradients=gradients)


def _units(
    index: Tensor, loss: TokenLoss, sequence_ids: Tensor | None, limit: int
) -> list[list[Tensor]]:
    if loss.whole_sequences:
        assert sequence_ids is not None
        return plan_sequences(index, sequence_ids, limit)
    return [[part] for part in plan(index, limit)]


class Formed(torch.autograd.Function):
    """A scalar whose gradients exist already; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, formed: FormedLoss
    ) -> Tensor:
        ctx.save_for_backward(*formed.gradients)
        return formed.value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(upstream)
        grads = ctx.saved_tensors
        # a product would copy the weight's gradient [V, H], and the factor is 1 mostly
        if factor != 1.0:
            grads = tuple(
                None if grad is None else grad * upstream.to(grad.dtype) for grad in grads
            )
        return (*grads, None)
