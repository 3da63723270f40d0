"""Classes of elements by magnitude, and ranks: the number of elements of the same class before one.

An element's magnitude is its bits except the highest, as a number: for floating-point numbers it
grows with the absolute value. Class c has the elements below the c-th threshold and not below the
one before it; the last class has those below none. There are three thresholds; the first of them
may be 0, with no element below. The classes of 64 elements at a time are bit masks, and a rank is a
popcount.

No function that takes an array is called in the loops over elements: numba counts references to
arrays at each call, which takes longer than the work.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np

from .lanes import (
    compiled,
    lanes_below,
    lanes_copy,
    lanes_differ,
    popcount,
    shift_right,
    trailing_zeros,
)

CLASS_BITS = 2
CLASSES = 1 << CLASS_BITS
"""For an optimizer's step four classes save nearly as much as sixteen. The loops over elements are
unrolled for four."""
SAMPLE, STRIDE = 128, 16
"""Thresholds are estimated from `SAMPLE` changes in every `STRIDE`-th word of 64 elements, or if
these have fewer, in all words. With fewer changes classes cost more than they save."""
ROOM = 32
"""Lists begin with room for one change in so many elements: the system would have to clear the
pages of longer ones."""
LAST = 1 << 62
HIGH_BITS = -0x7F7F7F7F7F7F7F80
"""The highest bit of each byte of a word."""
SELECT = np.array(
    [[*[i for i in range(8) if byte >> i & 1], *[0] * 8][:8] for byte in range(256)], np.int64
)
"""[256, 8] int64 positions of a byte's set bits, from the lowest."""


@compiled
def choose_thresholds(old, new):
    """[3] int64 magnitudes that split the changed elements of two [n] arrays of unsigned integers
    into groups of about the same size. If there are few changes, or many equal magnitudes, the
    first thresholds are 0; the others ascend."""
    magnitudes, count, low = np.empty(SAMPLE + 64, np.int64), 0, _low_bits(old.itemsize)
    for stride in (STRIDE, 1):
        count = 0
        for word in range(0, len(old) >> 6, stride):
            changed = lanes_differ(old, new, word << 6)
            while changed:
                magnitudes[count] = np.int64(old[word << 6 | trailing_zeros(changed)]) & low
                count += 1
                changed &= changed - 1
            if count >= SAMPLE:
                break
        if count >= SAMPLE:
            break
    thresholds, unused = np.zeros(CLASSES - 1, np.int64), CLASSES - 1
    if count >= SAMPLE:
        magnitudes = np.sort(magnitudes[:count])
        for number in range(CLASSES - 1, 0, -1):
            threshold = magnitudes[number * count // CLASSES]
            if threshold > magnitudes[0] and (
                unused == CLASSES - 1 or threshold < thresholds[unused]
            ):
                unused -= 1
                thresholds[unused] = threshold
    return thresholds


@compiled
def find_changes(old, new, thresholds):
    """The elements that differ: ([k] int64 keys, [k] int64 new minus old, as signed numbers of the
    elements' width, [4] int64 number of elements in each class). A key is rank * 4 + class; the
    keys of one class ascend."""
    size, count, low, above = len(old), 0, _low_bits(old.itemsize), 64 - 8 * old.itemsize
    keys, differences = np.empty(size // ROOM + 64, np.int64), np.empty(size // ROOM + 64, np.int64)
    seen, members, (t0, t1, t2) = (
        np.zeros(CLASSES, np.int64),
        np.zeros(CLASSES, np.int64),
        thresholds,
    )
    n0 = n1 = n2 = 0  # numbers of elements so far that are below each threshold
    for word in range(size >> 6):
        if count + 64 > len(keys):
            keys, differences = _longer(keys), _longer(differences)
        start = word << 6
        below0, below1, below2 = (
            lanes_below(old, start, t0),
            lanes_below(old, start, t1),
            lanes_below(old, start, t2),
        )
        left = lanes_differ(old, new, start)
        if left:
            members[0], members[1], members[2], members[3] = (
                below0,
                below1 & ~below0,
                below2 & ~below1,
                ~below2,
            )
            seen[0], seen[1], seen[2], seen[3] = n0, n1 - n0, n2 - n1, start - n2
        while left:
            bit, position = left & -left, start | trailing_zeros(left)
            number = (
                CLASSES - 1 - ((below0 & bit) != 0) - ((below1 & bit) != 0) - ((below2 & bit) != 0)
            )
            keys[count] = seen[number] + popcount(members[number] & bit - 1) << CLASS_BITS | number
            differences[count] = np.int64(new[position]) - np.int64(old[position]) << above >> above
            count += 1
            left &= left - 1
        n0, n1, n2 = n0 + popcount(below0), n1 + popcount(below1), n2 + popcount(below2)
    if count + 64 > len(keys):
        keys, differences = _longer(keys), _longer(differences)
    totals = np.array([n0, n1 - n0, n2 - n1, (size & -64) - n2])
    for position in range(size & -64, size):
        number = _class_of(np.int64(old[position]) & low, thresholds)
        if old[position] != new[position]:
            keys[count] = totals[number] << CLASS_BITS | number
            differences[count] = np.int64(new[position]) - np.int64(old[position]) << above >> above
            count += 1
        totals[number] += 1
    return keys[:count], differences[:count], totals


@compiled
def place_changes(old, out, thresholds, bounds, ranks, differences):
    """Fills `out` with `old` after the changes, those of class c at `bounds[c]:bounds[c + 1]` with
    ascending ranks. False if a class has no element of some rank."""
    size, low, (t0, t1, t2) = len(old), _low_bits(old.itemsize), thresholds
    # for each class the index of its next change, and that one's rank
    at, following = bounds[:-1].copy(), np.full(CLASSES, LAST)
    seen, members, ends = (
        np.zeros(CLASSES, np.int64),
        np.zeros(CLASSES, np.int64),
        np.zeros(CLASSES, np.int64),
    )
    for number in range(CLASSES):
        if at[number] < bounds[number + 1]:
            following[number] = ranks[at[number]]
    next0, next1, next2, next3 = following
    n0 = n1 = n2 = 0
    for word in range(size >> 6):
        start = word << 6
        lanes_copy(old, out, start)
        below0, below1, below2 = (
            lanes_below(old, start, t0),
            lanes_below(old, start, t1),
            lanes_below(old, start, t2),
        )
        m0, m1, m2 = n0 + popcount(below0), n1 + popcount(below1), n2 + popcount(below2)
        if (next0 < m0) | (next1 < m1 - m0) | (next2 < m2 - m1) | (next3 < start + 64 - m2):
            members[0], members[1], members[2], members[3] = (
                below0,
                below1 & ~below0,
                below2 & ~below1,
                ~below2,
            )
            seen[0], seen[1], seen[2], seen[3] = n0, n1 - n0, n2 - n1, start - n2
            ends[0], ends[1], ends[2], ends[3] = m0, m1 - m0, m2 - m1, start + 64 - m2
            for number in range(CLASSES):
                while following[number] < ends[number]:
                    position = start | _select(members[number], following[number] - seen[number])
                    out[position] = np.int64(old[position]) + differences[at[number]]
                    at[number] += 1
                    following[number] = (
                        ranks[at[number]] if at[number] < bounds[number + 1] else LAST
                    )
            next0, next1, next2, next3 = following
        n0, n1, n2 = m0, m1, m2
    seen[0], seen[1], seen[2], seen[3] = n0, n1 - n0, n2 - n1, (size & -64) - n2
    for position in range(size & -64, size):
        number, out[position] = _class_of(np.int64(old[position]) & low, thresholds), old[position]
        if following[number] == seen[number]:
            out[position] = np.int64(old[position]) + differences[at[number]]
            at[number] += 1
            following[number] = ranks[at[number]] if at[number] < bounds[number + 1] else LAST
        seen[number] += 1
    return (at == bounds[1:]).all()


@compiled
def by_class(keys, differences):
    """The changes sorted by class: ([k] ranks, [k] differences, [5] bounds of the classes)."""
    bounds, ranks, ordered = (
        np.zeros(CLASSES + 1, np.int64),
        np.empty_like(keys),
        np.empty_like(differences),
    )
    for key in keys:
        bounds[(key & (CLASSES - 1)) + 1] += 1
    bounds = np.cumsum(bounds)
    ends = bounds.copy()
    for i in range(len(keys)):
        number = keys[i] & (CLASSES - 1)
        ranks[ends[number]], ordered[ends[number]] = keys[i] >> CLASS_BITS, differences[i]
        ends[number] += 1
    return ranks, ordered, bounds


@compiled
def _low_bits(width):
    """The mask of all bits but the highest, of elements of `width` bytes."""
    return (1 << 8 * width - 1) - 1


@compiled
def _class_of(magnitude, thresholds):
    """The class of one element; for the few after the last whole word of 64."""
    number = 0
    while number < len(thresholds) and magnitude >= thresholds[number]:
        number += 1
    return number


@compiled
def _longer(numbers):
    longer = np.empty(2 * len(numbers), np.int64)
    longer[: len(numbers)] = numbers
    return longer


@compiled
def _select(word, rank):
    """The position of the set bit of `word` that has `rank` set bits below it: its byte by counting
    the bits of all bytes at once (Vigna 2008, "Broadword implementation of rank/select queries"),
    the bit in it by a table."""
    counts = word - (shift_right(word, 1) & 0x5555555555555555)
    counts = (counts & 0x3333333333333333) + (shift_right(counts, 2) & 0x3333333333333333)
    # after this, byte i of counts is the number of set bits in bytes 0 to i
    counts = ((counts + shift_right(counts, 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101
    start = popcount(((rank * 0x0101010101010101 | HIGH_BITS) - counts) & HIGH_BITS) << 3
    below = shift_right(counts << 8, start) & 255
    return start + SELECT[shift_right(word, start) & 255, rank - below]
