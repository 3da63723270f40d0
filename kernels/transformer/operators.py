"""Differentiable parts of a transformer layer on a CPU in bfloat16, which keep for the backward
pass only what cannot be formed anew from the operands: no float32 copies, no scores, no product of
a gate.

Shape legend: T tokens of a pass, sequences one behind the other; H, I features; D features of a
head; N sequences of at most L tokens; heads query heads, kv heads of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from . import elements
from .products import weight_gradient
from .threads import bits, over_parts, over_rows


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scales = torch.empty_like(x), torch.empty(len(x))
        a, w, o, s = bits(x), bits(weight.clone()), bits(out), scales.numpy()
        over_rows(len(x), lambda _, i, j: elements.norm(a[i:j], w, eps, o[i:j], s[i:j]))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dx = torch.zeros_like(x)
        return dx, _norm_backward(x, weight, scales, dout.contiguous(), dx), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out, scales = torch.empty_like(x), torch.empty_like(x), torch.empty(len(x))
        a, b, w, t, o, s = (
            bits(x),
            bits(y),
            bits(weight.clone()),
            bits(total),
            bits(out),
            scales.numpy(),
        )
        over_rows(
            len(x),
            lambda _, i, j: elements.add_norm(a[i:j], b[i:j], w, eps, t[i:j], o[i:j], s[i:j]),
        )
        ctx.save_for_backward(total, weight, scales)
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        dx = dtotal.clone(memory_format=torch.contiguous_format)
        dweight = _norm_backward(total, weight, scales, dout.contiguous(), dx)
        return dx, dx, dweight, None


def _norm_backward(x: Tensor, weight: Tensor, scales: Tensor, dout: Tensor, dx: Tensor) -> Tensor:
    """Adds to `dx`; returns the weight's gradient."""
    parts = torch.zeros(torch.get_num_threads(), x.shape[1])
    a, w, s, d, out, rows = (
        bits(x),
        bits(weight.clone()),
        scales.numpy(),
        bits(dout),
        bits(dx),
        parts.numpy(),
    )
    over_rows(
        len(x), lambda n, i, j: elements.norm_backward(a[i:j], w, s[i:j], d[i:j], out[i:j], rows[n])
    )
    return parts.sum(0).to(weight.dtype)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_w), F.linear(x, up_w)
        ctx.save_for_backward(x, gate_w, up_w, down_w, gate, up)
        return F.linear(_gated(gate, up), down_w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_w, up_w, down_w, gate, up = ctx.saved_tensors
        dout = dout.contiguous()
        inner, dgate, dup = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
        g, u, d = bits(gate), bits(up), bits(dout @ down_w)
        o, dg, du = bits(inner), bits(dgate), bits(dup)
        over_rows(
            len(x),
            lambda _, i, j: elements.gated_backward(
                g[i:j], u[i:j], d[i:j], o[i:j], dg[i:j], du[i:j]
            ),
        )
        wanted = ctx.needs_input_grad
        dx = torch.addmm(dgate @ gate_w, dup, up_w) if wanted[0] else None
        return (
            dx,
            *(
                weight_gradient(d, x) if needed else None
                for d, needed in zip((dgate, dup), wanted[1:3], strict=True)
            ),
            weight_gradient(dout, inner) if wanted[3] else None,
        )


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    g, u, o = bits(gate), bits(up), bits(out)
    over_rows(len(gate), lambda _, i, j: elements.gated(g[i:j], u[i:j], o[i:j]))
    return out


@dataclass(frozen=True, slots=True)
class _Alike:
    """Sequences of similar length, which one product takes together, filled up with zeros."""

    starts: NDArray[np.int64]
    """[N] rows at which they begin."""
    lengths: NDArray[np.int64]
    """[N]"""
    longest: int
    """L"""
    first: int
    """Rows of filled-up sequences before this group."""

    @property
    def last(self) -> int:
        return self.first + len(self.starts) * self.longest


SCORES = 2**18
"""Of sequences that are taken together, at the most: they stay in a core's second cache."""
FILLING = 1 / 8
"""Of the rows of a group, at the most."""


@lru_cache(maxsize=64)
def _groups(borders: tuple[int, ...], heads: int) -> tuple[_Alike, ...]:
    """All sequences, in groups of similar length; the same in every layer of a pass."""
    starts = np.array(borders[:-1], np.int64)
    lengths = np.array(borders[1:], np.int64) - starts
    order = np.argsort(-lengths, kind="stable")
    groups: list[_Alike] = []
    taken = 0
    while taken < len(order):
        longest = int(lengths[order[taken]])
        room = max(1, SCORES // (heads * longest * longest))
        fits = lengths[order[taken : taken + room]]
        filling = 1 - np.cumsum(fits) / (np.arange(1, len(fits) + 1) * longest)
        count = max(1, int(np.argmax(filling > FILLING)) or len(fits))
        chosen = order[taken : taken + count]
        first = groups[-1].last if groups else 0
        groups.append(_Alike(starts[chosen], lengths[chosen], longest, first))
        taken += count
    return tuple(groups)


class _Attention(torch.autograd.Function):
    """Short sequences go through together: a call of an operator costs more than what it computes
    for one of them. Each sequence's queries lie as a block [heads, L, D], so that the heads of a
    group are rows of one product with the keys that they share. Scores are formed anew in
    backward, in room for one group of sequences of each thread."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        borders: tuple[int, ...],
        size: int,
        scale: float,
    ) -> Tensor:
        heads, kv = q.shape[1] // size, k.shape[1] // size
        groups = _groups(borders, heads)
        rows = groups[-1].last
        turned_q, turned_k = q.new_empty(rows, heads * size), k.new_empty(rows, kv * size)
        out, sums = torch.empty_like(q), torch.empty(rows, heads)
        angles = cos.numpy(), sin.numpy()
        q_bits, k_bits, v_bits, out_bits = bits(q), bits(k), bits(v), bits(out)

        def attend(group: _Alike) -> None:
            at = group.starts, group.lengths
            block_q, block_k = (_blocks(turned, group, size) for turned in (turned_q, turned_k))
            elements.rotate(q_bits, *angles, *at, bits(block_q))
            elements.rotate(k_bits, *angles, *at, bits(block_k))
            values = torch.empty_like(block_k)
            elements.gather_heads(v_bits, *at, bits(values))
            scores = torch.bmm(_shared(block_q, kv), block_k.flatten(0, 1).transpose(1, 2))
            log_sums = sums[group.first : group.last].view(-1, group.longest)
            elements.causal_softmax(
                bits(scores.view(*log_sums.shape, group.longest)),
                np.float32(scale),
                log_sums.numpy(),
            )
            answer = torch.bmm(scores, values.flatten(0, 1))
            elements.scatter_heads(bits(answer.view_as(block_q)), *at, out_bits)

        over_parts(groups, attend)
        ctx.save_for_backward(turned_q, turned_k, v, cos, sin, out, sums)
        ctx.groups = groups
        ctx.size = size
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        turned_q, turned_k, v, cos, sin, out, sums = ctx.saved_tensors
        size, kv = ctx.size, v.shape[1] // ctx.size
        dq, dk, dv = torch.empty_like(out), torch.empty_like(v), torch.empty_like(v)
        angles = cos.numpy(), sin.numpy()
        dq_bits, dk_bits, dv_bits = bits(dq), bits(dk), bits(dv)
        v_bits, out_bits, dout_bits = bits(v), bits(out), bits(dout.contiguous())

        def attend(group: _Alike) -> None:
            at = group.starts, group.lengths
            block_q, block_k = (_blocks(turned, group, size) for turned in (turned_q, turned_k))
            slope, values = torch.empty_like(block_q), torch.empty_like(block_k)
            deltas = torch.empty(block_q.shape[:-1])
            elements.gather_heads(dout_bits, *at, bits(slope))
            elements.gather_heads(v_bits, *at, bits(values))
            elements.products_of_rows(bits(slope), out_bits, *at, deltas.numpy())
            q, k, slopes = _shared(block_q, kv), block_k.flatten(0, 1), _shared(slope, kv)
            probs = torch.bmm(q, k.transpose(1, 2))
            dscores = torch.bmm(slopes, values.flatten(0, 1).transpose(1, 2))
            log_sums = sums[group.first : group.last].view(-1, group.longest)
            elements.causal_softmax_backward(
                bits(probs.view(*log_sums.shape, group.longest)),
                bits(dscores.view(*log_sums.shape, group.longest)),
                np.float32(ctx.scale),
                log_sums.numpy(),
                deltas.view_as(log_sums).numpy(),
            )
            dvalues = torch.bmm(probs.transpose(1, 2), slopes).view_as(values)
            elements.scatter_heads(bits(dvalues), *at, dv_bits)
            dblock_q = torch.bmm(dscores, k).view_as(block_q)
            elements.rotate_back(bits(dblock_q), *angles, *at, dq_bits)
            dblock_k = torch.bmm(dscores.transpose(1, 2), q).view_as(block_k)
            elements.rotate_back(bits(dblock_k), *angles, *at, dk_bits)

        over_parts(ctx.groups, attend)
        return dq, dk, dv, None, None, None, None, None


def _blocks(rows: Tensor, group: _Alike, size: int) -> Tensor:
    """The memory of a group's rows as [N, heads, L, D]."""
    part = rows[group.first : group.last]
    return part.view(len(group.starts), -1, group.longest, size)


def _shared(block: Tensor, kv: int) -> Tensor:
    """[N, heads, L, D] as [N * kv, heads / kv * L, D]: rows that share their keys."""
    return block.view(len(block) * kv, -1, block.shape[-1])


def rms_norm(x_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _Norm.apply(x_TH.contiguous(), weight, eps)  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(x_TH: Tensor, y_TH: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    total, out = _AddNorm.apply(x_TH.contiguous(), y_TH.contiguous(), weight, eps)  # type: ignore[no-untyped-call]
    return total, out


def gated_mlp(x_TH: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), without biases."""
    out: Tensor = _GatedMlp.apply(x_TH, gate_w, up_w, down_w)  # type: ignore[no-untyped-call]
    return out


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    borders: tuple[int, ...],
    *,
    size: int,
    scale: float,
) -> Tensor:
    """[T, heads * D] causal attention within each sequence, after the rotary embedding.

    Args:
        q, k, v: [T, heads * D], [T, kv * D] twice.
        cos, sin: [T, D / 2] float32.
        borders: where each sequence begins, and T.
        size: D.
    """
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), k.contiguous(), v.contiguous(), cos, sin, borders, size, scale
    )
    return out
