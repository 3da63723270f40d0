"""oneDNN's packed copies of weight matrices, and the offset of each element in them.

The layout is oneDNN's choice for a shape and a dtype, and opaque. It is found by packing matrices
whose first row and first column are numbered: such layouts divide rows and columns into blocks
independently, so element (r, c) has the offset rows[r] + columns[c]. That is checked for every
packed matrix; one with another layout is packed anew as a whole when it changes.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..weights.in_place import INTEGERS, Place

ROWS = 64
"""Batch size for which oneDNN chooses the layout; products of other sizes work, too."""


def pack(weight: Tensor) -> Tensor:
    """oneDNN's copy of a [rows, columns] matrix. Its padding is 0."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def memory(packed: Tensor) -> Tensor:
    """The copy's memory [n] as integers of its element size, writable while `packed` lives."""
    size = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    kind = INTEGERS[packed.element_size()]
    return torch.from_numpy(raw[: size // packed.element_size() * packed.element_size()]).view(kind)


def place(packed: Tensor, weight: Tensor, *, first_row: int, rows: int) -> Place | None:
    """The `Place` of these rows of `weight` in its packed copy; None if the layout is unknown."""
    offsets = layout(tuple(weight.shape), weight.dtype)
    if offsets is None:
        return None
    down, right = offsets
    return Place(
        memory=memory(packed),
        rows=down[first_row : first_row + rows],
        columns=right,
        width=weight.shape[1],
        keeps=packed,
    )


@cache
def layout(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Offsets ([rows] int64, [columns] int64) whose sum is an element's offset in a matrix's copy;
    None if the layout is no such sum, or this build of torch does not give the copy's address."""
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes")):
        return None
    rows, columns = shape
    integers = INTEGERS[dtype.itemsize]
    base = (1 << 8 * min(dtype.itemsize, 4) - 1) - 1  # digits are positive, and 0 is not numbered
    marked = rows + columns - 1
    digits = max(1, math.ceil(math.log(marked + 1, base)))
    number, code = torch.arange(marked), None
    for digit in range(digits):
        values = (number // base**digit % base + 1).to(integers)
        pattern = torch.zeros(shape, dtype=integers)
        pattern[:, 0] = values[:rows]
        pattern[0, 1:] = values[rows:]
        packed = pack(pattern.view(dtype))
        lies = memory(packed)
        where = lies.nonzero()[:, 0]
        if len(where) != marked:
            return None
        part = (lies[where].long() - 1) * base**digit
        del lies, packed, pattern  # each is as large as the matrix
        code = part if code is None else code + part
    assert code is not None, "there is a digit"
    at = where[code.argsort()]
    if not torch.equal(code.sort().values, number):
        return None
    return at[:rows].clone(), torch.cat((at[:1], at[rows:])) - at[0]


def lies_as_told(packed: Tensor, weight: Tensor) -> bool:
    """Whether the copy has every element of `weight`, bit for bit, where `layout` says."""
    offsets = layout(tuple(weight.shape), weight.dtype)
    if offsets is None:
        return False
    lies, integers = memory(packed), INTEGERS[weight.element_size()]
    down, right = offsets
    held = weight.view(integers)
    return all(
        torch.equal(lies[down[at : at + 256, None] + right], held[at : at + 256])
        for at in range(0, len(down), 256)
    )


__all__ = ["ROWS", "layout", "lies_as_told", "memory", "pack", "place"]
