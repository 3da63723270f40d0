"""Elements by class, and their ranks: how many elements of its own class come before one.

An element's magnitude is the number that its bits but the highest make: of floating-point numbers
it ascends with the absolute value. Class c is what lies below the c-th threshold and not below the
one before it; what lies below none is the last class. There are three thresholds, of which the
first may be 0, with no element below. Masks tell the classes of 64 elements at a time, and a rank
is a count of bits.

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
"""Of an optimizer's step four tell nearly all that sixteen do. The loops over elements are written
out for four."""
SAMPLE, STRIDE = 128, 16
"""Thresholds are chosen by so many changes, looked for in one of so many words of 64 elements, then
in all. With fewer, what classes save is less than what starting them costs."""
ROOM = 32
"""Lists begin with room for one element in so many: the system would have to clear the pages of
longer ones."""
LAST = 1 << 62
HIGH_BITS = -0x7F7F7F7F7F7F7F80
"""The highest bit of each byte of a word."""
SELECT = np.array(
    [[*[i for i in range(8) if byte >> i & 1], *[0] * 8][:8] for byte in range(256)], np.int64
)
"""[256, 8] where a byte's set bits are, from the lowest."""


@compiled
def choose_thresholds(old, new):
    """[3] magnitudes that part the changed ones of [n] unsigned integers into groups of about the
    same number. Where they are few, or many of them equal, the first are 0; from there on they
    ascend."""
    found, count, low = np.empty(SAMPLE + 64, np.int64), 0, _low_bits(old.itemsize)
    for stride in (STRIDE, 1):
        count = 0
        for word in range(0, len(old) >> 6, stride):
            changed = lanes_differ(old, new, word << 6)
            while changed:
                found[count] = np.int64(old[word << 6 | trailing_zeros(changed)]) & low
                count += 1
                changed &= changed - 1
            if count >= SAMPLE:
                break
        if count >= SAMPLE:
            break
    thresholds, unused = np.zeros(CLASSES - 1, np.int64), CLASSES - 1
    if count >= SAMPLE:
        found = np.sort(found[:count])
        for number in range(CLASSES - 1, 0, -1):
            threshold = found[number * count // CLASSES]
            if threshold > found[0] and (unused == CLASSES - 1 or threshold < thresholds[unused]):
                unused -= 1
                thresholds[unused] = threshold
    return thresholds


@compiled
def find_changes(old, new, thresholds):
    """Which elements differ and by how much: ([k] keys, [k] new minus old as signed numbers of the
    elements' width, [4] how many elements each class has). A key is the rank * 4 + the class; those
    of one class ascend."""
    size, count, low, above = len(old), 0, _low_bits(old.itemsize), 64 - 8 * old.itemsize
    keys, differences = np.empty(size // ROOM + 64, np.int64), np.empty(size // ROOM + 64, np.int64)
    seen, members, (t0, t1, t2) = (
        np.zeros(CLASSES, np.int64),
        np.zeros(CLASSES, np.int64),
        thresholds,
    )
    n0 = n1 = n2 = 0  # how many elements so far are below each threshold
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
    """Makes `out` what `old` becomes: the changes of class c are `bounds[c]:bounds[c + 1]`, with
    ascending ranks. False if a class has no such rank."""
    size, low, (t0, t1, t2) = len(old), _low_bits(old.itemsize), thresholds
    # each class's next change, and its rank
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
    """Both class by class: ([k] ranks, [k] differences, [5] where each class begins and the last
    ends)."""
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
    """Of elements of so many bytes all but the highest."""
    return (1 << 8 * width - 1) - 1


@compiled
def _class_of(magnitude, thresholds):
    """For the few elements after the last whole word."""
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
    """The number of the set bit of `word` that has `rank` set bits below it: its byte by counting
    all bytes' bits at once (Vigna 2008, "Broadword implementation of rank/select queries"), the bit
    by a table."""
    counts = word - (shift_right(word, 1) & 0x5555555555555555)
    counts = (counts & 0x3333333333333333) + (shift_right(counts, 2) & 0x3333333333333333)
    counts = (
        (counts + shift_right(counts, 4)) & 0x0F0F0F0F0F0F0F0F
    ) * 0x0101010101010101  # of each byte and those below
    start = popcount(((rank * 0x0101010101010101 | HIGH_BITS) - counts) & HIGH_BITS) << 3
    below = shift_right(counts << 8, start) & 255
    return start + SELECT[shift_right(word, start) & 255, rank - below]
