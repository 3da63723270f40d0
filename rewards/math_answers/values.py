"""Values of parsed answers: exact rationals where that is cheap, else complex floats at fixed sample points.

Nothing here grows without bound: an integer beyond `MAX_BITS` raises `TooBig` before it is computed.
"""

from __future__ import annotations

import cmath
import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache

from .parser import Node

MAX_BITS = 40_000
"""Enough for 3000!; multiplying two such integers takes about 0.2 ms."""
POINTS = 7
"""Sample points: four of positive fractions, two of positive integers, one negative."""

Value = Fraction | complex


class TooBig(ArithmeticError):
    """The value cannot be held: an exponent tower, a factorial of a large number, a float that overflows."""


class Undefined(ArithmeticError):
    """No value here: division by zero, a logarithm of 0, or a kind of node that has none."""


@lru_cache(maxsize=4096)
def variables(node: Node) -> frozenset[str]:
    if node.kind == "var":
        return frozenset((str(node.args[0]),))
    found: frozenset[str] = frozenset()
    for arg in _children(node):
        found |= variables(arg)
    return found


def _children(node: Node) -> list[Node]:
    children: list[Node] = []
    for arg in node.args:
        if isinstance(arg, Node):
            children.append(arg)
        elif isinstance(arg, tuple):
            children += [a for a in arg if isinstance(a, Node)]
    return children


@lru_cache(maxsize=4096)
def signature(node: Node) -> tuple[Value | None, ...]:
    """The value of a scalar at every sample point (one entry if it has no variable); None where undefined.

    Raises TooBig.
    """
    names = variables(node)
    if not names:
        try:
            return (value(node, {}),)
        except Undefined:
            return (None,)
    found: list[Value | None] = []
    for point in range(POINTS):
        try:
            found.append(value(node, {name: sample(name, point) for name in names}))
        except (Undefined, TooBig):
            found.append(None)
    return tuple(found)


def sample(name: str, point: int) -> Fraction:
    seed = zlib.crc32(f"{name}/{point}".encode())
    if point < 4:
        return Fraction(400 + seed % 2600, 1000) + Fraction(1, 1013)
    if point < 6:
        return Fraction(2 + seed % 7)
    return -Fraction(400 + seed % 2600, 997)


def value(node: Node, env: Mapping[str, Fraction]) -> Value:
    """Raises Undefined or TooBig."""
    if node.kind == "num":
        number = node.args[0]
        assert isinstance(number, Fraction)
        return number
    if node.kind == "var":
        return env[str(node.args[0])]
    if node.kind == "const":
        return _constant(str(node.args[0]))
    if node.kind == "call":
        name = str(node.args[0])
        return _call(name, [value(a, env) for a in node.args[1:] if isinstance(a, Node)])
    if (operate := _OPERATIONS.get(node.kind)) is None:
        raise Undefined(node.kind)
    try:
        return _bounded(operate(*(value(a, env) for a in node.args if isinstance(a, Node))))
    except (ZeroDivisionError, ValueError) as error:
        raise Undefined(str(error)) from error
    except OverflowError as error:
        raise TooBig(str(error)) from error


def _constant(name: str) -> Value:
    if name == "infty":
        return complex(math.inf)
    return {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}[name]


def _bounded(result: Value) -> Value:
    if isinstance(result, Fraction):
        if result.numerator.bit_length() > MAX_BITS or result.denominator.bit_length() > MAX_BITS:
            raise TooBig("an exact number of too many digits")
    elif cmath.isnan(result):
        raise Undefined("not a number")
    return result


def real(number: Value) -> float:
    """The real value of a number, NaN if it is not real. Raises OverflowError."""
    if isinstance(number, Fraction):
        return float(number)
    return number.real if abs(number.imag) <= 1e-9 * max(1.0, abs(number.real)) else math.nan


def _float(number: Value) -> complex:
    return complex(float(number)) if isinstance(number, Fraction) else number


def _exact(
    operate: Callable[[Fraction, Fraction], Fraction], floats: Callable[[complex, complex], complex]
) -> Callable[[Value, Value], Value]:
    def both(a: Value, b: Value) -> Value:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return operate(a, b)
        return floats(_float(a), _float(b))

    return both


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if size > 1 and abs(exponent.numerator) * (size - 1) > MAX_BITS:
                raise TooBig("a power of too many digits")
            if abs(base) == 1:
                return base if exponent.numerator % 2 else abs(base)
            return Fraction(base**exponent.numerator)
        if (root := _exact_root(base, exponent.denominator)) is not None:
            return _power(root, Fraction(exponent.numerator))
        if base < 0 and exponent.denominator % 2:  # the real root of a negative number
            sign = -1 if exponent.numerator % 2 else 1
            return complex(sign * float(-base) ** float(exponent))
    a, b = _float(base), _float(exponent)
    if a == 0:
        if b.real > 0:
            return complex(0)
        raise Undefined("a power of zero")
    return a**b


def _exact_root(base: Fraction, degree: int) -> Fraction | None:
    if (base < 0 and degree % 2 == 0) or degree > 64:
        return None
    parts = [_integer_root(abs(base.numerator), degree), _integer_root(base.denominator, degree)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(-parts[0] if base < 0 else parts[0], parts[1])


def _integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    elif number.bit_length() > 900:
        return None
    else:
        root = round(number ** (1.0 / degree)) if number else 0
    return root if root**degree == number else None


def _factorial(n: Value) -> Value:
    if isinstance(n, Fraction) and n.denominator == 1:
        if n < 0:
            raise Undefined("factorial of a negative number")
        if n > 3000:
            raise TooBig("a factorial of too many digits")
        return Fraction(math.factorial(n.numerator))
    return complex(math.gamma(real(n) + 1))


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and n >= 0:
        if k < 0 or k > n:
            return Fraction(0)
        if min(k, n - k) * max(n.numerator.bit_length(), 1) > MAX_BITS:
            raise TooBig("a binomial of too many digits")
        return Fraction(math.comb(n.numerator, k.numerator))
    x, y = real(n), real(k)
    return complex(math.gamma(x + 1) / math.gamma(y + 1) / math.gamma(x - y + 1))


def _call(name: str, args: list[Value]) -> Value:
    try:
        if name in ("max", "min", "gcd"):
            if name == "gcd":
                return Fraction(math.gcd(*(int(real(a)) for a in args)))
            return (max if name == "max" else min)(args, key=real)
        if name == "binom":
            return _bounded(_binomial(*args))
        if name == "sqrt":
            return _power(args[0], Fraction(1, 2))
        if name in ("floor", "ceil", "abs"):
            if name == "abs":
                return abs(args[0]) if isinstance(args[0], Fraction) else complex(abs(args[0]))
            if isinstance(args[0], Fraction):
                return Fraction(math.floor(args[0]) if name == "floor" else math.ceil(args[0]))
            return Fraction((math.floor if name == "floor" else math.ceil)(real(args[0])))
        if name in ("log", "ln", "lg"):
            logarithm = cmath.log(_float(args[0]))
            if name == "lg" or len(args) > 1:
                logarithm /= cmath.log(_float(args[1]) if len(args) > 1 else 10)
            return logarithm
        return _bounded(_ELEMENTARY[name](_float(args[0])))
    except (ZeroDivisionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Undefined(f"{name}: {error}") from error
    except OverflowError as error:
        raise TooBig(f"{name}: {error}") from error


_ELEMENTARY: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
}  # fmt: skip
_multiply = _exact(lambda a, b: a * b, lambda a, b: a * b)
_add = _exact(lambda a, b: a + b, lambda a, b: a + b)
_divide = _exact(lambda a, b: a / b, lambda a, b: a / b)
_OPERATIONS: dict[str, Callable[..., Value]] = {
    "add": _add,
    "mixed": _add,
    "mul": _multiply,
    "apply": _multiply,
    "div": _divide,
    "pow": _power,
    "neg": lambda a: -a,
    "fact": _factorial,
    "deg": lambda a: _multiply(a, complex(math.pi / 180)),
    "pct": lambda a: _divide(a, Fraction(100)),
    "unit": lambda a: a,
    "ratio": _divide,
}
