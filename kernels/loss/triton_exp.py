"""The element passes as two Triton kernels, the same source for stock Triton (CUDA) and for
triton-ascend (NPU).

Matrix products stay with torch: on an NPU a product written in Triton is a thousand times slower
than the library's. What an NPU's vector core cannot do well does not occur: the grid is
one-dimensional with one program per core that loops over its items, there is no early return, no
integer comparison in the inner loop (it would run as scalar code), arithmetic is float32, offsets
inside a tile are 32-bit on top of 64-bit bases, and tiles are planned (`tiling`). Columns beyond n
are padding that may hold anything; rows beyond V are handled by one masked tile after the loop. Its
mask must be the plain integer comparison: triton-ascend turns that into a shorter transfer, while
for any other mask (one compared as float32, say) it moves the whole tile and writes back what it
read, over a neighbour's rows.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (a kernel's arguments are Triton values, which have no types)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Transform
from .tiling import COLUMNS, EXP_STATS, FACTOR, REGISTER_TILE, Footprint, Launch, Tile, launch, plan

BIG: tl.constexpr = tl.constexpr(1e30)
LOWEST: tl.constexpr = tl.constexpr(-1e4)
FLOOR: tl.constexpr = tl.constexpr(1e-37)


@triton.jit
def _exp_tile(
    tile, bias, mask, scale, raw, level, inner,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """E = exp(z') of one tile in place; returns its column sums of E and of E z'."""
    if MASKED:
        u = tl.load(tile, mask=mask, other=-BIG).to(tl.float32)
    else:
        u = tl.load(tile).to(tl.float32)
    if SOFTCAP:
        # tanh by exp saturates to -1 and 1; an excluded entry (-inf) would come back as -1, so it
        # is subtracted again
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * inner * (u + bias + raw))) - 1.0
        z = tanh * (scale / inner) - level + tl.minimum(u * 2.0 + BIG, 0.0)
    else:
        z = (u + bias) * scale
    e = tl.exp(z)
    if MASKED:
        tl.store(tile, e.to(tile.dtype.element_ty), mask=mask)
    else:
        tl.store(tile, e.to(tile.dtype.element_ty))
    return tl.sum(e, 0), tl.sum(e * tl.maximum(z, LOWEST), 0)


@triton.jit
def emberl_exp_stats(
    e_ptr,
    scale_ptr,
    raw_ptr,
    level_ptr,
    bias_ptr,
    sums_ptr,
    moments_ptr,
    inner,
    rows,
    stride,
    column_blocks,
    items,
    slice_rows,
    padded,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E = exp(z') in place of u [rows, padded], and each slice's column sums [splits, padded]."""
    local = tl.arange(0, ROWS)
    offsets = local[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item // column_blocks
        first = (item - split * column_blocks) * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        scale = tl.load(scale_ptr + columns)[None, :]
        raw = tl.load(raw_ptr + columns)[None, :]
        level = tl.load(level_ptr + columns)[None, :]
        start = split * slice_rows
        stop = tl.minimum(start + slice_rows, rows)
        whole = start + (stop - start) // ROWS * ROWS
        total = tl.zeros((COLUMNS,), tl.float32)
        moment = tl.zeros((COLUMNS,), tl.float32)
        for row in range(start, whole, ROWS):
            tile = e_ptr + tl.cast(row, tl.int64) * stride + first + offsets
            bias = tl.load(bias_ptr + row + local)[:, None] if BIAS else 0.0
            s, q = _exp_tile(tile, bias, None, scale, raw, level, inner, False, SOFTCAP)
            total += s
            if MOMENTS:
                moment += q
        inside = whole + local < stop
        tile = e_ptr + tl.cast(whole, tl.int64) * stride + first + offsets
        bias = tl.load(bias_ptr + whole + local, mask=inside, other=0.0)[:, None] if BIAS else 0.0
        s, q = _exp_tile(tile, bias, inside[:, None], scale, raw, level, inner, True, SOFTCAP)
        tl.store(sums_ptr + split * padded + columns, total + s)
        if MOMENTS:
            tl.store(moments_ptr + split * padded + columns, moment + q)


@triton.jit
def _factor_tile(
    tile, mask, scale, level, constant, slope, inner,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """E (constant + slope z') dz'/dx / scale of one tile in place."""
    if MASKED:
        e = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    else:
        e = tl.load(tile).to(tl.float32)
    z = tl.log(tl.maximum(e, FLOOR))
    g = e * (constant + slope * z)
    if SOFTCAP:
        tanh = (z + level) * (inner / scale)
        g = g * (1.0 - tanh * tanh)
    if MASKED:
        tl.store(tile, g.to(tile.dtype.element_ty), mask=mask)
    else:
        tl.store(tile, g.to(tile.dtype.element_ty))


@triton.jit
def emberl_factor(
    e_ptr, scale_ptr, level_ptr, constant_ptr, slope_ptr,
    inner, rows, stride, column_blocks, items, slice_rows,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """E [rows, padded] to gradient columns in place: the path of the soft-cap and of the entropy's
    gradient."""
    local = tl.arange(0, ROWS)
    offsets = local[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item // column_blocks
        first = (item - split * column_blocks) * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        scale = tl.load(scale_ptr + columns)[None, :]
        level = tl.load(level_ptr + columns)[None, :]
        constant = tl.load(constant_ptr + columns)[None, :]
        slope = tl.load(slope_ptr + columns)[None, :]
        start = split * slice_rows
        stop = tl.minimum(start + slice_rows, rows)
        whole = start + (stop - start) // ROWS * ROWS
        for row in range(start, whole, ROWS):
            tile = e_ptr + tl.cast(row, tl.int64) * stride + first + offsets
            _factor_tile(tile, None, scale, level, constant, slope, inner, False, SOFTCAP)
        inside = (whole + local < stop)[:, None]
        tile = e_ptr + tl.cast(whole, tl.int64) * stride + first + offsets
        _factor_tile(tile, inside, scale, level, constant, slope, inner, True, SOFTCAP)


@lru_cache(maxsize=8)
def cores(device: torch.device) -> int:
    """Programs that run at once: an NPU's vector cores, a GPU's multiprocessors times four, or 4 in
    the interpreter."""
    if device.type == "cpu":
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    if (count := getattr(properties, "multi_processor_count", None)) is not None:
        return 4 * int(count)
    device_properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(device_properties["num_vectorcore"])


class TritonPasses:
    """The passes on Triton. Tiles fit both a Unified Buffer and a GPU's registers, so one plan
    serves both."""

    column_multiple = COLUMNS

    def exp_stats(
        self, u: Tensor, t: Transform, bias: Tensor | None, sums: Tensor, moments: Tensor | None
    ) -> None:
        deal = _deal(EXP_STATS, u)
        padded = deal.column_blocks * deal.tile.columns
        parts = sums.new_empty(
            1 if moments is None else 2, deal.splits, padded, dtype=torch.float32
        )
        emberl_exp_stats[(deal.programs,)](
            u,
            _padded(t.scale, u, padded),
            _padded(t.raw, u, padded),
            _padded(t.level, u, padded),
            u if bias is None else bias,
            parts[0],
            parts[-1],
            t.inner or 0.0,
            u.shape[0],
            u.stride(0),
            deal.column_blocks,
            deal.items,
            deal.slice_rows,
            padded,
            BIAS=bias is not None,
            SOFTCAP=t.inner is not None,
            MOMENTS=moments is not None,
            ROWS=deal.tile.rows,
            COLUMNS=deal.tile.columns,
        )
        sums += parts[0].sum(0)[: len(sums)]
        if moments is not None:
            moments += parts[1].sum(0)[: len(sums)]

    def factor(self, e: Tensor, t: Transform, constant: Tensor, slope: Tensor) -> None:
        deal = _deal(FACTOR, e)
        padded = deal.column_blocks * deal.tile.columns
        vectors = [_padded(x, e, padded) for x in (t.scale, t.level, constant, slope)]
        emberl_factor[(deal.programs,)](
            e,
            *vectors,
            t.inner or 0.0,
            e.shape[0],
            e.stride(0),
            deal.column_blocks,
            deal.items,
            deal.slice_rows,
            SOFTCAP=t.inner is not None,
            ROWS=deal.tile.rows,
            COLUMNS=deal.tile.columns,
        )


def _deal(footprint: Footprint, tile: Tensor) -> Launch:
    plan_ = tile_for(footprint, tile.element_size())
    assert tile.stride(1) == 1 and tile.stride(0) % plan_.columns == 0, (
        "columns must be padded to whole tiles"
    )
    return launch(plan_, tile.shape[0], tile.shape[1], cores(tile.device))


def tile_for(footprint: Footprint, itemsize: int) -> Tile:
    """The tile for every device: it fits a Unified Buffer as well as a GPU's registers."""
    return plan(footprint, itemsize, limit=REGISTER_TILE)


def _padded(values: float | Tensor, like: Tensor, padded: int) -> Tensor:
    """A float32 vector [padded] of a number or of [n] values; the padding is 1, which no operation
    minds."""
    out = torch.ones(padded, dtype=torch.float32, device=like.device)
    out[: like.shape[1]] = values
    return out
