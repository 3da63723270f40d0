"""Whether two scalars are the same: exactly where both are rational, else at sample points; rounding, units, percent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .lexer import UNITS
from .options import Outcome, Policy
from .parser import Node
from .shapes import rename
from .values import Value, real, signature, variables


def outcome(equal: bool) -> Outcome:
    return Outcome.EQUAL if equal else Outcome.DIFFERENT


def same_scalar(gold: Node, answer: Node, policy: Policy) -> Outcome:
    if policy.units == "match" and (a := _unit(gold)) and (b := _unit(answer)) and a != b:
        return Outcome.DIFFERENT
    gold, answer = _bare(gold), _bare(answer)
    if variables(gold) != variables(answer):
        answer = _rename_parameter(gold, answer)
    pairs = [(gold, answer)]
    for kind in ("pct", "deg"):
        if (gold.kind == kind) != (answer.kind == kind) and (kind == "deg" or policy.percent == "either"):
            inner_gold, inner = (inner_of(n) if n.kind == kind else n for n in (gold, answer))
            pairs.append((inner_gold, inner))
    outcomes = [_same_value(g, a, policy) for g, a in pairs]
    return Outcome.EQUAL if Outcome.EQUAL in outcomes else outcomes[0]


def _rename_parameter(gold: Node, answer: Node) -> Node:
    """A free integer parameter may have any name: n*pi is k*pi."""
    free, theirs = variables(gold) - variables(answer), variables(answer) - variables(gold)
    if len(free) == len(theirs) == 1 and "pi" in str(gold) and free | theirs <= set("nkmlNKZt"):
        return rename(answer, {next(iter(theirs)): next(iter(free))})
    return answer


def _bare(node: Node) -> Node:
    while node.kind == "unit":
        node = inner_of(node)
    return node


def inner_of(node: Node) -> Node:
    inner = node.args[0]
    assert isinstance(inner, Node)
    return inner


def _unit(node: Node) -> str | None:
    return UNITS.get(str(node.args[1]).strip(" .").lower()) if node.kind == "unit" else None


def _same_value(gold: Node, answer: Node, policy: Policy) -> Outcome:
    ours, theirs = signature(gold), signature(answer)
    if len(ours) == 1 and len(theirs) == 1:
        return _same_constant(gold, answer, ours[0], theirs[0], policy)
    count = max(len(ours), len(theirs))  # a variable on one side only: the other side is the same at every point
    ours, theirs = (side * count if len(side) == 1 else side for side in (ours, theirs))
    agreed = disagreed = negative = 0
    for point, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            continue
        if _close(a, b):
            agreed += 1
        elif point == len(ours) - 1:
            negative += 1
        else:
            disagreed += 1
    if disagreed:
        return Outcome.DIFFERENT
    return Outcome.EQUAL if agreed >= 2 and not negative else Outcome.UNKNOWN


def _same_constant(gold: Node, answer: Node, a: Value | None, b: Value | None, policy: Policy) -> Outcome:
    if a is None or b is None:
        return Outcome.UNKNOWN
    if policy.unsimplified == "reject" and is_literal(gold) and isinstance(b, Fraction) and not is_literal(answer):
        return Outcome.DIFFERENT
    return outcome(_close(a, b) or _rounds(gold, answer, a, b, policy))


def _close(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    x, y = complex(a), complex(b)
    if math.isinf(x.real) or math.isinf(y.real):
        return x == y
    return abs(x - y) <= 1e-10 * max(abs(x), abs(y)) or (max(abs(x), abs(y)) < 1e-12 and not (a == 0) ^ (b == 0))


def _rounds(gold: Node, answer: Node, a: Value, b: Value, policy: Policy) -> bool:
    """Whether one is a decimal that the other rounds to."""
    if not policy.rounding:
        return False
    ours, theirs = _decimals(gold), _decimals(answer)
    x, y = real(a), real(b)
    if math.isnan(x) or math.isnan(y) or ours is theirs is None:
        return False
    if ours is not None and ours.significant >= 3:
        if theirs is None:  # the reference is rounded or cut: the exact answer lies within one unit of its last digit
            return not is_literal(answer, integers=True) and abs(x - y) < ours.unit * (1 - 1e-9)
        return theirs.unit < ours.unit and abs(x - y) <= ours.unit / 2 * (1 + 1e-9)
    if ours is None and theirs is not None and not is_literal(gold, integers=True):
        return theirs.significant >= policy.rounding and abs(x - y) <= theirs.unit / 2 * (1 + 1e-9)
    return False


@dataclass(frozen=True, slots=True)
class _Decimal:
    unit: float
    significant: int


def _decimals(node: Node) -> _Decimal | None:
    """The last place and the number of significant digits of a decimal literal."""
    scale = 1.0
    while node.kind in ("neg", "pct", "deg", "unit"):
        scale *= {"pct": 0.01, "deg": math.pi / 180}.get(node.kind, 1.0)
        node = inner_of(node)
    if node.kind != "num" or not isinstance(digits := node.args[1], int) or digits < 1:
        return None
    number = node.args[0]
    assert isinstance(number, Fraction)
    return _Decimal(scale * 10.0**-digits, len(str(abs(number.numerator * 10**digits // number.denominator))))


def is_literal(node: Node, integers: bool = False) -> bool:
    """A number as one writes a result: 12, -0.5, 3/4, 1 4/5, 25%, 2 x 10^{-10} (with `integers`: only a whole number)."""
    if node.kind in ("neg", "pct", "deg", "unit"):
        return is_literal(inner_of(node), integers)
    if integers:
        return node.kind == "num" and node.args[1] == -1
    if node.kind in ("num", "mixed"):
        return True
    if node.kind in ("div", "ratio"):
        return all(isinstance(a, Node) and a.kind in ("num", "neg") and is_literal(a) for a in node.args)
    if node.kind == "mul":
        mantissa, power = node.args
        assert isinstance(mantissa, Node) and isinstance(power, Node)
        return is_literal(mantissa) and mantissa.kind != "mul" and _is_power_of_ten(power)
    return False


def _is_power_of_ten(node: Node) -> bool:
    return node.kind == "pow" and isinstance(base := node.args[0], Node) and base.kind == "num" and base.args[0] == 10
