"""The coding loops of weight patches: where a tensor's elements changed and by how much, as a stream of bits.

    stream = encode_changes(old, new, shift=7)              # bfloat16: the exponent begins at bit 7
    decode_changes(stream, old, shift=7, out=out)           # out == new

The stream is specified in `rollout/patch_format.py`. Three things make it small. An optimizer's steps are about equally
large everywhere, so whether a weight crosses to the next representable number depends on how far apart those stand at
its size: elements are dealt into 16 classes by their old exponent, and each class has its own density of changes.
Changes are coded as differences of the bit patterns read as integers, which are nearly always 1 or -1. And every number
is a Golomb-Rice code whose parameter follows the running mean (Rice 1979; adapted as in JPEG-LS, ITU-T T.87, with an
exponential window), so there are no tables, and a list costs about its entropy wherever its numbers cluster.

Loops over elements are NumPy's; loops over changes and over words of 64 elements are compiled by numba on first use and
run without the interpreter's lock. `_put` and `_get` functions go with those of `bitstream.py`; a `_get` returns -1 for
where once a stream cannot be valid, and whatever it holds they touch nothing outside their arrays.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bitstream import (
    LARGEST_PARAMETER,
    SLACK,
    WINDOW,
    adapt,
    compiled,
    first_parameter,
    get,
    get_number,
    get_rice,
    popcount,
    put,
    put_number,
    put_rice,
    shift_right,
    trailing_zeros,
)

Words = NDArray[np.int64]
Elements = NDArray[np.unsignedinteger]

CLASS_BITS = 4
"""Bits of the exponent, from its lowest, that name an element's class."""
FEW = 128
"""With fewer changes than this, what classes save is less than what starting them costs."""
FACTOR = sum(1 << (56 + element - 8 * byte) for byte, element in enumerate((0, 4, 1, 5, 2, 6, 3, 7)))
"""See `_transpose_pairs`."""
HIGH_BITS = -0x7F7F7F7F7F7F7F80
"""The highest bit of each byte of a word."""
SELECT = np.array([[*[i for i in range(8) if byte >> i & 1], *[0] * 8][:8] for byte in range(256)], np.int64)
"""[256, 8] where a byte's set bits are, from the lowest."""
CHANGE_WORDS = 5
"""Words that one change may take: three of the longest codes (24 + 6 + 63 bits) and its sign."""
CLASS_WORDS = 6
"""Words that a class takes beside its changes."""


def encode_changes(old: Elements, new: Elements, shift: int | None) -> NDArray[np.uint8]:
    """The stream that takes `old` to `new`, both [n] unsigned integers of one width; `shift` is the lowest bit of the
    exponent, None for elements without one."""
    changed = _pack(new != old)
    positions = np.empty(_count(changed), np.int64)
    _set_bits(changed, positions)
    differences = (new[positions] - old[positions]).view(f"i{old.itemsize}").astype(np.int64)
    by_class = shift is not None and len(positions) >= FEW
    planes, bounds = _planes(old, shift if by_class else None), np.array([0, len(positions)])
    if shift is not None and by_class:
        classes = old[positions] >> shift & ((1 << CLASS_BITS) - 1)
        order = np.argsort(classes, kind="stable")
        positions, differences = positions[order], differences[order]
        bounds = np.searchsorted(classes[order], np.arange((1 << CLASS_BITS) + 1))
    words = np.zeros(SLACK + CHANGE_WORDS * len(positions) + CLASS_WORDS * len(bounds), np.int64)
    at = put(words, put_number(words, 0, len(positions)), int(by_class), 1)
    at = _put_classes(words, at, len(old), planes, positions, differences, bounds)
    return words.view(np.uint8)[: -(-at // 8)].copy()


def decode_changes(stream: NDArray[np.uint8], old: Elements, shift: int | None, out: Elements) -> bool:
    """Writes to `out` what `old` becomes; False, with `out` in any state, if this is no stream for [n] elements."""
    words = np.zeros(SLACK + -(-len(stream) // 8), np.int64)
    words.view(np.uint8)[: len(stream)] = stream
    count, at = get_number(words, 0)
    by_class, at = get(words, at, 1)
    if count > len(old) or at > 8 * len(stream) or (by_class and shift is None):
        return False
    positions, differences = np.empty(count, np.int64), np.empty(count, np.int64)
    planes = _planes(old, shift if by_class else None)
    classes = 1 << CLASS_BITS if by_class else 1
    at = _get_classes(words, at, 8 * len(stream), len(old), planes, classes, positions, differences)
    if at < 0 or -(-at // 8) != len(stream):
        return False
    np.copyto(out, old)
    out[positions] += differences.astype(out.dtype)
    return True


def _classes(elements: Elements, shift: int) -> NDArray[np.uint8]:
    """[n rounded up to 64] the class of each element, 0 beyond them."""
    classes = np.zeros(-(-len(elements) // 64) * 64, np.uint8)
    _fields(elements, shift, (1 << CLASS_BITS) - 1, classes)
    return classes


def _planes(old: Elements, shift: int | None) -> Words:
    """[CLASS_BITS, ceil(n / 64)] plane p holds bit p of every element's class; without classes all are of class 0."""
    planes = np.zeros((CLASS_BITS, -(-len(old) // 64) * 8), np.uint8)
    if shift is not None and old.itemsize == 2 and len(old) % 64 == 0 and old.ctypes.data % 8 == 0:
        _transpose_pairs(old.view(np.int64), shift, planes)
    elif shift is not None:
        _transpose(_classes(old, shift).view(np.int64), planes)
    return planes.view(np.int64)


def _pack(flags: NDArray[np.bool_]) -> Words:
    """[n] -> [ceil(n / 64)]."""
    words = np.zeros(-(-len(flags) // 64), np.int64)
    words.view(np.uint8)[: -(-len(flags) // 8)] = np.packbits(flags, bitorder="little")
    return words


@compiled
def _fields(elements, shift, mask, fields):
    for i in range(len(elements)):
        fields[i] = np.int64(elements[i]) >> shift & mask


@compiled
def _transpose(eights, planes):
    """Bit p of each of eight bytes becomes a byte of plane p: the product brings the eight bits side by side."""
    for i in range(len(eights)):
        for p in range(CLASS_BITS):
            planes[p, i] = ((eights[i] >> p & 0x0101010101010101) * 0x0102040810204080) >> 56


@compiled
def _transpose_pairs(fours, shift, planes):
    """`_transpose` of `_classes` in one go for elements of 16 bits, four to a word. Of two words the classes come together
    as the bytes of elements 0, 4, 1, 5, 2, 6, 3, 7; the factor has a bit for each, which sends it to where it belongs."""
    for i in range(len(fours) // 2):
        even = fours[2 * i] >> shift & 0x000F000F000F000F
        odd = fours[2 * i + 1] >> shift & 0x000F000F000F000F
        eight = even | odd << 8
        for p in range(CLASS_BITS):
            planes[p, i] = shift_right((eight >> p & 0x0101010101010101) * FACTOR, 56)


@compiled
def _count(words):
    """How many bits are set."""
    count = 0
    for word in words:
        count += popcount(word)
    return count


@compiled
def _set_bits(words, positions):
    """Fills `positions` with the numbers of the bits that are set, ascending."""
    done = 0
    for word in range(len(words)):
        left = words[word]
        while left:
            positions[done] = word << 6 | trailing_zeros(left)
            done += 1
            left &= left - 1


@compiled
def _select(word, rank):
    """The number of the set bit of `word` that has `rank` set bits below it: its byte by counting all bytes' bits at once
    (Vigna 2008, "Broadword implementation of rank/select queries"), the bit by a table."""
    counts = word - (shift_right(word, 1) & 0x5555555555555555)
    counts = (counts & 0x3333333333333333) + (shift_right(counts, 2) & 0x3333333333333333)
    counts = (
        (counts + shift_right(counts, 4)) & 0x0F0F0F0F0F0F0F0F
    ) * 0x0101010101010101  # of each byte and those below
    start = popcount(((rank * 0x0101010101010101 | HIGH_BITS) - counts) & HIGH_BITS) << 3
    below = shift_right(counts << 8, start) & 255
    return start + SELECT[shift_right(word, start) & 255, rank - below]


@compiled
def _members(planes, number, size, members):
    """Fills the mask of the elements below `size` whose class is `number`; returns how many they are."""
    a, b, c, d = planes[0], planes[1], planes[2], planes[3]
    not_a, not_b, not_c, not_d = (number & 1) - 1, (number >> 1 & 1) - 1, (number >> 2 & 1) - 1, (number >> 3) - 1
    for word in range(len(members)):
        members[word] = (a[word] ^ not_a) & (b[word] ^ not_b) & (c[word] ^ not_c) & (d[word] ^ not_d)
    if size & 63:
        members[size >> 6] &= (1 << (size & 63)) - 1
    count = 0
    for word in range(len(members)):
        count += popcount(members[word])
    return count


@compiled
def _put_positions(words, at, members, positions, parameter):
    """Appends ascending positions, all set in `members`, as the number of members between one and the next."""
    mean = 1 << parameter << WINDOW
    word, before, last = 0, 0, -1
    for i in range(len(positions)):
        for passed in range(word, positions[i] >> 6):
            before += popcount(members[passed])
        word = positions[i] >> 6
        rank = before + popcount(members[word] & ((1 << (positions[i] & 63)) - 1))
        at = put_rice(words, at, rank - last - 1, parameter)
        mean, parameter = adapt(mean, parameter, rank - last - 1)
        last = rank
    return at


@compiled
def _get_positions(words, at, end, members, positions, parameter):
    mean = 1 << parameter << WINDOW
    word, before, rank = 0, 0, -1
    inside = popcount(members[0])
    for i in range(len(positions)):
        gap, at = get_rice(words, at, parameter)
        if at > end or gap >= len(members) << 6:
            return -1
        rank += gap + 1
        while rank >= before + inside:
            before += inside
            word += 1
            if word == len(members):
                return -1
            inside = popcount(members[word])
        positions[i] = word << 6 | _select(members[word], rank - before)
        mean, parameter = adapt(mean, parameter, gap)
    return at


@compiled
def _steps(difference):
    """|difference| - 1, without overflow at the most negative one."""
    return ~difference if difference < 0 else difference - 1


@compiled
def _run(differences, first):
    """How many differences from `first` on are 1 or -1."""
    last = first
    while last < len(differences) and _steps(differences[last]) == 0:
        last += 1
    return last - first


@compiled
def _put_differences(words, at, differences):
    """Appends one bit for how, two parameters, and the differences: wide ones each with a sign and |difference| - 1;
    narrow ones, of which most are 1 or -1, each with a sign, and all others with |difference| - 2 and the run to the next."""
    others, beyond = 0, 0.0
    for i in range(len(differences)):
        others += _steps(differences[i]) > 0
        beyond += max(0, _steps(differences[i]) - 1)
    wide = 2 * others > len(differences)
    run_parameter = first_parameter(len(differences) - others, others + 1)
    parameter = first_parameter(np.int64(min(beyond, 1e18)) + (others if wide else 0), max(1, others))
    at = put(words, put(words, put(words, at, wide, 1), run_parameter, 6), parameter, 6)
    mean, run_mean, run = 1 << parameter << WINDOW, 1 << run_parameter << WINDOW, 0
    if not wide:
        run = _run(differences, 0)
        at = put_rice(words, at, run, run_parameter)
        run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    for i in range(len(differences)):
        at = put(words, at, differences[i] < 0, 1)
        if run > 0:
            run -= 1
            continue
        beyond_this = _steps(differences[i]) - (0 if wide else 1)
        at = put_rice(words, at, beyond_this, parameter)
        mean, parameter = adapt(mean, parameter, beyond_this)
        if not wide:
            run = _run(differences, i + 1)
            at = put_rice(words, at, run, run_parameter)
            run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    return at


@compiled
def _get_differences(words, at, end, differences):
    wide, at = get(words, at, 1)
    run_parameter, at = get(words, at, 6)
    parameter, at = get(words, at, 6)
    if max(run_parameter, parameter) > LARGEST_PARAMETER:
        return -1
    mean, run_mean, run = 1 << parameter << WINDOW, 1 << run_parameter << WINDOW, 0
    if not wide:
        run, at = get_rice(words, at, run_parameter)
        run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    for i in range(len(differences)):
        negative, at = get(words, at, 1)
        steps = 0
        if run > 0:
            run -= 1
        else:
            beyond, at = get_rice(words, at, parameter)
            mean, parameter = adapt(mean, parameter, beyond)
            steps = beyond + (0 if wide else 1)
            if not wide:
                run, at = get_rice(words, at, run_parameter)
                run_mean, run_parameter = adapt(run_mean, run_parameter, run)
        if at > end:
            return -1
        differences[i] = ~steps if negative else steps + 1
    return at


@compiled
def _flip(mask, positions):
    for i in range(len(positions)):
        mask[positions[i] >> 6] ^= 1 << (positions[i] & 63)


@compiled
def _put_classes(words, at, size, planes, positions, differences, bounds):
    """Appends every class: how many of its elements are marked, whether those are the unchanged ones (of which there
    may be fewer), where they are, and the differences. Class c's changes are `bounds[c]:bounds[c + 1]`."""
    members = np.empty(-(-size // 64), np.int64)
    for number in range(len(bounds) - 1):
        marks = positions[bounds[number] : bounds[number + 1]]
        count = len(marks)
        total = _members(planes, number, size, members) if count else 0
        unchanged = 2 * count > total
        if unchanged:
            rest = members.copy()
            _flip(rest, marks)
            marks = np.empty(total - count, np.int64)
            _set_bits(rest, marks)
        at = put(words, put_number(words, at, len(marks)), unchanged, 1)
        if len(marks):
            parameter = first_parameter(total - len(marks), len(marks))
            at = _put_positions(words, put(words, at, parameter, 6), members, marks, parameter)
        if count:
            at = _put_differences(words, at, differences[bounds[number] : bounds[number + 1]])
    return at


@compiled
def _get_classes(words, at, end, size, planes, classes, positions, differences):
    members = np.empty(-(-size // 64), np.int64)
    done = 0
    for number in range(classes):
        marked, at = get_number(words, at)
        unchanged, at = get(words, at, 1)
        if at > end:
            return -1
        if not marked and not unchanged:
            continue
        total = _members(planes, number, size, members)
        count = total - marked if unchanged else marked
        if marked > total or done + count > len(positions):
            return -1
        marks = np.empty(marked, np.int64) if unchanged else positions[done : done + count]
        if marked:
            parameter, at = get(words, at, 6)
            if parameter > LARGEST_PARAMETER:
                return -1
            at = _get_positions(words, at, end, members, marks, parameter)
        if at >= 0 and unchanged:
            _flip(members, marks)
            _set_bits(members, positions[done : done + count])
        if at >= 0 and count:
            at = _get_differences(words, at, end, differences[done : done + count])
        if at < 0:
            return -1
        done += count
    return at if done == len(positions) else -1


__all__ = ["decode_changes", "encode_changes"]
