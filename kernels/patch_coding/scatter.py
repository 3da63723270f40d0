"""Writing what changed into weights where they lie, with proof, and checksums that such a change
updates.

A checkpoint's tensor, seen as rows of `columns` elements, lies in an engine's memory at

    element (r, c) -> place_rows[r - first_row] + place_columns[c - first_column]

whatever the engine made of it: a part of a fused matrix, a rank's slice of it, a copy in blocks for
matrix units (oneDNN's layouts are of this form, too). What is outside of these rows and columns is
not in this memory.

The checksum of a tensor is sum over p of weight(p) * element(p), modulo 2^64, where elements are
read as unsigned integers and weights are odd numbers mixed from the position: a change of one
element always changes it, one of several does but for one case in 2^64 (of changes that were not
made to fool it: it is no digest).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np

from .lanes import compiled, prefetch, shift_right

FIRST_FACTOR = -0x61C8864680B583EB
SECOND_FACTOR = -0x4B47D0C5A2A4B1DB
"""Odd; as signed 64-bit numbers (the first is 2^64 over the golden ratio, as in SplitMix64)."""

INTACT, OUTSIDE, UNSORTED = 0, 1, 2
WRITTEN, OTHER, LOST = 0, 1, 2
BLOCK = 256
"""Elements that are read back at a time, while their lines of the cache are at hand: to fetch these
once more costs as much as to write."""
AHEAD = 64
"""Elements ahead of the one that is written whose lines of the cache are asked for: about as many
as a core waits for at once."""


@compiled
def weight(position):
    """An odd 64-bit number."""
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
    """Whether they ascend without repeating and are within a tensor of `size` elements: what is
    wrong, and with which."""
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
    """Where these positions, which ascend, lie in a memory: writes it to `at`, and which of them
    they are to `chosen`; how many lie there."""
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
    """Writes `new` where `old` must lie, and reads it back: WRITTEN, or what is wrong and where,
    and then all is as it was. OTHER: something else lay there. LOST: what was written is not
    there. `at` are unsigned and do not repeat."""
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
        for i in range(start, stop):  # without a branch, since hardly ever one is wrong
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
    """Writes without looking: the way back of `exchange`, and what it is measured against."""
    last = len(at) - 1
    for i in range(len(at)):
        prefetch(memory, np.int64(at[min(i + AHEAD, last)]))
        memory[at[i]] = values[i]
