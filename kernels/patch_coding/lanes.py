"""Instructions that numba does not offer, on one 64-bit word and on 64 elements of an array, one
for each of a word's bits.

Compiled functions are cached between processes. numba notices changes of a function's own file
only: after an edit of this file, `bitstream.py` or `classes.py`, delete `__pycache__/*.nbi`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

from ..kept import KEPT

# Any: it changes the signature of what it decorates in a way that types cannot express
intrinsic: Any = extending.intrinsic

LANES = 64

compiled = njit(nogil=True, cache=KEPT)


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
    """A logical shift: fills with zeros, unlike `>>` of a signed number."""
    return types.int64(types.int64, types.int64), lambda _c, builder, _s, args: builder.lshr(
        args[0], args[1]
    )


@intrinsic
def prefetch(_context, array, index):
    """Prefetches the cache line of an element, for writing."""

    def emit(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # LLVM's arguments: 1 for a write, 3 for the highest locality, 1 for the data cache
        builder.call(call, [address, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def lanes_differ(_context, a, b, start):
    """A word with bit i set if element start + i differs between `a` and `b`, arrays of unsigned
    integers. All 64 elements must exist."""

    def emit(context, builder, signature, args):
        left, right = (
            _load(context, builder, signature.args[i], args[i], args[2]) for i in range(2)
        )
        return _bits(builder, builder.icmp_unsigned("!=", left, right))

    return types.int64(a, b, types.int64), emit


@intrinsic
def lanes_below(_context, a, start, bound):
    """A word with bit i set if element start + i, without its highest bit, is less than the bound.
    All 64 elements must exist."""

    def emit(context, builder, signature, args):
        lanes = _load(context, builder, signature.args[0], args[0], args[1])
        low = ir.Constant(lanes.type, [(1 << lanes.type.element.width - 1) - 1] * LANES)
        return _bits(
            builder,
            builder.icmp_signed(
                "<", builder.and_(lanes, low), _splat(builder, lanes.type, args[2])
            ),
        )

    return types.int64(a, types.int64, types.int64), emit


@intrinsic
def lanes_copy(_context, source, target, start):
    """Copies 64 elements from `start` on; all of them must exist."""

    def emit(context, builder, signature, args):
        lanes = _load(context, builder, signature.args[0], args[0], args[2])
        builder.store(
            lanes, _address(context, builder, signature.args[1], args[1], args[2]), align=1
        )
        return context.get_dummy_value()

    return types.void(source, target, types.int64), emit


def _address(context, builder, array_type, array, start):
    """The address of 64 elements, as that of a vector of so many lanes."""
    # no machine has instructions for 64 lanes: LLVM splits them into those that it has
    assert array_type.layout == "C", "elements have to lie side by side"
    element = context.get_value_type(array_type.dtype)
    data = context.make_array(array_type)(context, builder, array).data
    lanes = ir.VectorType(element, LANES)
    return builder.bitcast(builder.gep(data, [start]), lanes.as_pointer())


def _load(context, builder, array_type, array, start):
    return builder.load(_address(context, builder, array_type, array, start), align=1)


def _splat(builder, lanes, number):
    number = builder.trunc(number, lanes.element) if lanes.element.width < 64 else number
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(
        one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    )


def _bits(builder, flags):
    return builder.bitcast(flags, ir.IntType(LANES))
