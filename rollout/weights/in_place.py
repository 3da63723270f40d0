"""Where the elements of a checkpoint's tensor lie in an engine's memory, and writing them there.

A tensor may lie in several places: in a matrix and in its copy for matrix units, in an embedding
and in a head that is tied to it; and a place may have a part of it only, as a rank has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .changes import loops
from .patch import DigestMismatchError, TensorChange

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the dtype that its bits are moved as."""
LOW = 0xFFFF_FFFF
BLOCK = 256
"""Rows that are read at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """One memory that has rows `first_row` ... and columns `first_column` ... of a tensor: element
    (r, c) at `rows[r - first_row] + columns[c - first_column]`."""

    memory: Tensor
    """[n] integers of the elements' width, all that `rows` and `columns` may lead to."""
    rows: Tensor
    """[R] int64, on the memory's device, as `columns` are."""
    columns: Tensor
    """[C] int64."""
    width: int
    """Columns of the whole tensor."""
    first_row: int = 0
    first_column: int = 0
    keeps: Any = None
    """What owns the memory, where `memory` does not."""

    def exchange(self, change: TensorChange) -> tuple[int, int]:
        """Writes `new` where `old` lies and reads it back: (`INTACT`, -1), or what is wrong
        and with which element. Nothing was written unless that is `NOT_NEW`."""
        if self.memory.device.type == "cpu":
            problem, index = loops().exchange(
                *self._arrays(change.new),
                change.positions,
                change.old,
                change.new,
            )
            return int(problem), int(index)
        at, chosen = self._find(change.positions)
        for what, values in ((loops().NOT_OLD, change.old), (loops().NOT_NEW, change.new)):
            moved = self._moved(values)[chosen]
            if what == loops().NOT_NEW:
                self.memory.index_copy_(0, at, moved)
            wrong = (self.memory[at] != moved).nonzero()
            if len(wrong):
                return what, int(chosen.nonzero()[wrong[0, 0], 0])
        return loops().INTACT, -1

    def warm_up(self) -> None:
        """Has compiled what `exchange` and `checksum` take, for changes in another process's
        memory, too: while decoding stands still it would cost seconds."""
        kind = np.dtype(f"<u{self.memory.element_size()}")
        for shared in (False, True):
            columns = np.empty(0, "<i4"), np.empty(0, kind), np.empty(0, kind)
            for column in columns:
                column.flags.writeable = not shared
            if self.memory.device.type == "cpu":
                loops().exchange(*self._arrays(columns[1]), *columns)
                loops().write(*self._arrays(columns[1]), columns[0], columns[1])
                loops().change_checksum(*columns)
                loops().check_positions(columns[0], 0)

    def restore(self, change: TensorChange) -> None:
        """Writes `old`."""
        if self.memory.device.type == "cpu":
            loops().write(*self._arrays(change.old), change.positions, change.old)
        else:
            at, chosen = self._find(change.positions)
            self.memory.index_copy_(0, at, self._moved(change.old)[chosen])

    def checksum(self) -> int:
        """Of what lies here, as its part of the whole tensor's (`scatter`)."""
        if self.memory.device.type == "cpu":
            kind = np.dtype(f"<u{self.memory.element_size()}")
            return int(loops().checksum(*self._arrays(np.empty(0, kind))))
        size, device = self.memory.element_size(), self.memory.device
        mask = (1 << 8 * size) - 1 if size < 8 else -1
        positions = self.first_column + torch.arange(len(self.columns), device=device)
        total = torch.zeros((), dtype=torch.int64, device=device)
        for start in range(0, len(self.rows), BLOCK):
            rows = self.rows[start : start + BLOCK, None]
            number = self.first_row + start + torch.arange(len(rows), device=device)
            elements = self.memory[rows + self.columns].long() & mask
            total += (weight(positions + number[:, None] * self.width) * elements).sum()
        return int(total)

    def change_checksum(self, change: TensorChange) -> int:
        """What a change adds to `checksum`."""
        parts = (self.rows.cpu().numpy(), self.columns.cpu().numpy())
        where = (*parts, self.first_row, self.first_column, self.width)
        return int(loops().part_of_change(*where, change.positions, change.old, change.new))

    def _arrays(self, like: NDArray[Any]) -> tuple[Any, ...]:
        return (
            self.memory.numpy().view(like.dtype),
            self.rows.numpy(),
            self.columns.numpy(),
            self.first_row,
            self.first_column,
            self.width,
        )

    def _find(self, positions: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
        """([k] where in the memory, [all] which of the positions are here)."""
        flat = torch.from_numpy(positions).to(self.memory.device).long()
        rows = torch.div(flat, self.width, rounding_mode="floor")
        columns = flat - rows * self.width - self.first_column
        rows -= self.first_row
        here = (rows >= 0) & (rows < len(self.rows))
        here &= (columns >= 0) & (columns < len(self.columns))
        return self.rows[rows[here]] + self.columns[columns[here]], here

    def _moved(self, values: NDArray[np.unsignedinteger]) -> Tensor:
        signed_values = values.view(f"<i{values.itemsize}")
        return torch.from_numpy(signed_values).to(self.memory.device)


def plain(held: Tensor, shape: Sequence[int], first: tuple[int, int] = (0, 0)) -> Place:
    """Of a tensor of one or two dimensions, with any strides, that has the elements from (row,
    column) `first` on of a tensor of `shape`; one dimension is one row."""
    matrix = held.detach().view(INTEGERS[held.element_size()])
    matrix = matrix if held.dim() == 2 else matrix[None]
    if matrix.dim() != 2 or len(shape) != held.dim():
        raise ValueError(f"a tensor of shape {tuple(shape)} in one of {tuple(held.shape)}")
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    span = 1 + (rows - 1) * down + (columns - 1) * right
    return Place(
        memory=matrix.as_strided((span,), (1,), matrix.storage_offset()),
        rows=torch.arange(rows, device=held.device) * down,
        columns=torch.arange(columns, device=held.device) * right,
        width=shape[-1],
        first_row=first[0],
        first_column=first[1],
    )


def part_checksum(place: Place, whole: Tensor) -> int:
    """What `place.checksum()` has to be where the tensor is `whole`, which lies on the host."""
    columns, first = len(place.columns), place.first_column
    rows = whole.reshape(-1, place.width)[place.first_row : place.first_row + len(place.rows)]
    shape = (1, place.width) if whole.dim() < 2 else tuple(whole.shape)
    part = rows[:, first : first + columns]
    return plain(part, shape, (place.first_row, first)).checksum()


def write_all(
    changes: Iterable[tuple[str, TensorChange, Sequence[Place]]],
) -> None:
    """Writes every change into each of its places. DigestMismatchError, with the tensor's name, if
    something else lies there than the change was made for, or if what is read back is not what was
    written; all is then as it was."""
    done: list[tuple[Place, TensorChange]] = []
    for name, change, places in changes:
        for place in places:
            problem, index = place.exchange(change)
            if problem == loops().INTACT:
                done.append((place, change))
                continue
            if problem == loops().NOT_NEW:
                place.restore(change)
            for written, its in reversed(done):
                written.restore(its)
            what = (
                "is not what the change was made for"
                if problem == loops().NOT_OLD
                else ("does not hold what was written")
            )
            raise DigestMismatchError(
                f"tensor {name}: element {change.positions[index]} in the engine's memory {what}"
            )


def weight(positions: Tensor) -> Tensor:
    """`scatter.weight` on any device."""
    mixed = (positions + 1) * loops().FIRST_FACTOR
    found: Tensor = (mixed ^ (mixed >> 32 & LOW)) * loops().SECOND_FACTOR | 1
    return found


def signed(number: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


__all__ = ["INTEGERS", "Place", "part_checksum", "plain", "signed", "weight", "write_all"]
