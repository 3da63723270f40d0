"""Products of bfloat16 matrices on a CPU for a linear layer's two passes, laid out as its matrix
units like them.

The gradient of a weight sums over tokens, which lie across both operands: the library then
transposes the larger one element by element and runs at half its speed. Transposing the smaller one
first in compiled squares costs a tenth of the product.

Shape legend: T tokens, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import elements
from .threads import bits, over_rows


def transposed(x: Tensor) -> Tensor:
    """[T, H] as contiguous [H, T]."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1], x.shape[0])
    source, target = bits(x), bits(out)
    over_rows(x.shape[1], lambda _, i, j: elements.transpose(source, i, j, target))
    return out


def weight_gradient(dout_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dout^T x, [O, I]."""
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
