"""Comparison by sympy, in worker processes only: sums, products, integrals and limits, which cannot
be evaluated directly.

Trees come from our own parser, so that a text is read in one way only. The results of sympy are
evaluated at points, and a difference there decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import sympy

from .tree import Kind, Node, number_of, walk

DIGITS = 30
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}
_FUNCTIONS = {
    "abs": sympy.Abs, "sqrt": sympy.sqrt, "ln": sympy.log, "log": sympy.log, "exp": sympy.exp,
    "factorial": sympy.factorial, "binom": sympy.binomial, "floor": sympy.floor,
    "ceil": sympy.ceiling, "max": sympy.Max, "min": sympy.Min,
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh",
    "cosh", "tanh")},
    **{"arc" + name: getattr(sympy, "a" + name) for name in ("sin", "cos", "tan", "sinh", "cosh",
    "tanh")},
}  # fmt: skip


class NoMeaning(ValueError):
    """A node without a counterpart in sympy."""


def serve() -> Callable[[dict[str, Any]], str]:
    """Returns the function of a worker: from `{"gold": Node, "answer": Node}` to `equal`,
    `different` or `unknown`."""

    def answer(task: dict[str, Any]) -> str:
        try:
            gold, other = (translate(task[side], {}).doit() for side in ("gold", "answer"))
        except (NoMeaning, ValueError, TypeError, NotImplementedError, AttributeError):
            return "unknown"
        return at_points(gold, other)

    return answer


def at_points(gold: Any, answer: Any) -> str:
    """Compares both sides at four points of positive integers and fractions; `unknown` if fewer
    than two have a value."""
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    agreed = 0
    for point in range(4 if names else 1):
        values = {name: _sample(str(name), point) for name in names}
        a, b = (side.subs(values).doit().evalf(DIGITS) for side in (gold, answer))
        if not (a.is_number and b.is_number) or not (a.is_finite and b.is_finite):
            continue
        if abs(a - b) > sympy.Float(10) ** -15 * (1 + abs(a)):
            return "different"
        agreed += 1
    return "equal" if agreed >= (2 if names else 1) else "unknown"


def _sample(name: str, point: int) -> Any:
    seed = zlib.crc32(f"{name}/{point}".encode())
    if point < 3:
        return sympy.Integer(2 + seed % 5 + point)
    return sympy.Rational(300 + seed % 500, 1009)


def translate(node: Node, bound: dict[str, Any]) -> Any:
    """The tree as a sympy expression. Raises NoMeaning."""

    def inner(index: int) -> Any:
        return translate(node.args[index], bound)

    match node.kind:
        case Kind.NUMBER:
            value = number_of(node)
            return sympy.Rational(value.numerator, value.denominator)
        case Kind.NAME:
            return bound.get(str(node.data), sympy.Symbol(str(node.data), positive=True))
        case Kind.CONSTANT:
            return _CONSTANTS[str(node.data)]
        case Kind.SUM | Kind.MIXED:
            return sympy.Add(*(translate(a, bound) for a in node.args))
        case Kind.PRODUCT:
            return sympy.Mul(*(translate(a, bound) for a in node.args))
        case Kind.QUOTIENT:
            return inner(0) / inner(1)
        case Kind.INVERSE:
            return 1 / inner(0)
        case Kind.NEGATIVE:
            return -inner(0)
        case Kind.POWER:
            return inner(0) ** inner(1)
        case Kind.CALL if node.data in _FUNCTIONS:
            return _FUNCTIONS[str(node.data)](*(translate(a, bound) for a in node.args))
        case Kind.APPLY if str(node.args[0].data).isalpha() and node.args[0].data not in (
            "f",
            "g",
            "h",
            "F",
            "G",
            "H",
        ):
            return inner(0) * inner(1)
        case Kind.BIG:
            return _big(node, bound)
    raise NoMeaning(node.kind)


def _big(node: Node, bound: dict[str, Any]) -> Any:
    assert isinstance(node.data, tuple)
    (name, variable), (body, lower, upper) = node.data, node.args
    if not variable:
        raise NoMeaning("no bound variable")
    if any(
        n.kind is Kind.NAME and "_" in str(n.data) and variable in str(n.data).split("_", 1)[1]
        for n in walk(body)
    ):
        raise NoMeaning("a sequence")
    # a Dummy, as the letter may also be a free variable elsewhere
    symbol = sympy.Dummy(variable, **{"integer" if name in ("sum", "prod") else "real": True})
    expression = translate(body, {**bound, variable: symbol})
    if name == "lim":
        # infinity is approached from one side only
        side = "+-" if lower.data != "infty" else "-"
        return sympy.Limit(expression, symbol, translate(lower, bound), side)
    if Kind.LIST in (lower.kind, upper.kind):
        raise NoMeaning("no bounds")
    limits = (symbol, translate(lower, bound), translate(upper, bound))
    operator = {"sum": sympy.Sum, "prod": sympy.Product, "int": sympy.Integral}[name]
    return operator(expression, limits)
