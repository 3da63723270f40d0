"""The values of trees: exact rationals where that is cheap, else numbers of mpmath at fixed points.

They are computed in floats first, which are fast and overflow early; values that agree are computed
once more in 50 digits, so that no difference is hidden by rounding. Before an integer of more than
`MAX_BITS` is computed, `TooBig` is raised. A node without a value of its own (f(2), a derivative, a
sum) gets a number derived from the values of its parts, so that equal parts give equal numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from .rationals import MAX_BITS, TooBig, Undefined, exact_call, exact_root, integer_power
from .tree import Kind, Node, has, number_of, variables, walk
from .units import Unit, words

POINTS = 10
"""Number of sample points: three in (0, 1), three above 1, an even and an odd integer, two
negative."""
_precise = mpmath.mp.clone()
_precise.dps = 50
_fast = mpmath.fp
Value = Any
"""A Fraction, or a real or complex number of one of mpmath's contexts."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Conventions that two compared trees share.

    `quantities`: names that stand alone on either side, so that `a(b+c)` and AB are products where
    `a` or A is one of them; `real`: variables and roots are real numbers.
    """

    quantities: frozenset[str] = frozenset()
    real: bool = True

    @classmethod
    def of(cls, *trees: Node) -> Reading:
        alone: set[str] = set()
        imaginary = False
        for tree in trees:
            applied = [n.args[0] for n in walk(tree) if n.kind is Kind.APPLY]
            for node in walk(tree):
                if node.kind is Kind.NAME and not any(node is name for name in applied):
                    alone.add(str(node.data))
                imaginary |= node.kind is Kind.CONSTANT and node.data == "i"
        return cls(frozenset(alone), not imaginary)


@lru_cache(maxsize=4096)
def signature(node: Node, reading: Reading) -> tuple[Value | None, ...]:
    """The values of a scalar in floats at every point (only one if it has no variable), None where
    it is undefined. Raises TooBig."""
    return tuple(_value_at(node, point, reading, _fast) for point in _points(node))


def precise(node: Node, point: int, reading: Reading) -> Value | None:
    """The value in 50 digits at one point; None where it is undefined."""
    return _value_at(node, point, reading, _precise)


def _points(node: Node) -> range:
    return range(
        POINTS if variables(node) or has(node, Kind.APPLY, Kind.BIG, Kind.DERIVATIVE) else 1
    )


def _value_at(node: Node, point: int, reading: Reading, context: Any) -> Value | None:
    names = variables(node)
    try:
        real = reading.real and bool(names)
        return _Evaluator(
            {name: sample(name, point) for name in names}, reading, context, real, point
        ).value(node)
    except Undefined:
        return None
    except TooBig:
        if names:
            return None
        raise


def sample(name: str, point: int) -> Fraction:
    # crc32, as `hash` of a string differs between processes
    seed = zlib.crc32(f"{name}/{point}".encode(errors="surrogatepass"))
    if point < 3:
        return Fraction(100 + seed % 800, 1013)
    if point < 6:
        return Fraction(1100 + seed % 2600, 1009)
    if point < 8:
        return Fraction(2 + 2 * (seed % 4) + point % 2)
    return -Fraction(400 + seed % 2600, 997)


def exact(node: Node) -> Fraction | None:
    """The value of a tree without variables if it is rational and exact, else None. Raises
    TooBig."""
    if variables(node):
        return None
    try:
        value = _Evaluator({}, Reading(), _fast, False, 0).value(node)
    except Undefined:
        return None
    return value if isinstance(value, Fraction) else None


class _Evaluator:
    """Computes the value of a tree for given values of its variables. `value` raises Undefined and
    TooBig."""

    def __init__(
        self, env: Mapping[str, Fraction], reading: Reading, context: Any, real: bool, point: int
    ) -> None:
        self.env = env
        self.reading = reading
        self.context = context
        self.real = real
        self.point = point

    def value(self, node: Node) -> Value:
        if (operate := _OPERATIONS.get(node.kind)) is None:
            raise Undefined(node.kind)
        try:
            return self.bounded(operate(self, node))
        except (ZeroDivisionError, ValueError, TypeError, mpmath.libmp.NoConvergence) as error:
            raise Undefined(str(error)) from error
        except (OverflowError, MemoryError) as error:
            raise TooBig(str(error)) from error

    def bounded(self, result: Value) -> Value:
        if isinstance(result, Fraction):
            if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
                raise TooBig("an exact number of too many digits")
            return result
        if self.context.isnan(result):
            raise Undefined("not a number")
        if self.real and isinstance(result, (complex, mpmath.mpc, self.context.mpc)):
            if result.imag != 0 and abs(result.imag) > 1e-12 * abs(result.real):
                raise Undefined("not a real number")
            return result.real
        return result

    def inexact(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return self.context.mpf(value.numerator) / self.context.mpf(value.denominator)
        return value

    def leaf(self, node: Node) -> Value:
        if node.kind is Kind.NUMBER:
            return number_of(node)
        if node.kind in (Kind.NAME, Kind.RUN):
            return self.run(node) if node.kind is Kind.RUN else self.env[str(node.data)]
        if node.data == "infty":
            return self.context.inf
        return {"pi": +self.context.pi, "e": +self.context.e, "i": self.context.mpc(0, 1)}[
            str(node.data)
        ]

    def run(self, node: Node) -> Value:
        """The value of capitals in a row: of AB the product of A and B if either stands alone on
        some side."""
        name = str(node.data)
        if name.isalpha() and any(letter in self.reading.quantities for letter in name):
            product = Fraction(1)
            for letter in name:
                product *= self.env.get(letter, sample(letter, self.point))
            return product
        return self.env[name]

    def sum(self, node: Node) -> Value:
        return self.fold(node.args, Fraction(0), lambda a, b: a + b)

    def product(self, node: Node) -> Value:
        return self.fold(node.args, Fraction(1), lambda a, b: a * b)

    def fold(
        self, args: tuple[Node, ...], start: Fraction, join: Callable[[Any, Any], Any]
    ) -> Value:
        result: Value = start
        for arg in args:
            value = self.value(arg)
            if isinstance(result, Fraction) and isinstance(value, Fraction):
                result = self.bounded(join(result, value))
            else:
                result = join(self.inexact(result), self.inexact(value))
        return result

    def quotient(self, node: Node) -> Value:
        top, bottom = self.value(node.args[0]), self.value(node.args[1])
        if isinstance(top, Fraction) and isinstance(bottom, Fraction):
            return top / bottom
        if bottom == 0:
            raise Undefined("a division by zero")
        return self.inexact(top) / self.inexact(bottom)

    def inverse(self, node: Node) -> Value:
        value = self.value(node.args[0])
        if value == 0:
            raise Undefined("a division by zero")
        return 1 / value

    def negative(self, node: Node) -> Value:
        return -self.value(node.args[0])

    def power(self, node: Node) -> Value:
        base, exponent = node.args
        if base.kind is Kind.CONSTANT and base.data == "e":
            value = self.inexact(self.value(exponent))
            # e^709.8 is the largest float
            if abs(value) > 700 and self.context is _fast:
                raise TooBig("a power of e that overflows")
            return self.context.exp(value)
        return self.raised(self.value(base), self.value(exponent))

    def raised(self, base: Value, exponent: Value) -> Value:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return integer_power(base, exponent.numerator)
            if (root := exact_root(base, exponent.denominator)) is not None:
                return integer_power(root, exponent.numerator)
            if base < 0 and exponent.denominator % 2:  # the real root of a negative number
                magnitude = self.context.power(self.inexact(-base), self.inexact(exponent))
                return -magnitude if exponent.numerator % 2 else magnitude
        base, exponent = self.inexact(base), self.inexact(exponent)
        if base == 0:
            if self.context.re(exponent) > 0:
                return Fraction(0)
            raise Undefined("a power of zero")
        if self.context is _fast and abs(exponent) * abs(math.log(abs(base))) > 700:
            raise TooBig("a power that overflows")
        return self.context.power(base, exponent)

    def quantity(self, node: Node) -> Value:
        value = self.value(node.args[0])
        assert isinstance(node.data, Unit)
        if node.data.dimension == (("angle", 1),):
            # the factor of degrees; that of radians is 1
            return self.inexact(value) * self.context.pi / 180 if node.data.factor < 0.1 else value
        if node.data.dimension == (("part", 1),):
            return value / 100
        return value

    def call(self, node: Node) -> Value:
        name = str(node.data)
        if name in ("factorial", "double factorial"):
            return self.factorial(self.value(node.args[0]), 2 if name.startswith("double") else 1)
        args = [self.value(arg) for arg in node.args]
        if all(isinstance(a, Fraction) for a in args):
            known = exact_call(name, args)
            if known is not None:
                return known
        if name == "sqrt":
            return self.raised(args[0], Fraction(1, 2))
        if name in ("log", "ln", "lg"):
            bases = {"lg": Fraction(10)}
            base = args[1] if len(args) > 1 else bases.get(name)
            logarithm = self.context.ln(self.inexact(args[0]))
            return logarithm if base is None else logarithm / self.context.ln(self.inexact(base))
        if name in ("max", "min") and args:
            return (max if name == "max" else min)(self.inexact(a) for a in args)
        if (function := _FUNCTIONS.get(name)) is None:
            return self.made(node)
        if len(args) != (2 if name == "binom" else 1):
            raise Undefined(f"{name} of {len(args)} arguments")
        return getattr(self.context, function)(*(self.inexact(a) for a in args))

    def factorial(self, n: Value, step: int) -> Value:
        if not isinstance(n, Fraction) or n.denominator != 1:
            if step == 2:
                raise Undefined("a double factorial of no integer")
            return self.context.gamma(self.inexact(n) + 1)
        if n < 0:
            raise Undefined("a factorial of a negative number")
        if n > 3000:
            raise TooBig("a factorial of too many digits")
        if step == 2:
            return Fraction(math.prod(range(int(n), 0, -2)))
        return Fraction(math.factorial(int(n)))

    def apply(self, node: Node) -> Value:
        """The value of a function; of a product, if the name stands alone elsewhere and the
        argument looks like a factor."""
        name, inner = node.args
        letter = str(name.data)
        unsigned = inner.args[0] if inner.kind is Kind.NEGATIVE else inner
        # a number or a name alone is an argument: I(0) is not I times 0
        single = unsigned.kind is Kind.NUMBER or inner.kind is Kind.NAME
        if not single and inner.kind is not Kind.GROUP:
            always = letter in _ALWAYS_FUNCTIONS or not letter.isalpha() or _is_shift(letter, inner)
            quantity = letter in self.reading.quantities or letter not in _FUNCTION_LETTERS
            if quantity and not always:
                value = self.value(inner)
                here = self.env[letter]
                return value * here if isinstance(value, Fraction) else value * self.inexact(here)
        return self.made(node)

    def made(self, node: Node, env: Mapping[str, Fraction] | None = None) -> Value:
        """A number that depends only on the kind of the node and the values of its parts."""
        inner = self
        if env is not None:
            inner = _Evaluator({**self.env, **env}, self.reading, _fast, False, self.point)
        # not the bound variable: the integral of f(x) dx is that of f(t) dt
        what = node.data[0] if isinstance(node.data, tuple) else node.data
        key = f"{self.point}/{node.kind}/{what}/" + ";".join(inner.key(a) for a in node.args)
        return Fraction(1000 + zlib.crc32(key.encode(errors="surrogatepass")) % 1_000_003, 100_003)

    def key(self, node: Node) -> str:
        if node.kind in (Kind.NAME, Kind.RUN) and node.data not in self.env:
            return str(node.data)
        if node.kind is Kind.NAME and node.data in ("d", "partial"):
            return str(node.data)
        if node.kind in (Kind.LIST, Kind.GROUP, Kind.RELATION):
            return f"{node.kind}{node.data}(" + ",".join(self.key(a) for a in node.args) + ")"
        fast = _Evaluator(self.env, self.reading, _fast, False, self.point)
        value = fast.value(node)
        # rounded, as equal parts may differ in their last digits
        return str(value) if isinstance(value, Fraction) else f"{complex(value):.8e}"

    def derivative(self, node: Node) -> Value:
        names = sorted(variables(node))
        key = f"{self.point}/{node}/{[str(self.env[name]) for name in names]}"
        return Fraction(1000 + zlib.crc32(key.encode(errors="surrogatepass")) % 1_000_003, 100_003)

    def big(self, node: Node) -> Value:
        """The number of a sum, product, integral or limit, with the same value for whatever bound
        variable."""
        assert isinstance(node.data, tuple)
        bound = str(node.data[1])
        return self.made(node, {bound: sample("the bound variable", self.point)} if bound else {})


def _is_shift(letter: str, inner: Node) -> bool:
    """Whether `u(t - 2)` is the function u shifted, and not u times a difference."""
    names = variables(inner)
    return letter in _FUNCTION_LETTERS and len(names) == 1 and names <= _ARGUMENTS


_ALWAYS_FUNCTIONS = words("f varphi psi Phi Psi Gamma")
_ARGUMENTS = words("t x z s")
_FUNCTION_LETTERS = words("g h F G H u p q P Q")
"""Letters that are functions if they do not stand alone on either side."""
_FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc",
    "exp": "exp", "abs": "fabs", "floor": "floor",
    "ceil": "ceil", "binom": "binomial", "sgn": "sign", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc", "sinh": "sinh",
    "cosh": "cosh", "tanh": "tanh", "coth": "coth", "sech": "sech", "csch": "csch",
    "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "erf": "erf", "arg": "arg",
    "Re": "re", "Im": "im",
}  # fmt: skip
_OPERATIONS: dict[Kind, Callable[[_Evaluator, Node], Value]] = {
    Kind.NUMBER: _Evaluator.leaf,
    Kind.NAME: _Evaluator.leaf,
    Kind.RUN: _Evaluator.leaf,
    Kind.CONSTANT: _Evaluator.leaf,
    Kind.SUM: _Evaluator.sum,
    Kind.MIXED: _Evaluator.sum,
    Kind.PRODUCT: _Evaluator.product,
    Kind.QUOTIENT: _Evaluator.quotient,
    Kind.RATIO: _Evaluator.quotient,
    Kind.INVERSE: _Evaluator.inverse,
    Kind.NEGATIVE: _Evaluator.negative,
    Kind.POWER: _Evaluator.power,
    Kind.CALL: _Evaluator.call,
    Kind.APPLY: _Evaluator.apply,
    Kind.QUANTITY: _Evaluator.quantity,
    Kind.DERIVATIVE: _Evaluator.derivative,
    Kind.BIG: _Evaluator.big,
}
