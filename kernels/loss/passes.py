"""The two element passes over a chunk's [V, n] tile in torch operations: any device, and the CPU's
default.

They work in blocks of rows that stay in the cache, because on a CPU the same chain of operations
over a whole chunk is bound by memory (four times slower).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .head import Transform, accumulator

BLOCK_ELEMENTS = 1 << 17
"""Elements of one row block on a CPU: 512 KiB in float32, half a core's second-level cache."""
CARD_ELEMENTS = 1 << 26
"""The same on a card, where it bounds the temporaries (256 MiB each)."""
LOWEST = -1e4
"""Stands in for the -inf of an excluded column, so that 0 * z' is 0; exp of it is 0 in every
dtype."""
FLOOR = 1e-37
"""Smallest E whose logarithm is taken; a smaller one gives a gradient that rounds to zero."""


class Passes(Protocol):
    """The element passes that an implementation offers."""

    column_multiple: int
    """A tile's rows are stored with a stride that is a multiple of this; the columns in between may
    hold anything."""

    def exp_stats(
        self, u: Tensor, t: Transform, bias: Tensor | None, sums: Tensor, moments: Tensor | None
    ) -> None:
        """E = exp(z') in place of `u` [V, n]; adds each column's sum of E to `sums` [n] and of E z'
        to `moments` [n]. An entry of -inf is an excluded one: it gives E = 0."""
        ...

    def factor(self, e: Tensor, t: Transform, constant: Tensor, slope: Tensor) -> None:
        """E (constant + slope z') dz'/dx / scale in place of E [V, n]; `constant` and `slope` are
        [n]."""
        ...


class TorchPasses:
    """The passes in torch operations."""

    column_multiple = 1

    def exp_stats(
        self, u: Tensor, t: Transform, bias: Tensor | None, sums: Tensor, moments: Tensor | None
    ) -> None:
        for start, block in _row_blocks(u):
            z = block.to(accumulator(u.dtype))  # the block itself where it is as wide
            if bias is not None:
                z += bias[start : start + len(z), None]
            if t.inner is not None:
                excluded = torch.isneginf(z)  # tanh would bring it back
                z = z.add_(t.raw).mul_(t.inner).tanh_().mul_(t.scale / t.inner).sub_(t.level)
                z.masked_fill_(excluded, LOWEST)
            elif isinstance(t.scale, Tensor) or t.scale != 1.0:
                z *= t.scale
            if moments is None:
                e = z.exp_()
            else:
                e = torch.exp(z)
                moments += torch.sum(z.clamp_(min=LOWEST).mul_(e), 0)
            sums += e.sum(0)
            if e is not block:
                block.copy_(e)

    def factor(self, e: Tensor, t: Transform, constant: Tensor, slope: Tensor) -> None:
        for _, block in _row_blocks(e):
            wide = block.to(constant.dtype)
            z = wide.clamp(min=FLOOR).log_()
            wide *= torch.addcmul(constant, z, slope)
            if t.inner is not None:
                tanh = z.add_(t.level).mul_(t.inner / t.scale)
                wide *= 1 - tanh * tanh
            if wide is not block:
                block.copy_(wide)


def _row_blocks(tile: Tensor) -> list[tuple[int, Tensor]]:
    elements = BLOCK_ELEMENTS if tile.device.type == "cpu" else CARD_ELEMENTS
    rows = max(1, elements // max(1, tile.shape[1]))
    return [(start, tile[start : start + rows]) for start in range(0, tile.shape[0], rows)]
