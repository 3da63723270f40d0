"""The places of a checkpoint's tensor in an engine's memory, and writing changes there.

A tensor may have several places: a matrix and its copy for matrix units, or an embedding and the
head that is tied to it; and a place may hold only a part of it, as on a rank.
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
"""Bytes of an element -> the dtype as which its bits are moved."""
LOW = 0xFFFF_FFFF
BLOCK = 256
"""Rows of a checksum on a device that are read at a time."""
PIECE = 1 << 16
"""Elements that a thread writes at a time."""
NOT_MADE_FOR = "is not what the change was made for"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """One memory that holds rows `first_row` ... and columns `first_column` ... of a tensor, with
    element (r, c) at `rows[r - first_row] + columns[c - first_column]`."""

    memory: Tensor
    """[n] integers of the elements' width."""
    rows: Tensor
    """[R] int64 offsets, on the memory's device."""
    columns: Tensor
    """[C] int64 offsets, on the memory's device."""
    width: int
    """Columns of the whole tensor."""
    first_row: int = 0
    first_column: int = 0
    keeps: Any = None
    """The owner of the memory, if that is not `memory`; kept alive with the place."""

    def find(self, change: TensorChange) -> Found:
        """The part of a change that belongs into this memory, located. Reads no weights."""
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
        """The checksum of the elements here: their part of the whole tensor's (`scatter`)."""
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
        """([k] indices in the memory, [all positions] bool, whether it is here)."""
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
    """The place of a tensor `held` of one or two dimensions, with any strides, that holds the
    elements from (row, column) `first` on of a tensor of `shape`; one dimension is one row. Raises
    ValueError for other dimensions."""
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
    """The value that `place.checksum()` must have if the tensor is `whole`, a tensor on the
    host."""
    columns, first = len(place.columns), place.first_column
    rows = whole.reshape(-1, place.width)[place.first_row : place.first_row + len(place.rows)]
    shape = (1, place.width) if whole.dim() < 2 else tuple(whole.shape)
    part = rows[:, first : first + columns]
    return plain(part, shape, (place.first_row, first)).checksum()


class Found(NamedTuple):
    """The part of a change that belongs into one memory, ready to be written."""

    memory: Any
    """An array of unsigned integers on the host, or a tensor of integers on a device; the other
    fields likewise."""
    at: Any
    """[k] indices in the memory."""
    old: Any
    new: Any
    chosen: Any
    """[k] indices into the change's positions; None: all of them."""
    keeps: Any = None
    """As of `Place`."""

    def part(self, start: int, stop: int) -> Found:
        chosen = None if self.chosen is None else self.chosen[start:stop]
        at, old, new = (column[start:stop] for column in (self.at, self.old, self.new))
        return self._replace(at=at, old=old, new=new, chosen=chosen)

    def pieces(self) -> Iterator[tuple[int, Found]]:
        """Yields (index of its first element, part), small enough for threads to have equal
        shares; a single part on a device, which has threads of its own."""
        size = len(self.at) or 1 if isinstance(self.memory, Tensor) else PIECE
        for start in range(0, len(self.at), size):
            yield start, self.part(start, start + size)

    def exchange(self) -> Wrong | None:
        """Writes `new` in place of `old` and reads it back. Returns the first problem, in which
        case all is as before."""
        if isinstance(self.memory, Tensor):
            return self._exchange_on_device(self.memory)
        what, index = loops().exchange(self.memory, self.at, self.old, self.new)
        return None if what == loops().WRITTEN else Wrong(int(index), what == loops().LOST)

    def take_back(self) -> None:
        """Writes `old` without a look at what is there."""
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
    """The first element that could not be written into one memory."""

    element: int
    is_lost: bool
    """True: it does not hold what was written. False: it did not hold the old value before."""


class Piece(NamedTuple):
    """The part of a tensor's change that one thread writes in one go."""

    name: str
    change: TensorChange
    first: int
    """Index of `located`'s first element among those of its place."""
    located: Found

    @property
    def is_on_device(self) -> bool:
        return isinstance(self.located.memory, Tensor)


class Writing:
    """Changes located in every place: made while the engine decodes, written and read back while it
    is paused."""

    def __init__(
        self, changes: Iterable[tuple[str, TensorChange, Sequence[Place]]], threads: int = 1
    ) -> None:
        """changes: (name, change, places) of each tensor; `changes.check` must have passed."""
        self._pieces = [
            Piece(name, change, first, part)
            for name, change, places in changes
            for place in places
            for first, part in place.find(change).pieces()
        ]
        self._threads = threads
        for piece in self._pieces:
            if not piece.is_on_device:
                # compiles the loops now: it takes seconds, for which `write` would pause decoding
                empty = piece.located.part(0, 0)
                empty.exchange()
                empty.take_back()

    def write(self) -> None:
        """Writes all changes, or none. Raises RefusedError if an element is not the one for which a
        change was made, and DigestMismatchError if one does not hold what was written, each with
        the tensor's name; all is then as before."""
        wrong = dict(self._everywhere())
        if not wrong:
            return
        for number, piece in reversed(list(enumerate(self._pieces))):
            if number not in wrong:
                piece.located.take_back()
        number = min(wrong)
        index, is_lost = wrong[number]
        name, change, first, part = self._pieces[number]
        position = change.positions[
            first + index if part.chosen is None else int(part.chosen[index])
        ]
        what = "does not hold what was written" if is_lost else NOT_MADE_FOR
        lost = any(each.is_lost for each in wrong.values())
        raise (DigestMismatchError if lost else RefusedError)(
            f"tensor {name}: element {position} in the engine's memory {what}"
        )

    def take_back(self) -> None:
        """Restores the elements as they were before `write`."""
        for piece in self._pieces:
            piece.located.take_back()

    def _everywhere(self) -> list[tuple[int, Wrong]]:
        """Writes all pieces; (number of a piece, its problem) of those that failed."""

        def do(numbers: Sequence[int]) -> list[tuple[int, Wrong]]:
            outcomes = ((number, self._pieces[number].located.exchange()) for number in numbers)
            return [(number, wrong) for number, wrong in outcomes if wrong is not None]

        share = -(-len(self._pieces) // self._threads) or 1
        runs = [
            range(start, min(start + share, len(self._pieces)))
            for start in range(0, len(self._pieces), share)
        ]
        return [outcome for results in spread(do, runs, self._threads) for outcome in results]


def weight(positions: Tensor) -> Tensor:
    """As `scatter.weight`, for a tensor of positions on any device."""
    mixed = (positions + 1) * loops().FIRST_FACTOR
    weights: Tensor = (mixed ^ (mixed >> 32 & LOW)) * loops().SECOND_FACTOR | 1
    return weights


def signed(number: int) -> int:
    """The number modulo 2^64, as a signed 64-bit one."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
