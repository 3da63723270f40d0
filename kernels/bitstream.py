"""Streams of bits for weight patches: fields, numbers of unknown size, and Golomb-Rice codes that adapt.

Bit i of a stream is bit i % 64 of word i // 64; a stream ends in `SLACK` words of zeros. `put` functions append to a stream
that is zero from bit `at` on and return where they stopped; `get` functions return what they read and where it ends. All
numbers are int64: mixed operations would fall back to floating point.

What is compiled is kept between processes. numba sees a change of a function's own file only: whoever edits this one has
to delete what `delta.py` left in `__pycache__` (`*.nbi`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from numba import extending, njit, types

intrinsic: Any = extending.intrinsic  # it rewrites what it decorates in a way that no annotation tells

UNARY = 24
"""A quotient this large is not written in unary: the number follows in binary, after its length."""
WINDOW = 5
"""Each number moves the running mean by 1/2^WINDOW of its distance from it."""
LARGEST_PARAMETER = 38
"""So that quotient, end mark and remainder fit into 63 bits."""
SLACK = 6
"""Zero words after a stream: what one turn of a reading loop takes before it looks at where it stands is shorter."""

assert sys.byteorder == "little", "streams are little-endian words"


@intrinsic
def popcount(_context, x):
    return types.int64(types.int64), lambda _c, builder, _s, args: builder.ctpop(args[0])


@intrinsic
def trailing_zeros(_context, x):
    def emit(context, builder, _signature, args):
        return builder.cttz(args[0], context.get_constant(types.boolean, False))

    return types.int64(types.int64), emit


@intrinsic
def shift_right(_context, x, by):
    """Fills with zeros, unlike `>>` of a signed number."""
    return types.int64(types.int64, types.int64), lambda _c, builder, _s, args: builder.lshr(args[0], args[1])


# kept between processes where the installation may be written to: compiling takes seconds
compiled = njit(nogil=True, cache=os.access(Path(__file__).parent, os.W_OK))


@compiled
def put(words, at, value, width):
    """Appends the low `width` bits (at most 63) of `value`, which has none above them."""
    word, shift = at >> 6, at & 63
    words[word] |= value << shift
    if shift + width > 64:
        words[word + 1] |= shift_right(value, 64 - shift)
    return at + width


@compiled
def get(words, at, width):
    """(the number in the next `width` bits, at most 63; where it ends)."""
    word, shift = at >> 6, at & 63
    value = shift_right(words[word], shift)
    if shift + width > 64:
        value |= words[word + 1] << (64 - shift)
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
    """The running mean (times 2^WINDOW) and the parameter, floor(log2(mean)), once `value` has been coded."""
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
