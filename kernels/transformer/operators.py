"""Differentiable parts of a transformer layer on a CPU in bfloat16, which save for the backward
pass only what cannot be recomputed from the operands without a product: no float32 copies, no
normalised rows, no product of a gate. Attention is in `attention.py`.

Shape legend: T tokens of a pass; H, I, O features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import elements
from .threads import bits, over_rows


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scales = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dx = torch.zeros_like(x)
        return dx, _norm_backward(x, weight, scales, dout.contiguous(), dx), None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm(x) * weight, and the factor of each row [T]."""
    out, scales = torch.empty_like(x), torch.empty(len(x))
    # a clone: `bits` must not get a parameter
    a, w, o, s = bits(x), bits(weight.clone()), bits(out), scales.numpy()
    over_rows(len(x), lambda _, i, j: elements.norm(a[i:j], w, eps, o[i:j], s[i:j]))
    return out, scales


def _normed_again(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """`_normed`, bit for bit, by the rows' factors."""
    out = torch.empty_like(x)
    a, w, o, s = bits(x), bits(weight.clone()), bits(out), scales.numpy()
    over_rows(len(x), lambda _, i, j: elements.scaled(a[i:j], w, s[i:j], o[i:j]))
    return out


def _norm_backward(x: Tensor, weight: Tensor, scales: Tensor, dout: Tensor, dx: Tensor) -> Tensor:
    """Adds x's gradient to `dx`; returns the weight's."""
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


class _NormLinears(torch.autograd.Function):
    """RMSNorm and the linear layers that read it: `layers` are a weight and a bias of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        normed, scales = _normed(x, weight, eps)
        weights: Any = layers[::2]
        ctx.save_for_backward(x, weight, scales, *weights)
        return tuple(F.linear(normed, w, b) for w, b in zip(weights, layers[1::2], strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        normed = _normed_again(x, weight, scales)
        dnormed = torch.mm(douts[0], weights[0])
        for dout, w in zip(douts[1:], weights[1:], strict=True):
            dnormed.addmm_(dout, w)
        gradients: list[Tensor | None] = []
        for n, dout in enumerate(douts):
            gradients.append(weight_gradient(dout, normed) if wanted[2 * n] else None)
            gradients.append(dout.sum(0) if wanted[2 * n + 1] else None)
        dx = torch.zeros_like(x)
        return dx, _norm_backward(x, weight, scales, dnormed, dx), None, *gradients


class _AddNormMlp(torch.autograd.Function):
    """The second half of a layer: y joins the residual stream x, then a gated MLP of its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float,
        gate_w: Tensor, up_w: Tensor, down_w: Tensor,
    ) -> Tensor:  # fmt: skip
        total, normed, scales = torch.empty_like(y), torch.empty_like(y), torch.empty(len(y))
        a, b, w = bits(x.view_as(y)), bits(y), bits(weight.clone())
        t, o, s = bits(total), bits(normed), scales.numpy()
        over_rows(
            len(y),
            lambda _, i, j: elements.add_norm(a[i:j], b[i:j], w, eps, t[i:j], o[i:j], s[i:j]),
        )
        gate, up = F.linear(normed, gate_w), F.linear(normed, up_w)
        ctx.save_for_backward(total, weight, scales, gate_w, up_w, down_w, gate, up)
        out = F.linear(_gated(gate, up), down_w)
        return out.view_as(x) + total.view_as(x)  # a new tensor: FSDP warns if it gets a view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scales, gate_w, up_w, down_w, gate, up = ctx.saved_tensors
        shape, dout = dout.shape, dout.contiguous().view_as(total)
        inner, dgate, dup = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
        g, u, d = bits(gate), bits(up), bits(dout @ down_w)
        o, dg, du = bits(inner), bits(dgate), bits(dup)
        over_rows(
            len(total),
            lambda _, i, j: elements.gated_backward(
                g[i:j], u[i:j], d[i:j], o[i:j], dg[i:j], du[i:j]
            ),
        )
        wanted = ctx.needs_input_grad[4:]
        ddown = weight_gradient(dout, inner) if wanted[2] else None
        normed = _normed_again(total, weight, scales)
        dgates = [
            weight_gradient(slope, normed) if needed else None
            for slope, needed in zip((dgate, dup), wanted[:2], strict=True)
        ]
        dnormed = torch.addmm(dgate @ gate_w, dup, up_w)
        dx = dout.clone()
        dweight = _norm_backward(total, weight, scales, dnormed, dx)
        return dx.view(shape), dx, dweight, None, *dgates, ddown


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    g, u, o = bits(gate), bits(up), bits(out)
    over_rows(len(gate), lambda _, i, j: elements.gated(g[i:j], u[i:j], o[i:j]))
    return out


def rms_norm(x_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) * weight."""
    out: Tensor = _Norm.apply(x_TH.contiguous(), weight, eps)  # type: ignore[no-untyped-call]
    return out


def norm_linears(
    x_TH: Tensor, weight: Tensor, eps: float, *layers: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, ...]:
    """The results [T, O] of linear layers, each a weight [O, H] and a bias [O], of RMSNorm(x) *
    weight."""
    flat = [tensor for layer in layers for tensor in layer]
    outs: tuple[Tensor, ...] = _NormLinears.apply(  # type: ignore[no-untyped-call]
        x_TH.contiguous(), weight, eps, *flat
    )
    return outs


def add_norm_mlp(
    x: Tensor,
    y_TH: Tensor,
    weight: Tensor,
    eps: float,
    gate_w: Tensor,
    up_w: Tensor,
    down_w: Tensor,
) -> Tensor:
    """x + y + down(silu(gate(n)) * up(n)) for n = RMSNorm(x + y) * weight, without biases, in the
    shape of x: [T, H], or [..., H] of as many rows."""
    out: Tensor = _AddNormMlp.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), y_TH.contiguous(), weight, eps, gate_w, up_w, down_w
    )
    return out


def transposed(x: Tensor) -> Tensor:
    """[T, H] as contiguous [H, T]."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1], x.shape[0])
    source, target = bits(x), bits(out)
    over_rows(x.shape[1], lambda _, i, j: elements.transpose(source, i, j, target))
    return out


def weight_gradient(dout_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dout^T x, [O, I]; T tokens, I input and O output features.

    It sums over tokens, which lie across both operands: the library then transposes the larger one
    element by element and runs at half its speed. Transposing the smaller one first in compiled
    squares costs a tenth of the product.
    """
    if dout_TO.shape[1] <= x_TI.shape[1]:
        return transposed(dout_TO) @ x_TI
    return transposed(transposed(x_TI) @ dout_TO)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            dout @ weight if wanted[0] else None,
            weight_gradient(dout, x) if wanted[1] else None,
            dout.sum(0) if wanted[2] else None,
        )


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    out: Tensor = _Linear.apply(x_TI, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return out
