"""Exact arithmetic of rationals of bounded size: powers, roots, and functions with rational
values."""

from __future__ import annotations

import math
from fractions import Fraction

MAX_BITS = 40_000
"""Largest size of an integer in bits: enough for 3000!, and two of them multiply in about 0.2
ms."""


class TooBig(ArithmeticError):
    """The value is too big to compute: a tower of powers, a factorial of a large number, a float
    overflow."""


class Undefined(ArithmeticError):
    """The node has no value: a division by zero, a root of a negative number among reals, or a kind
    of node without values."""


def integer_power(base: Fraction, exponent: int) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size > 1 and abs(exponent) * (size - 1) > MAX_BITS:
        raise TooBig("a power of too many digits")
    if abs(base) == 1:
        return base if exponent % 2 else abs(base)
    return Fraction(base**exponent)


def exact_root(base: Fraction, degree: int) -> Fraction | None:
    if (base < 0 and degree % 2 == 0) or degree > 64:
        return None
    top = _integer_root(abs(base.numerator), degree)
    bottom = _integer_root(base.denominator, degree)
    if top is None or bottom is None:
        return None
    return Fraction(-top if base < 0 else top, bottom)


def _integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    # floats end at 1024 bits
    elif number.bit_length() > 900:
        return None
    else:
        root = round(number ** (1.0 / degree)) if number else 0
    return root if root**degree == number else None


def exact_call(name: str, args: list[Fraction]) -> Fraction | None:
    if name == "abs" and len(args) == 1:
        return abs(args[0])
    if name in ("floor", "ceil") and len(args) == 1:
        return Fraction(math.floor(args[0]) if name == "floor" else math.ceil(args[0]))
    if name in ("max", "min") and args:
        return max(args) if name == "max" else min(args)
    if all(a.denominator == 1 for a in args):
        if name in ("gcd", "lcm") and args:
            return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(a) for a in args)))
        if name == "binom" and len(args) == 2 and args[0] >= 0:
            n, k = int(args[0]), int(args[1])
            if min(k, n - k) * max(n.bit_length(), 1) > MAX_BITS:
                raise TooBig("a binomial of too many digits")
            return Fraction(math.comb(n, k)) if 0 <= k <= n else Fraction(0)
    return None
