"""Where the elements of a checkpoint's tensor lie in an engine's memory, and writing them there.

A tensor may lie in several places: in a matrix and in its copy for matrix units, in an embedding
and in a head that is tied to it; and a place may have a part of it only, as a rank has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .changes import loops
from .codec import spread
from .patch import DigestMismatchError, RefusedError, TensorChange

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the dtype that its bits are moved as."""
LOW = 0xFFFF_FFFF
BLOCK = 256
"""Rows that are read at a time."""
PIECE = 1 << 16
"""Elements that a thread writes at a time."""
NOT_MADE_FOR = "is not what the change was made for"


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
    """The owner of the memory, where `memory` is not."""

    def find(self, change: TensorChange) -> Found:
        """Where the change belongs here, and its part that does. Reads no weights."""
        if self.memory.device.type != "cpu":
            return self._found_on_device(change)
        count = len(change.positions)
        chosen = np.empty(count, np.int64 if count >> 31 else np.int32)
        at = np.empty(count, np.uint64 if len(self.memory) >> 32 else np.uint32)
        here = loops().find(*self._where(), change.positions, at, chosen)
        memory, old, new = self.memory.numpy().view(change.new.dtype), change.old, change.new
        if here == count:
            return Found(memory, at, old, new, None, self.keeps)
        chosen = chosen[:here].copy()
        return Found(memory, at[:here].copy(), old[chosen], new[chosen], chosen, self.keeps)

    def checksum(self) -> int:
        """Of what lies here, as its part of the whole tensor's (`scatter`)."""
        if self.memory.device.type == "cpu":
            kind = np.dtype(f"<u{self.memory.element_size()}")
            return int(loops().checksum(self.memory.numpy().view(kind), *self._where()))
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
        """A change's contribution to `checksum`."""
        parts = (self.rows.cpu().numpy(), self.columns.cpu().numpy())
        where = (*parts, self.first_row, self.first_column, self.width)
        return int(loops().part_of_change(*where, change.positions, change.old, change.new))

    def _where(self) -> tuple[Any, ...]:
        parts = (self.rows.numpy(), self.columns.numpy())
        return (*parts, self.first_row, self.first_column, self.width)

    def _found_on_device(self, change: TensorChange) -> Found:
        at, chosen = self._find(change.positions)
        old, new = (self._moved(values)[chosen] for values in (change.old, change.new))
        return Found(self.memory, at, old, new, chosen.nonzero()[:, 0], self.keeps)

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


class Found(NamedTuple):
    """The part of a change that belongs into one memory: nothing is left to do but to write it."""

    memory: Any
    """An array of unsigned integers on the host, a tensor of integers on a device; so the rest."""
    at: Any
    """[k] where."""
    old: Any
    new: Any
    chosen: Any
    """[k] which of the change's positions these are; None: all of them."""
    keeps: Any = None
    """As of `Place`."""

    def part(self, start: int, stop: int) -> Found:
        chosen = None if self.chosen is None else self.chosen[start:stop]
        at, old, new = (column[start:stop] for column in (self.at, self.old, self.new))
        return self._replace(at=at, old=old, new=new, chosen=chosen)

    def pieces(self) -> Iterator[tuple[int, Found]]:
        """(number of its first element, part): small enough that threads have equal shares of
        them. A device has threads of its own."""
        size = len(self.at) or 1 if isinstance(self.memory, Tensor) else PIECE
        for start in range(0, len(self.at), size):
            yield start, self.part(start, start + size)

    def exchange(self) -> Wrong | None:
        """Writes `new` where `old` lies and reads it back; what is wrong, and then nothing was
        written."""
        if isinstance(self.memory, Tensor):
            return self._exchange_on_device(self.memory)
        what, index = loops().exchange(self.memory, self.at, self.old, self.new)
        return None if what == loops().WRITTEN else Wrong(int(index), what == loops().LOST)

    def take_back(self) -> None:
        """Writes `old`, whatever lies there."""
        if isinstance(self.memory, Tensor):
            self.memory.index_copy_(0, self.at, self.old)
        else:
            loops().write(self.memory, self.at, self.old)

    def _exchange_on_device(self, memory: Tensor) -> Wrong | None:
        for is_lost, values in ((False, self.old), (True, self.new)):
            if is_lost:
                memory.index_copy_(0, self.at, values)
            other = (memory[self.at] != values).nonzero()
            if len(other):
                if is_lost:
                    self.take_back()
                return Wrong(int(other[0, 0]), is_lost)
        return None


class Wrong(NamedTuple):
    """Of what was to be written into one memory."""

    element: int
    is_lost: bool
    """What was written does not lie there; else something else lay there before."""


class Piece(NamedTuple):
    """Of a tensor's change, what one thread writes in one go."""

    name: str
    change: TensorChange
    first: int
    """Of `found`'s elements, among those of its place."""
    found: Found

    @property
    def is_on_device(self) -> bool:
        return isinstance(self.found.memory, Tensor)


class Writing:
    """Changes, found in every place where they belong: made beside what is served, written and read
    back while nothing is decoded."""

    def __init__(
        self, changes: Iterable[tuple[str, TensorChange, Sequence[Place]]], threads: int = 1
    ) -> None:
        """Every change is one that `changes.check` has passed."""
        self._pieces = [
            Piece(name, change, first, part)
            for name, change, places in changes
            for place in places
            for first, part in place.find(change).pieces()
        ]
        self._threads = threads
        for piece in self._pieces:
            if not piece.is_on_device:  # while decoding stands still, to compile would cost seconds
                empty = piece.found.part(0, 0)
                empty.exchange()
                empty.take_back()

    def write(self) -> None:
        """With the tensor's name: RefusedError if something else lies there than a change was made
        for, DigestMismatchError if afterwards something else does than was written; all is then as
        it was."""
        wrong = dict(self._everywhere())
        if not wrong:
            return
        for number, piece in reversed(list(enumerate(self._pieces))):
            if number not in wrong:
                piece.found.take_back()
        number = min(wrong)
        index, is_lost = wrong[number]
        name, change, first, found = self._pieces[number]
        position = change.positions[
            first + index if found.chosen is None else int(found.chosen[index])
        ]
        what = "does not hold what was written" if is_lost else NOT_MADE_FOR
        lost = any(each.is_lost for each in wrong.values())
        raise (DigestMismatchError if lost else RefusedError)(
            f"tensor {name}: element {position} in the engine's memory {what}"
        )

    def take_back(self) -> None:
        """All is then as it was before `write`."""
        for piece in self._pieces:
            piece.found.take_back()

    def _everywhere(self) -> list[tuple[int, Wrong]]:
        """(number of a piece, what is wrong with it)."""

        def do(numbers: Sequence[int]) -> list[tuple[int, Wrong]]:
            outcomes = ((number, self._pieces[number].found.exchange()) for number in numbers)
            return [(number, wrong) for number, wrong in outcomes if wrong is not None]

        share = -(-len(self._pieces) // self._threads) or 1
        runs = [
            range(start, min(start + share, len(self._pieces)))
            for start in range(0, len(self._pieces), share)
        ]
        return [outcome for found in spread(do, runs, self._threads) for outcome in found]


def weight(positions: Tensor) -> Tensor:
    """`scatter.weight` on any device."""
    mixed = (positions + 1) * loops().FIRST_FACTOR
    found: Tensor = (mixed ^ (mixed >> 32 & LOW)) * loops().SECOND_FACTOR | 1
    return found


def signed(number: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
