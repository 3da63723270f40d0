"""Streams of bits for weight patches: fields, numbers of any size, and adaptive Golomb-Rice codes.

Bit i of a stream is bit i % 64 of word i // 64. `put` functions append to a stream, whose first
word must begin as 0, and return the position of its end. `get` functions return a value and the
position of its end; the stream must have `SLACK` words of zeros behind it. All numbers are int64:
in numba, int64 with uint64 gives float64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import sys

from .lanes import compiled, shift_right, trailing_zeros

UNARY = 24
"""A quotient from here on is not written in unary: the number follows in binary, after its
length."""
WINDOW = 5
"""Each number moves the running mean by 1/2^WINDOW of its distance from it."""
LARGEST_PARAMETER = 38
"""Largest Rice parameter, with which quotient, end mark and remainder fit into 63 bits."""
SLACK = 6
"""Zero words after a stream, more than a reading loop takes between two checks of its position, so
that no check is needed at each read."""

assert sys.byteorder == "little", "streams are little-endian words"


@compiled
def put(words, at, value, width):
    """Appends the low `width` bits (at most 63) of `value`, whose other bits must be 0. In the word
    of `at`, the bits from `at` on must be 0; later words may hold anything."""
    word, shift = at >> 6, at & 63
    words[word] |= value << shift
    words[word + 1] = shift_right(shift_right(value, 1), 63 - shift)
    return at + width


@compiled
def get(words, at, width):
    """(the number in the next `width` bits, at most 63; the position of its end)."""
    word, shift = at >> 6, at & 63
    value = shift_right(words[word], shift) | words[word + 1] << 1 << 63 - shift
    return value & ((1 << width) - 1), at + width


@compiled
def put_number(words, at, value):
    """Appends a number of any size: its length in 6 bits, then itself."""
    length = 0
    while value >> length:
        length += 1
    return put(words, put(words, at, length, 6), value, length)


@compiled
def get_number(words, at):
    length, at = get(words, at, 6)
    return get(words, at, length)


@compiled
def put_rice(words, at, value, parameter):
    quotient = value >> parameter
    if quotient >= UNARY:
        return put_number(words, put(words, at, (1 << UNARY) - 1, UNARY), value)
    low = value & ((1 << parameter) - 1)
    return put(words, at, low << quotient + 1 | ((1 << quotient) - 1), quotient + 1 + parameter)


@compiled
def get_rice(words, at, parameter):
    bits, _ = get(words, at, 63)
    quotient = trailing_zeros(~bits)
    if quotient >= UNARY:
        return get_number(words, at + UNARY)
    low = bits >> quotient + 1 & ((1 << parameter) - 1)
    return quotient << parameter | low, at + quotient + 1 + parameter


@compiled
def adapt(mean, parameter, value):
    """(the running mean times 2^WINDOW, the parameter floor(log2(mean))) after `value` was
    coded."""
    mean += min(value, UNARY << parameter) - (mean >> WINDOW)
    while parameter < LARGEST_PARAMETER and mean >> WINDOW >> parameter > 1:
        parameter += 1
    while parameter > 0 and mean >> WINDOW >> parameter == 0:
        parameter -= 1
    return mean, parameter


@compiled
def first_parameter(total, count):
    """floor(log2(total / count)), at least 0: the parameter for numbers with that mean."""
    parameter = 0
    while parameter < LARGEST_PARAMETER and total >> parameter + 1 >= count:
        parameter += 1
    return parameter
