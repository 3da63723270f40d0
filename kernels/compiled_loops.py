"""Elements of bfloat16 and float32 arrays inside compiled loops, and an exponential that
vectorises.

numba knows no bfloat16: such an array comes as uint16, the upper halves of float32 numbers. The
conversions are written as instructions since numba widens integers to 64 bits, which keeps loops
from being vectorised. What is compiled is kept between processes, and numba sees a change of a
function's own file only: whoever edits this one has to delete the `.nbi` files.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np import arrayobj

from .kept import KEPT

FASTMATH = {"reassoc", "contract", "arcp", "nsz", "afn"}
"""Sums may be reordered, which is what lets them be vectorised; NaN and infinity keep their
meaning."""

compiled: Any = njit(nogil=True, fastmath=FASTMATH, cache=KEPT, error_model="numpy")

_intrinsic: Any = intrinsic  # it rewrites what it decorates in a way that no annotation tells

LOG2_E = np.float32(1.4426950408889634)
LOWEST = np.float32(-126.0)
HIGHEST = np.float32(127.0)
LANES = 16
"""Elements of a vector: one register of AVX-512, two of AVX2, four of NEON."""
VECTORS = 4
"""Sums that are kept side by side, so that none waits for the one before."""
UNIT = LANES * VECTORS
_INT = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@_intrinsic
def from_bfloat16(_context, x):
    def emit(_context, builder, _signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), ir.FloatType())

    return types.float32(types.uint16), emit


@_intrinsic
def to_bfloat16(_context, x):
    """Rounds to nearest, ties to even; NaN stays NaN."""

    def emit(_context, builder, _signature, args):
        bits = builder.bitcast(args[0], _INT)
        odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        rounded = builder.add(bits, builder.add(odd, _INT(0x7FFF)))
        result = builder.trunc(builder.lshr(rounded, _INT(16)), ir.IntType(16))
        return builder.select(
            builder.fcmp_unordered("uno", args[0], args[0]), ir.IntType(16)(0x7FC0), result
        )

    return types.uint16(types.float32), emit


@_intrinsic
def _power_of_two(_context, x):
    """2^x of a whole float32 number from -126 to 127."""

    def emit(_context, builder, _signature, args):
        biased = builder.add(builder.fptosi(args[0], _INT), _INT(127))
        return builder.bitcast(builder.shl(biased, _INT(23)), ir.FloatType())

    return types.float32(types.float32), emit


@_intrinsic
def larger(_context, a, b):
    """The larger of two float32 numbers that are not NaN: unlike `max`, whose NaN has a meaning, it
    vectorises as a reduction."""

    def emit(_context, builder, _signature, args):
        flags = ("nnan", "nsz")
        above = builder.fcmp_ordered(">", args[0], args[1], flags=flags)
        return builder.select(above, args[0], args[1], flags=flags)

    return types.float32(types.float32, types.float32), emit


@_intrinsic
def transpose_square(_context, source, start, width, target, to, target_width):
    """Writes a square of `LANES` x `LANES` 16-bit elements transposed: its first element is number
    `start` of `source`, whose rows are `width` long, and number `to` of `target`."""
    shorts = ir.VectorType(ir.IntType(16), LANES)
    half = LANES // 2
    zips = [[first + i // 2 + i % 2 * LANES for i in range(LANES)] for first in (0, half)]

    def emit(context, builder, signature, args):
        read, written = (_Row(context, builder, signature.args[i], args[i]).data for i in (0, 3))

        def address(data, first, row, step):
            at = builder.add(first, builder.mul(step, step.type(row)))
            return builder.bitcast(builder.gep(data, [at]), shorts.as_pointer())

        rows = [builder.load(address(read, args[1], i, args[2]), align=2) for i in range(LANES)]
        masks = [ir.Constant(ir.VectorType(_INT, LANES), zipped) for zipped in zips]
        for _ in range(LANES.bit_length() - 1):  # each interleaves rows i and i + half
            rows = [
                builder.shuffle_vector(rows[i], rows[i + half], mask)
                for i in range(half)
                for mask in masks
            ]
        for i, row in enumerate(rows):
            builder.store(row, address(written, args[4], i, args[5]), align=2)
        return context.get_dummy_value()

    return types.none(source, start, width, target, to, target_width), emit


def load(x):
    """An element as float32."""
    raise NotImplementedError("for compiled code")


def store(row, i, x):
    """row[i] = x, rounded to nearest even where the row is bfloat16."""
    raise NotImplementedError("for compiled code")


@overload(load, inline="always")
def _load(x):
    if isinstance(x, types.Integer):
        return lambda x: from_bfloat16(x)  # noqa: PLW0108 (numba takes no intrinsic in its place)
    return lambda x: x


@overload(store, inline="always")
def _store(row, i, x):
    if isinstance(row.dtype, types.Integer):

        def bfloat16(row, i, x):
            row[i] = to_bfloat16(np.float32(x))

        return bfloat16

    def single(row, i, x):
        row[i] = x

    return single


@njit(inline="always")
def exp(x):
    """e^x in float32 with a relative error below 2e-6; about 0 below e^-87, finite above e^88."""
    z = min(max(x * LOG2_E, LOWEST), HIGHEST)
    whole = np.floor(z)
    f = z - whole
    # 2^f on [0, 1), the terms of its Taylor series
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * _power_of_two(whole)


def _vector(builder, array, start):
    """Elements start..start+15 of a row as a vector of float32."""
    bits = isinstance(array.type.dtype, types.Integer)
    kind = ir.IntType(16) if bits else ir.FloatType()
    pointer = builder.gep(array.data, [start])
    vector = builder.load(builder.bitcast(pointer, ir.VectorType(kind, LANES).as_pointer()))
    # an element's: a row starts anywhere, and LLVM assumes a vector's own alignment otherwise
    vector.align = 2 if bits else 4
    if not bits:
        return vector
    wide = ir.VectorType(_INT, LANES)
    sixteen = ir.Constant(wide, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(vector, wide), sixteen), _FLOATS)


def _add_product(builder, total, a, b):
    product = builder.fmul(a, b, flags=["contract"])
    builder.store(builder.fadd(product, builder.load(total), flags=["contract"]), total)


class _Row:
    """The memory of an array argument."""

    def __init__(self, context, builder, kind, value):
        self.type = kind
        self.data = arrayobj.make_array(kind)(context, builder, value).data


@_intrinsic
def dot_rows(_context, query, rows, length, out):
    """out[w] = rows[w] . query for w below `length`; rows [W, D] contiguous, D a multiple of
    `UNIT`."""

    def emit(context, builder, signature, args):
        query_row, row, result = (
            _Row(context, builder, signature.args[i], args[i]) for i in (0, 1, 3)
        )
        size = _last_dimension(context, builder, signature.args[1], args[1])
        totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(VECTORS)]
        adds = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        reduce = cgutils.get_or_insert_function(
            builder.module, adds, "llvm.vector.reduce.fadd.v16f32"
        )
        with cgutils.for_range(builder, args[2]) as row_loop:
            begin = builder.mul(row_loop.index, size)
            for total in totals:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
            with cgutils.for_range_slice(builder, size.type(0), size, size.type(UNIT)) as (d, _):
                for number, total in enumerate(totals):
                    at = builder.add(d, size.type(number * LANES))
                    left = _vector(builder, query_row, at)
                    _add_product(
                        builder, total, left, _vector(builder, row, builder.add(begin, at))
                    )
            a, b, c, e = (builder.load(total) for total in totals)
            pairs = builder.fadd(builder.fadd(a, b), builder.fadd(c, e))
            summed = builder.call(reduce, [ir.FloatType()(0.0), pairs], fastmath=("reassoc",))
            builder.store(summed, builder.gep(result.data, [row_loop.index]))
        return context.get_dummy_value()

    return types.none(query, rows, length, out), emit


@_intrinsic
def mix_rows(_context, shares, rows, length, out):
    """out [D] = sum of shares[w] rows[w] over w below `length`; rows [W, D] contiguous, D a
    multiple of `UNIT`."""

    def emit(context, builder, signature, args):
        share, row, result = (_Row(context, builder, signature.args[i], args[i]) for i in (0, 1, 3))
        size = _last_dimension(context, builder, signature.args[1], args[1])
        totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(VECTORS)]
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(UNIT)) as (d, _):
            for total in totals:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
            with cgutils.for_range(builder, args[2]) as row_loop:
                weight = builder.load(builder.gep(share.data, [row_loop.index]))
                spread = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), weight, _INT(0))
                first = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
                spread = builder.shuffle_vector(spread, spread, first)
                begin = builder.add(builder.mul(row_loop.index, size), d)
                for number, total in enumerate(totals):
                    at = builder.add(begin, size.type(number * LANES))
                    _add_product(builder, total, spread, _vector(builder, row, at))
            for number, total in enumerate(totals):
                where = builder.gep(result.data, [builder.add(d, size.type(number * LANES))])
                stored = builder.store(
                    builder.load(total), builder.bitcast(where, _FLOATS.as_pointer())
                )
                stored.align = 4
        return context.get_dummy_value()

    return types.none(shares, rows, length, out), emit


def _last_dimension(context, builder, kind, value):
    shape = arrayobj.make_array(kind)(context, builder, value).shape
    return builder.extract_value(shape, kind.ndim - 1)
