"""Streams of bits for weight patches: fields, numbers of unknown size, and Golomb-Rice codes that
adapt.

Bit i of a stream is bit i % 64 of word i // 64. `put` functions append to a stream, whose first
word begins as 0, and return where they stopped. `get` functions return what they read and where it
ends; what they read has `SLACK` words of zeros behind it. All numbers are int64: mixed operations
would fall back to floating point.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import sys

from .lanes import compiled, shift_right, trailing_zeros

UNARY = 24
"""A quotient this large is not written in unary: the number follows in binary, after its length."""
WINDOW = 5
"""Each number moves the running mean by 1/2^WINDOW of its distance from it."""
LARGEST_PARAMETER = 38
"""So that quotient, end mark and remainder fit into 63 bits."""
SLACK = 6
"""Zero words after a stream: what one turn of a reading loop takes before it looks at where it
stands is shorter."""

assert sys.byteorder == "little", "streams are little-endian words"


@compiled
def put(words, at, value, width):
    """Appends the low `width` bits (at most 63) of `value`, which has none above them. Nothing
    behind the word that `at` is in has to be set before; of that word, the bits from `at` on are
    0."""
    word, shift = at >> 6, at & 63
    words[word] |= value << shift
    words[word + 1] = shift_right(shift_right(value, 1), 63 - shift)
    return at + width


@compiled
def get(words, at, width):
    """(the number in the next `width` bits, at most 63; where it ends)."""
    word, shift = at >> 6, at & 63
    value = shift_right(words[word], shift) | words[word + 1] << 1 << 63 - shift
    return value & ((1 << width) - 1), at + width


@compiled
def put_number(words, at, value):
    """A number of unknown size: its length in 6 bits, then itself."""
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
    """The running mean (times 2^WINDOW) and the parameter, floor(log2(mean)), once `value` has been
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
