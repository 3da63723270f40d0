"""Loops that write changes into weights in place and verify them, and checksums that a change can
update.

A checkpoint's tensor, seen as rows of `columns` elements, lies in an engine's memory at

    element (r, c) -> place_rows[r - first_row] + place_columns[c - first_column]

whatever the engine made of it: a part of a fused matrix, a rank's slice of it, a copy in blocks for
matrix units (oneDNN's layouts are of this form, too). Elements outside of these rows and columns
are not in this memory.

The checksum of a tensor is the sum over p of weight(p) * element(p), modulo 2^64, where elements
are read as unsigned integers and weights are odd numbers mixed from the position: a change of one
element always changes it, one of several does except in one case of 2^64 (for changes that were not
made to fool it: it is no digest).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np

from .lanes import compiled, prefetch, shift_right

FIRST_FACTOR = -0x61C8864680B583EB
SECOND_FACTOR = -0x4B47D0C5A2A4B1DB
"""Odd factors, as signed 64-bit numbers (the first is 2^64 over the golden ratio, as in
SplitMix64)."""

INTACT, OUTSIDE, UNSORTED = 0, 1, 2
WRITTEN, OTHER, LOST = 0, 1, 2
BLOCK = 256
"""Elements that are read back at a time, while their cache lines are still loaded: loading them
once more would cost as much as writing."""
AHEAD = 64
"""Elements by which prefetching is ahead of writing: about as many as the cache lines for which a
core can wait at once."""


@compiled
def weight(position):
    """The odd 64-bit weight of a position in the checksum."""
    mixed = (position + 1) * FIRST_FACTOR
    return (mixed ^ shift_right(mixed, 32)) * SECOND_FACTOR | 1


@compiled
def change_checksum(positions, old, new):
    """The contribution of these changed elements, [k] each, to the tensor's checksum."""
    total = np.int64(0)
    for i in range(len(positions)):
        total += weight(np.int64(positions[i])) * (np.int64(new[i]) - np.int64(old[i]))
    return total


@compiled
def checksum(memory, place_rows, place_columns, first_row, first_column, columns):
    """The part of a tensor's checksum that lies in this memory."""
    total = np.int64(0)
    for row in range(len(place_rows)):
        start = (first_row + row) * columns + first_column
        for column in range(len(place_columns)):
            element = memory[place_rows[row] + place_columns[column]]
            total += weight(start + column) * np.int64(element)
    return total


@compiled
def part_of_change(
    place_rows, place_columns, first_row, first_column, columns, positions, old, new
):
    """A change's contribution to the part of its tensor's checksum that lies in these rows and
    columns."""
    total, row, start = np.int64(0), np.int64(0), np.int64(0)
    for i in range(len(positions)):
        position = np.int64(positions[i])
        if position - start >= columns:
            row = position // columns
            start = row * columns
        r, c = row - first_row, position - start - first_column
        if r < 0 or c < 0 or r >= len(place_rows) or c >= len(place_columns):
            continue
        total += weight(position) * (np.int64(new[i]) - np.int64(old[i]))
    return total


@compiled
def check_positions(positions, size):
    """(INTACT, -1) if positions ascend without repeating, within a tensor of `size` elements; else
    (OUTSIDE or UNSORTED, index of the first wrong one)."""
    last = np.int64(-1)
    for i in range(len(positions)):
        position = np.int64(positions[i])
        if position < 0 or position >= size:
            return OUTSIDE, i
        if position <= last:
            return UNSORTED, i
        last = position
    return INTACT, -1


@compiled
def find(place_rows, place_columns, first_row, first_column, columns, positions, at, chosen):
    """Locates ascending positions in a memory: fills `at` with indices in the memory and `chosen`
    with indices into `positions`, and returns the number of positions that are there."""
    count, row, start = 0, np.int64(0), np.int64(0)
    for i in range(len(positions)):
        position = np.int64(positions[i])
        if position - start >= columns:
            row = position // columns
            start = row * columns
        r, c = row - first_row, position - start - first_column
        if r < 0 or c < 0 or r >= len(place_rows) or c >= len(place_columns):
            continue
        at[count] = place_rows[r] + place_columns[c]
        chosen[count] = i
        count += 1
    return count


@compiled
def exchange(memory, at, old, new):
    """Writes `new` in place of `old`, and reads it back. Returns (WRITTEN, -1), or (the problem,
    index of its element), and then all is as before. OTHER: the element was not `old`. LOST: it
    does not hold `new`. The indices `at` must be unsigned and not repeat."""
    count = len(at)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        for i in range(start, stop):
            prefetch(memory, np.int64(at[min(i + AHEAD, count - 1)]))
            if memory[at[i]] != old[i]:
                _back(memory, at, old, i)
                return OTHER, i
            memory[at[i]] = new[i]
        wrong = np.int64(0)
        for i in range(start, stop):  # without a branch in the loop: hardly ever is one wrong
            wrong |= np.int64(memory[at[i]] ^ new[i])
        if wrong != 0:
            i = _first_other(memory, at, new, start)
            _back(memory, at, old, stop)
            return LOST, i
    return WRITTEN, -1


@compiled
def _back(memory, at, old, count):
    for i in range(count - 1, -1, -1):
        memory[at[i]] = old[i]


@compiled
def _first_other(memory, at, values, start):
    i = start
    while memory[at[i]] == values[i]:
        i += 1
    return i


@compiled
def write(memory, at, values):
    """Writes values without checks: undoes `exchange`, and is the baseline of its benchmark."""
    last = len(at) - 1
    for i in range(len(at)):
        prefetch(memory, np.int64(at[min(i + AHEAD, last)]))
        memory[at[i]] = values[i]
