"""Compares two scalars: exactly if both are rational, else at sample points; with percent, units
and rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .options import Comparison, Options, outcome
from .tree import Kind, Node, has, number, number_of, rename, variables, walk
from .units import DEGREE, PERCENT, Unit, may_be, read_unit, same_count, words
from .values import Reading, Value, exact, precise, signature

PLAIN_POWER = 4
"""Smallest exponent from which a power of ten counts as a number written plainly; below 0 all
do."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A scalar without its unit, and the unit that it states."""

    core: Node
    unit: Unit | None


def amount(node: Node) -> Amount:
    """Splits a scalar into its number and its unit."""
    if node.kind is Kind.QUANTITY:
        inner = amount(node.args[0])
        assert isinstance(node.data, Unit)
        return Amount(inner.core, node.data if inner.unit is None else inner.unit)
    if node.kind is Kind.NEGATIVE and node.args[0].kind is Kind.QUANTITY:
        inner = amount(node.args[0])
        return Amount(Node(Kind.NEGATIVE, (inner.core,)), inner.unit)
    if node.kind not in (Kind.PRODUCT, Kind.SUM) or node.args[-1].kind is not Kind.QUANTITY:
        return Amount(node, None)
    *others, last = node.args
    assert isinstance(last.data, Unit)
    of_last_term = node.kind is Kind.SUM and last.data in (PERCENT, DEGREE)
    if of_last_term or any(has(other, Kind.QUANTITY) for other in others):
        return Amount(node, None)
    return Amount(Node(node.kind, (*others, last.args[0])), last.data)


def same_scalar(gold: Node, answer: Node, policy: Options, computed: bool = False) -> Comparison:
    """Compares two scalars and their units. `computed`: the answer was obtained here by expanding
    `+-`, so that it need not be written as a plain number."""
    ours, theirs = amount(gold), amount(answer)
    if theirs.unit is None and variables(answer) and not variables(ours.core):
        theirs = _lettered(answer) or theirs
    elif theirs.unit is not None and ours.unit is None and variables(gold):
        ours = _lettered(gold) or ours
    if policy.units == "ignore":
        ours = Amount(ours.core, ours.unit if ours.unit in (PERCENT, DEGREE) else None)
        theirs = Amount(theirs.core, theirs.unit if theirs.unit in (PERCENT, DEGREE) else None)
    strict = policy.unsimplified == "reject" and not computed
    # An unevaluated expression, as `\log_2 8` for 3, may be the problem itself copied into the box.
    if strict and is_literal(ours.core) and not is_literal(theirs.core, ours.core):
        return Comparison.DIFFERENT
    return _same_amount(ours, theirs, policy)


def _lettered(node: Node) -> Amount | None:
    """A number times letters that spell a unit, as in `9.8 m/s^2` without an upright font; else
    None."""
    factors = list(_factors(node))
    if node.kind is Kind.QUOTIENT:
        factors = [*_factors(node.args[0]), Node(Kind.INVERSE, (node.args[1],))]
    amount_ = [f for f in factors if not variables(f)]
    spelled = [_spell_unit(f) for f in factors[len(amount_) :]]
    ordered = amount_ == factors[: len(amount_)]
    if not amount_ or not spelled or None in spelled or not ordered:
        return None
    unit = read_unit(" ".join(str(s) for s in spelled))
    if unit is None or not unit.measures:
        return None
    return Amount(amount_[0] if len(amount_) == 1 else Node(Kind.PRODUCT, tuple(amount_)), unit)


def _factors(node: Node) -> tuple[Node, ...]:
    return node.args if node.kind is Kind.PRODUCT else (node,)


def _spell_unit(node: Node) -> str | None:
    if node.kind in (Kind.NAME, Kind.RUN):
        return str(node.data)
    if node.kind is Kind.POWER and node.args[0].kind is Kind.NAME and _integral(node.args[1]):
        return f"{node.args[0].data}^{exact(node.args[1])}"
    if node.kind is Kind.INVERSE:
        inner = _spell_unit(node.args[0])
        return None if inner is None else "/" + inner
    return None


def _same_amount(ours: Amount, theirs: Amount, policy: Options) -> Comparison:
    a, b = ours.unit, theirs.unit
    if a is not None and b is not None and (a.measures or b.measures):
        if a.measures and b.measures:
            if a.dimension != b.dimension:
                return Comparison.DIFFERENT
            if math.isclose(a.factor, b.factor, rel_tol=1e-12):
                return same_value(ours.core, theirs.core, policy)
            return _same_scaled(ours, theirs)
        counted, measured = (b, a) if a.measures else (a, b)
        if not may_be(counted, measured):
            return Comparison.DIFFERENT
        return same_value(ours.core, theirs.core, policy)
    if a is not None and b is not None and not same_count(a, b):
        return Comparison.DIFFERENT
    outcomes = []
    if policy.percent == "either" or PERCENT not in (a, b):
        outcomes.append(same_value(ours.core, theirs.core, policy))
    if a != b and {a, b} & {PERCENT, DEGREE}:  # 10% is 1/10 as well as 10, 180 degrees are pi
        outcomes.append(same_value(_scaled(ours), _scaled(theirs), policy))
    return Comparison.EQUAL if Comparison.EQUAL in outcomes else outcomes[0]


def _scaled(side: Amount) -> Node:
    scaled = side.unit in (PERCENT, DEGREE)
    return Node(Kind.QUANTITY, (side.core,), side.unit) if scaled else side.core


def _same_scaled(ours: Amount, theirs: Amount) -> Comparison:
    """Compares measures in different units of a dimension, as 5 m and 500 cm."""
    assert ours.unit is not None and theirs.unit is not None
    reading = Reading.of(ours.core, theirs.core)
    for x, y in zip(signature(ours.core, reading), signature(theirs.core, reading), strict=False):
        if x is None or y is None:
            return Comparison.UNKNOWN
        a, b = complex(x) * ours.unit.factor, complex(y) * theirs.unit.factor
        if abs(a - b) > 1e-9 * max(abs(a), abs(b)):
            return Comparison.DIFFERENT
    return Comparison.EQUAL


_FREE = words("n k m l j p N K Z t C c A B c_1 c_2 C_1 C_2 K_1 K_2 k_1 k_2")


def rename_parameter(gold: Node, answer: Node) -> Node:
    """The answer with its free parameter named as in the reference: n pi is k pi, x^2 + C is x^2 +
    c."""
    free = (variables(gold) - variables(answer)) & _FREE
    theirs = variables(answer) - variables(gold)
    if len(free) != 1 or len(theirs) != 1 or not theirs <= _FREE:
        return answer
    ours, other = next(iter(free)), next(iter(theirs))
    if ("_" in ours) != ("_" in other):
        return answer
    periodic = Node(Kind.CONSTANT, (), "pi") in walk(gold) and {ours, other} <= set("nkmljpNKZt")
    constant = ours[0] in "cC" or (ours[0] in "kK" and _is_term(gold, ours))
    constant &= other[0] in "cCkK"
    return rename(answer, {other: ours}) if periodic or constant else answer


def _is_term(node: Node, name: str) -> bool:
    return node.kind is Kind.SUM and any(term == Node(Kind.NAME, (), name) for term in node.args)


def same_value(gold: Node, answer: Node, policy: Options | None) -> Comparison:
    """Compares the values of two scalars without units, up to rounding as `policy` allows (None:
    not at all). Raises TooBig."""
    if gold == answer:
        return Comparison.EQUAL
    if gold.kind is answer.kind is Kind.NUMBER:
        if number_of(gold) == number_of(answer):
            return Comparison.EQUAL
        return outcome(
            policy is not None and _rounds(gold, answer, number_of(gold), number_of(answer), policy)
        )
    if has(gold, Kind.DOTS, Kind.TEXT, Kind.VERBATIM) or has(
        answer, Kind.DOTS, Kind.TEXT, Kind.VERBATIM
    ):
        return Comparison.UNKNOWN
    reading = Reading.of(gold, answer)
    ours, theirs = signature(gold, reading), signature(answer, reading)
    if len(ours) == 1 and len(theirs) == 1:
        a, b = ours[0], theirs[0]
        if a is None or b is None:
            return Comparison.UNKNOWN
        if _close(a, b) and _confirmed(gold, answer, 0, reading):
            return Comparison.EQUAL
        return outcome(policy is not None and _rounds(gold, answer, a, b, policy))
    # Sums and integrals have no value here, only a number made of their parts: a difference proves
    # nothing.
    opaque = (
        Comparison.UNKNOWN if has(gold, Kind.BIG) or has(answer, Kind.BIG) else Comparison.DIFFERENT
    )
    # a side without variables has one value, which holds at every point
    count = max(len(ours), len(theirs))
    agreed = []
    for point in range(count):
        a, b = ours[point % len(ours)], theirs[point % len(theirs)]
        # outside the domain of either side there is nothing to compare
        if a is None or b is None:
            continue
        if not _close(a, b):
            return opaque
        agreed.append(point)
    if len(agreed) < 2:
        return Comparison.UNKNOWN
    if not all(
        _confirmed(gold, answer, point, reading) for point in agreed[:: max(1, len(agreed) // 3)]
    ):
        return opaque
    return Comparison.EQUAL


def _confirmed(gold: Node, answer: Node, point: int, reading: Reading) -> bool:
    """Whether two values that agree as floats also agree in 50 digits."""
    a, b = precise(gold, point, reading), precise(answer, point, reading)
    if a is None or b is None:
        return False
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return _close(a, b, 1e-30)


def _close(a: Value, b: Value, tolerance: float = 1e-9) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    x = _inexact(a, b) if isinstance(a, Fraction) else a
    y = _inexact(b, a) if isinstance(b, Fraction) else b
    largest = max(abs(x), abs(y))
    if largest == math.inf:
        return bool(x == y)
    return bool(abs(x - y) <= tolerance * max(largest, 1e-3 if tolerance < 1e-20 else 1e-6))


def _inexact(value: Fraction, like: Value) -> Value:
    """A fraction as a number of the other value's type."""
    if isinstance(like, (float, complex)):
        try:
            return value.numerator / value.denominator
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return like.context.mpf(value.numerator) / like.context.mpf(value.denominator)


def _rounds(gold: Node, answer: Node, a: Value, b: Value, policy: Options) -> bool:
    """Whether one of two numbers is a decimal that rounds the other. A decimal answer to an exact
    reference needs `policy.rounding` significant digits, and the reference must not be a short
    decimal. A decimal reference of three digits or more takes an exact answer within one unit of
    its last place; one of `policy.rounding` digits also takes a finer decimal that rounds to it."""
    if not policy.rounding:
        return False
    ours, theirs = _decimals(gold), _decimals(answer)
    try:
        x, y = _real(a), _real(b)
    except OverflowError:
        return False
    if math.isnan(x) or math.isnan(y) or math.isinf(x) or math.isinf(y):
        return False
    if ours is not None and ours.significant >= 3:
        if theirs is None:  # rounded or cut off: the exact answer is within one unit at the end
            exact_answer = not _integral(answer) and not _terminates(b)
            return exact_answer and abs(x - y) < ours.unit * (1 - 1e-9)
        finer = ours.significant >= policy.rounding and theirs.unit < ours.unit
        return finer and abs(x - y) <= ours.unit / 2 * (1 + 1e-9)
    if ours is None and theirs is not None and not _integral(gold) and not _terminates(a):
        return theirs.significant >= policy.rounding and abs(x - y) <= theirs.unit / 2 * (1 + 1e-9)
    return False


def _terminates(value: Value) -> bool:
    """Whether a number has at most six decimal places, so that it needs no rounding."""
    return isinstance(value, Fraction) and 10**6 % value.denominator == 0


def _real(value: Value) -> float:
    if isinstance(value, Fraction):
        return float(value)
    number = complex(value)
    return number.real if abs(number.imag) <= 1e-9 * max(1.0, abs(number.real)) else math.nan


@dataclass(frozen=True, slots=True)
class _Decimal:
    unit: float
    significant: int


def _decimals(node: Node) -> _Decimal | None:
    """The place value of the last digit and the number of significant digits of a decimal literal;
    None for other nodes."""
    scale = 1.0
    if node.kind is Kind.QUANTITY and node.data in (PERCENT, DEGREE):
        assert isinstance(node.data, Unit)
        scale, node = node.data.factor, node.args[0]
    node = node.args[0] if node.kind is Kind.NEGATIVE else node
    if node.kind is not Kind.NUMBER or not isinstance(node.data, tuple) or node.data[1] < 1:
        return None
    value, digits = node.data
    significant = str(abs(value.numerator * 10**digits // value.denominator))
    return _Decimal(scale * 10.0**-digits, len(significant))


def _integral(node: Node) -> bool:
    """Whether a tree is an integer literal, possibly negative or with a unit."""
    node = node.args[0] if node.kind in (Kind.NEGATIVE, Kind.QUANTITY) else node
    return node.kind is Kind.NUMBER and number_of(node).denominator == 1


def is_literal(node: Node, like: Node | None = None) -> bool:
    """Whether a tree is a number as results are written: 12, -0.5, 3/4, 1 4/5, 25 %, 2 x 10^{-10};
    not 30/6, which is left to work out.

    `like`: the literal of the other side; a number written in the same form counts too.
    """
    if node.kind is Kind.QUANTITY:
        return node.data in (PERCENT, DEGREE) and is_literal(node.args[0], like)
    if node.kind is Kind.NEGATIVE:
        inner = like.args[0] if like is not None and like.kind is Kind.NEGATIVE else like
        return node.args[0].kind is not Kind.NEGATIVE and is_literal(node.args[0], inner)
    if node.kind in (Kind.NUMBER, Kind.MIXED, Kind.CLOCK):
        return True
    if node.kind in (Kind.QUOTIENT, Kind.RATIO):
        if len(node.args) != 2 or not all(_integral(a) or a.kind is Kind.NUMBER for a in node.args):
            return False
        top, bottom = (exact(a) for a in node.args)
        if top is None or not bottom:
            return False
        if bottom == 1 or (top / bottom).denominator != 1:
            return True
        return like is not None and like.kind in (Kind.QUOTIENT, Kind.RATIO)
    if node.kind is Kind.PRODUCT and len(node.args) == 2:
        mantissa, power = node.args
        scaled = mantissa.kind is not Kind.PRODUCT and _power_of_ten(power) is not None
        return scaled and is_literal(mantissa)
    if (exponent := _power_of_ten(node)) is None:
        return False
    written_so = like is not None and like.kind is Kind.POWER
    return exponent < 0 or exponent >= PLAIN_POWER or written_so


def _power_of_ten(node: Node) -> int | None:
    if node.kind is not Kind.POWER or node.args[0] != number(10):
        return None
    if node.args[1].kind not in (Kind.NUMBER, Kind.NEGATIVE):
        return None
    exponent = exact(node.args[1])
    return int(exponent) if exponent is not None and exponent.denominator == 1 else None
