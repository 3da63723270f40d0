"""Differentiable parts of a transformer layer on a CPU in bfloat16, which keep for the backward
pass only what cannot be formed anew from the operands: no float32 copies, no scores, no product of
a gate.

Shape legend: T tokens of a pass, sequences one behind the other; H, I features; D features of a
head; L tokens of one sequence; heads query heads, kv heads of keys and values.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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


class _Attention(torch.autograd.Function):
    """Each sequence's queries lie as a block [heads, L, D], so that the heads of a group are rows
    of one product with the keys that they share. Scores are formed anew in backward, in room for
    one sequence of each thread."""

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
        heads, kv, count = q.shape[1] // size, k.shape[1] // size, len(q)
        turned_q, turned_k, out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(q)
        sums = torch.empty(count * heads)

        def attend(a: int, b: int) -> None:
            length = b - a
            block_q, block_k = _block(turned_q, a, b, heads), _block(turned_k, a, b, kv)
            _rotate(q[a:b], cos[a:b], sin[a:b], block_q)
            _rotate(k[a:b], cos[a:b], sin[a:b], block_k)
            scores = torch.bmm(block_q.view(kv, -1, size), block_k.transpose(1, 2))
            elements.causal_softmax(
                bits(scores.view(heads, length, length)),
                np.float32(scale),
                sums[a * heads : b * heads].view(heads, length).numpy(),
            )
            answer = torch.bmm(scores, _heads(v[a:b], size)).view(heads, length, size)
            _heads(out[a:b], size).copy_(answer)

        over_parts(list(pairwise(borders)), attend)
        ctx.save_for_backward(turned_q, turned_k, v, cos, sin, out, sums)
        ctx.borders = borders
        ctx.size = size
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        turned_q, turned_k, v, cos, sin, out, sums = ctx.saved_tensors
        size, heads, kv = ctx.size, turned_q.shape[1] // ctx.size, v.shape[1] // ctx.size
        dout = dout.contiguous()
        dq, dk, dv = torch.empty_like(turned_q), torch.empty_like(turned_k), torch.empty_like(v)

        def attend(a: int, b: int) -> None:
            length = b - a
            q, k = _block(turned_q, a, b, heads).view(kv, -1, size), _block(turned_k, a, b, kv)
            slope, deltas = dout.new_empty(heads, length, size), torch.empty(heads, length)
            elements.split_heads(bits(dout[a:b]), bits(out[a:b]), bits(slope), deltas.numpy())
            slope = slope.view(kv, -1, size)
            probs = torch.bmm(q, k.transpose(1, 2))
            dscores = torch.bmm(slope, _heads(v[a:b], size).transpose(1, 2))
            elements.causal_softmax_backward(
                bits(probs.view(heads, length, length)),
                bits(dscores.view(heads, length, length)),
                np.float32(ctx.scale),
                sums[a * heads : b * heads].view(heads, length).numpy(),
                deltas.numpy(),
            )
            _heads(dv[a:b], size).copy_(torch.bmm(probs.transpose(1, 2), slope))
            turns = cos[a:b].numpy(), sin[a:b].numpy()
            dblock = torch.bmm(dscores, k).view(heads, length, size)
            elements.rotate_back(bits(dblock), *turns, bits(dq[a:b]))
            elements.rotate_back(bits(torch.bmm(dscores.transpose(1, 2), q)), *turns, bits(dk[a:b]))

        over_parts(list(pairwise(ctx.borders)), attend)
        return dq, dk, dv, None, None, None, None, None


def _block(rows: Tensor, a: int, b: int, heads: int) -> Tensor:
    """The memory of rows a to b as [heads, L, D]."""
    return rows[a:b].view(heads, b - a, -1)


def _heads(rows: Tensor, size: int) -> Tensor:
    """A view of rows [L, heads * D] as [heads, L, D]."""
    return rows.view(len(rows), -1, size).transpose(0, 1)


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor, block: Tensor) -> None:
    elements.rotate(bits(rows), cos.numpy(), sin.numpy(), bits(block))


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
