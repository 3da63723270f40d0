"""oneDNN's copies of weight matrices, and where each element lies in them.

The layout is oneDNN's choice for a shape and a dtype, and opaque. It is learnt by packing matrices
whose first row and first column are numbered: such layouts deal rows and columns into blocks, each
by itself, so element (r, c) lies at rows[r] + columns[c]. That is checked on every matrix that is
packed; one that lies otherwise is packed anew as a whole when it changes.
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
"""Rows of a product that the layout is chosen for; any number may come."""


def pack(weight: Tensor) -> Tensor:
    """oneDNN's copy of a [rows, columns] matrix. Its padding is 0."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def memory(packed: Tensor) -> Tensor:
    """[n] the integers of a copy as they lie, to be written to while `packed` lives."""
    size = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    kind = INTEGERS[packed.element_size()]
    return torch.from_numpy(raw[: size // packed.element_size() * packed.element_size()]).view(kind)


def place(packed: Tensor, weight: Tensor, *, first_row: int, rows: int) -> Place | None:
    """Where these rows of `weight` lie in its copy; None where that cannot be told."""
    found = layout(tuple(weight.shape), weight.dtype)
    if found is None:
        return None
    down, right = found
    return Place(
        memory=memory(packed),
        rows=down[first_row : first_row + rows],
        columns=right,
        width=weight.shape[1],
        keeps=packed,
    )


@cache
def layout(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """([rows] int64, [columns] int64) of a matrix's copy; None where that is not its form, or this
    build of torch does not say where the copy lies."""
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
    """Whether every element of a matrix is where `layout` says, bit for bit."""
    found = layout(tuple(weight.shape), weight.dtype)
    if found is None:
        return False
    lies, integers = memory(packed), INTEGERS[weight.element_size()]
    down, right = found
    held = weight.view(integers)
    return all(
        torch.equal(lies[down[at : at + 256, None] + right], held[at : at + 256])
        for at in range(0, len(down), 256)
    )


__all__ = ["ROWS", "layout", "lies_as_told", "memory", "pack", "place"]
