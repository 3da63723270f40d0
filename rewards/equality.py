"""Whether two answers are the same, decided in this process in microseconds where that is certain.

Rationals are compared exactly, other scalars at fixed sample points, and lists, tuples, intervals, inequalities,
equations and matrices by their structure. What cannot be decided is `UNKNOWN` and left to the symbolic back end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Literal

from .evaluate import TooBig, Undefined, Value, real, signature, value, variables
from .latex import UNITS, Node, Unreadable, clean, parse

MAX_ITEMS = 64


class Outcome(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"
    TOO_BIG = "too_big"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What users disagree about; the defaults suit reinforcement learning on MATH-like data."""

    percent: Literal["either", "exact"] = "either"
    """`either`: 10% is 10 as well as 1/10; `exact`: it is 1/10."""
    units: Literal["match", "ignore"] = "match"
    """`match`: known units (cm, kg, dollars, ...) must agree if both sides state one; `ignore`: they never count."""
    unsimplified: Literal["reject", "accept"] = "reject"
    """`reject`: where the reference is a plain number, so must the answer be: 2+3, 17*23 or a sum is no answer to it."""
    chains: Literal["reject", "last"] = "reject"
    """`reject`: an answer `4 = 5` or `x = 4 = 5` is wrong; `last`: its last side counts."""
    list_order: Literal["ignore", "keep"] = "ignore"
    """Whether the order of a bare list counts; tuples in brackets are always ordered."""
    boxes: Literal["agree", "last"] = "agree"
    """`agree`: all final boxes must be right (or be the items of a list); `last`: only the last one counts."""
    rounding: int = 4
    """Significant digits from which a decimal answer may stand for an exact reference that it rounds; 0: never.
    A reference that is itself a decimal of 3 digits or more is taken as rounded."""


Eq = Callable[[Node, Node, Policy], Outcome]


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference answer, parsed once."""

    text: str
    key: str
    tree: Node | None
    number: Fraction | None
    problem: str = ""


_PLAIN = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?\Z")


def plain_number(text: str) -> Fraction | None:
    """An integer or decimal, thousands separators allowed, else None."""
    if len(text) > 400 or _PLAIN.match(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def normal(text: str) -> str:
    """A key that is equal for answers that differ only in spacing, braces of one symbol, and case of words."""
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+|[{}]", "", text).rstrip(".,")


def read_reference(text: str) -> Reference:
    if not (stripped := text.strip()):
        return Reference(text, "", None, None, "it is empty")
    if (number := plain_number(stripped)) is not None:
        return Reference(text, stripped, parse(stripped), number)
    key = normal(clean(stripped[:4000]))
    try:
        return Reference(text, key, parse(stripped), None)
    except Unreadable as error:
        return Reference(text, key, None, None, str(error))


def compare(gold: Reference, answer: str, policy: Policy) -> Outcome:
    """Whether `answer` is the reference."""
    answer = answer.strip()
    if gold.number is not None and (number := plain_number(answer)) is not None and number == gold.number:
        return Outcome.EQUAL
    if not answer:
        return Outcome.DIFFERENT
    if normal(clean(answer[:4000])) == gold.key and len(answer) < 4000:
        return Outcome.EQUAL
    if gold.tree is None:
        return Outcome.UNKNOWN
    try:
        tree = parse(answer)
    except Unreadable:
        return Outcome.UNKNOWN
    try:
        return same(gold.tree, tree, policy)
    except TooBig:
        return Outcome.TOO_BIG
    except (Undefined, OverflowError):
        return Outcome.UNKNOWN


def same(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """Raises TooBig, Undefined."""
    gold, answer = _align_arguments(_whole(gold), _whole(answer))
    gold_side, gold_equation = _right_side(gold, "last")
    side, equation = _right_side(answer, policy.chains)
    if side is None:
        return Outcome.DIFFERENT
    if gold_equation or equation:  # an equation that defines no name is only the same as another equation
        if (
            gold.kind != "rel"
            or answer.kind != "rel"
            or (gold_side is not None and not gold_equation and not variables(gold_side))
        ):
            return Outcome.DIFFERENT
        return _same_equation(gold, answer)
    assert gold_side is not None
    gold, answer = _interval(gold_side), _interval(side)
    if "rel" in (gold.kind, answer.kind):
        if gold.kind == answer.kind:
            return _same_relation(gold, answer, policy)
        return Outcome.UNKNOWN if {gold.kind, answer.kind} & {"group", "union"} else Outcome.DIFFERENT
    gold_items, items = _items(gold), _items(answer)
    if gold_items is not None or items is not None:
        return _same_items(gold, answer, gold_items, items, policy)
    if "text" in (gold.kind, answer.kind):
        return _outcome(gold.kind == answer.kind and _words(gold) == _words(answer))
    if "base" in (gold.kind, answer.kind):
        return _outcome(gold == answer)
    return _same_scalar(gold, answer, policy)


def _outcome(equal: bool) -> Outcome:
    return Outcome.EQUAL if equal else Outcome.DIFFERENT


def _words(node: Node) -> list[str]:
    words = re.findall(r"[^\W_]+", str(node.args[0]).lower())
    return [word for word in words if word not in ("the", "a", "an", "only")]


def _whole(node: Node) -> Node:
    """`x in S` and `{x | condition}` stand for S and the condition."""
    while node.kind in ("member", "such"):
        inner = node.args[1]
        assert isinstance(inner, Node)
        node = inner
    return node


def _is_name(node: Node) -> bool:
    """Something that an equation can define: x, a_n, f(x), AB, |AB|, (x, y), A:B, T(10)."""
    if node.kind == "var":
        return True
    if node.kind == "apply":
        return isinstance(node.args[0], Node) and node.args[0].kind == "var"
    if node.kind == "mul":
        return all(
            isinstance(a, Node) and (_is_name(a) and (a.kind == "mul" or str(a.args[0]).isupper())) for a in node.args
        )
    if node.kind == "call":
        return node.args[0] == "abs" and isinstance(node.args[1], Node) and _is_name(node.args[1])
    if node.kind in ("group", "ratio", "div", "list"):
        return all(_is_name(a) for a in node.args if isinstance(a, Node))
    return False


def _right_side(node: Node, chains: str) -> tuple[Node | None, bool]:
    """(what a statement says, whether it is an equation that defines no name); None for a chain that is refused."""
    if node.kind != "rel":
        return node, False
    ops = str(node.args[0]).split(",")
    sides = [a for a in node.args[1:] if isinstance(a, Node)]
    if "~" in ops:  # `exact = value \approx rounded`: what stands before the sign counts
        cut = ops.index("~")
        if cut == 0 and _is_name(sides[0]):
            return sides[1], False
        if len(sides) == cut + 2 and not _roughly(sides[cut], sides[cut + 1]):
            return None, False
        if cut == 0:
            return sides[0], False
        ops, sides = ops[:cut], sides[: cut + 1]
    if any(op != "=" for op in ops):
        return node, False
    if len(sides) == 1:
        return sides[0], False
    named = _is_name(sides[0])
    if len(sides) == 2:
        if named:
            return sides[1], False
        if variables(node) or chains == "last":
            return (node, True) if variables(node) else (sides[-1], False)
        return None, False
    return (sides[-1], False) if chains == "last" else (None, False)


def _roughly(exact: Node, rounded: Node) -> bool:
    try:
        a, b = real(value(exact, {})), real(value(rounded, {}))
    except (Undefined, KeyError):
        return True
    return abs(a - b) <= 0.05 * max(abs(a), abs(b))


def _align_arguments(gold: Node, answer: Node) -> tuple[Node, Node]:
    """f(z) = z and f(x) = x are the same: the argument is renamed where both sides define a function of one variable."""

    def argument(node: Node) -> str | None:
        if node.kind == "rel" and node.args[0] == "=" and isinstance(lhs := node.args[1], Node) and lhs.kind == "apply":
            inner = lhs.args[1]
            if isinstance(inner, Node) and inner.kind == "var":
                return str(inner.args[0])
        return None

    old, new = argument(answer), argument(gold)
    if old is None or new is None or old == new or new in variables(answer):
        return gold, answer
    return gold, _rename(answer, {old: new})


def _rename(node: Node, names: dict[str, str]) -> Node:
    if node.kind == "var":
        return Node("var", (names.get(str(node.args[0]), node.args[0]),))
    return Node(node.kind, tuple(_rename(a, names) if isinstance(a, Node) else a for a in node.args))


def _difference(node: Node) -> Node:
    left, right = node.args[1], node.args[2]
    assert isinstance(left, Node) and isinstance(right, Node)
    return Node("add", (left, Node("neg", (right,))))


def _same_equation(gold: Node, answer: Node) -> Outcome:
    """a = b and c = d are the same if a - b is a constant multiple of c - d."""
    if len(gold.args) != 3 or len(answer.args) != 3 or variables(gold) != variables(answer):
        return Outcome.UNKNOWN if variables(gold) == variables(answer) else Outcome.DIFFERENT
    ratios: list[complex] = []
    for a, b in zip(signature(_difference(gold)), signature(_difference(answer)), strict=True):
        if a is not None and b is not None and (a != 0 or b != 0):
            if a == 0 or b == 0:
                return Outcome.UNKNOWN
            ratios.append(complex(a) / complex(b))
    if len(ratios) < 2:
        return Outcome.UNKNOWN
    return Outcome.EQUAL if all(abs(r - ratios[0]) <= 1e-9 * abs(ratios[0]) for r in ratios) else Outcome.UNKNOWN


def _interval(node: Node) -> Node:
    """An inequality in one name as its interval; other nodes unchanged."""
    if (
        node.kind == "unit"
        and node.args[1] not in UNITS
        and isinstance(node.args[0], Node)
        and node.args[0].kind != "num"
    ):
        return node
    if node.kind == "list" and all(isinstance(a, Node) and a.kind == "rel" for a in node.args):
        pieces = [_interval(a) for a in node.args if isinstance(a, Node)]
        if all(p.kind == "group" for p in pieces):
            return Node("union", tuple(pieces))
        return node
    if node.kind != "rel":
        return node
    ops = str(node.args[0]).split(",")
    sides = [a for a in node.args[1:] if isinstance(a, Node)]
    if ops[0][0] == ">" and all(op[0] == ">" for op in ops):
        ops, sides = ["<" + op[1:] for op in reversed(ops)], sides[::-1]
    if not all(op[0] == "<" for op in ops):
        return node
    infinite = Node("const", ("infty",))
    if len(sides) == 3 and _is_name(sides[1]) and not _is_name(sides[0]) and not _is_name(sides[2]):
        return Node("group", (("[" if ops[0] == "<=" else "(") + ("]" if ops[1] == "<=" else ")"), sides[0], sides[2]))
    if len(sides) == 2 and _is_name(sides[0]) and not variables(sides[1]):
        return Node("group", ("(" + ("]" if ops[0] == "<=" else ")"), Node("neg", (infinite,)), sides[1]))
    if len(sides) == 2 and _is_name(sides[1]) and not variables(sides[0]):
        return Node("group", (("[" if ops[0] == "<=" else "(") + ")", sides[0], infinite))
    return node


def _items(node: Node) -> list[Node] | None:
    """The items of a collection, +- expanded; None for a scalar."""
    if node.kind == "pm":
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        return [Node("add", (left, right)), Node("add", (left, Node("neg", (right,))))]
    if node.kind in ("list", "set", "group", "union"):
        found: list[Node] = []
        for item in node.args:
            if not isinstance(item, Node):
                continue
            spread = node.kind != "group" and (item.kind == "pm" or (item.kind == "set" and node.kind == "union"))
            found += (_items(item) or []) if spread else [item]
        return found
    if node.kind == "matrix":
        return [cell for row in node.args if isinstance(row, tuple) for cell in row]
    if node.kind == "ratio" and len(node.args) > 2:
        return [a for a in node.args if isinstance(a, Node)]
    return None


def _same_items(
    gold: Node, answer: Node, gold_items: list[Node] | None, items: list[Node] | None, policy: Policy
) -> Outcome:
    if gold_items is None or items is None:  # a single item and a collection of one
        many, one = (items, gold) if gold_items is None else (gold_items, answer)
        if many is not None and len(many) == 1 and "set" in (gold.kind, answer.kind):
            return same(gold, many[0], policy) if gold_items is None else same(many[0], one, policy)
        return Outcome.DIFFERENT
    if len(items) != len(gold_items) or len(items) > MAX_ITEMS:
        return Outcome.DIFFERENT if len(items) <= MAX_ITEMS else Outcome.UNKNOWN
    ordered = {"group", "matrix", "ratio"}
    if gold.kind == answer.kind == "matrix":
        if [len(r) for r in gold.args if isinstance(r, tuple)] != [len(r) for r in answer.args if isinstance(r, tuple)]:
            return Outcome.DIFFERENT
    elif gold.kind == answer.kind == "group":
        if gold.args[0] != answer.args[0]:
            return Outcome.DIFFERENT
    elif "matrix" in (gold.kind, answer.kind) and {gold.kind, answer.kind} <= {"matrix", "group", "list"}:
        matrix = gold if gold.kind == "matrix" else answer
        if max((len(r) for r in matrix.args if isinstance(r, tuple)), default=0) > 1 and len(matrix.args) > 1:
            return Outcome.DIFFERENT
    elif {gold.kind, answer.kind} & ordered and {gold.kind, answer.kind} - ordered - {"list"}:
        return Outcome.DIFFERENT  # {1, 3} is not (1, 3), (1, 3) is no union
    keep = policy.list_order == "keep" and "set" not in (gold.kind, answer.kind) and gold.kind != "pm"
    if {gold.kind, answer.kind} & ordered or (keep and "union" not in (gold.kind, answer.kind)):
        return _all([same(g, a, policy) for g, a in zip(gold_items, items, strict=True)])
    return _same_multiset(gold_items, items, policy)


def _all(outcomes: Sequence[Outcome]) -> Outcome:
    if Outcome.DIFFERENT in outcomes:
        return Outcome.DIFFERENT
    return Outcome.UNKNOWN if Outcome.UNKNOWN in outcomes else Outcome.EQUAL


def _same_multiset(gold: list[Node], answers: list[Node], policy: Policy) -> Outcome:
    names = [[_label(item) for item in side] for side in (gold, answers)]
    if (
        None not in names[0]
        and sorted(map(str, names[0])) == sorted(map(str, names[1]))
        and len({*names[0]}) == len(gold)
    ):
        by_name = dict(zip(names[1], answers, strict=True))
        return _all([same(item, by_name[name], policy) for name, item in zip(names[0], gold, strict=True)])
    left, uncertain = list(answers), False
    for item in gold:
        outcomes = [same(item, other, policy) for other in left]
        if Outcome.EQUAL in outcomes:
            left.pop(outcomes.index(Outcome.EQUAL))
        elif Outcome.UNKNOWN in outcomes:
            uncertain = True
        else:
            return Outcome.DIFFERENT
    return Outcome.UNKNOWN if uncertain else Outcome.EQUAL


def _label(node: Node) -> Node | None:
    """What an item `x = 1` names."""
    if node.kind == "rel" and node.args[0] == "=" and isinstance(name := node.args[1], Node) and _is_name(name):
        return name
    return None


def _same_relation(gold: Node, answer: Node, policy: Policy) -> Outcome:
    def turned(node: Node) -> Node:
        ops = str(node.args[0]).split(",")
        if all(op[0] == ">" for op in ops):
            return Node("rel", (",".join("<" + op[1:] for op in reversed(ops)), *node.args[:0:-1]))
        return node

    gold, answer = turned(gold), turned(answer)
    if gold.args[0] != answer.args[0] or len(gold.args) != len(answer.args):
        return Outcome.UNKNOWN
    pairs = [
        (g, a)
        for g, a in zip(gold.args[1:], answer.args[1:], strict=True)
        if isinstance(g, Node) and isinstance(a, Node)
    ]
    return Outcome.EQUAL if all(same(g, a, policy) is Outcome.EQUAL for g, a in pairs) else Outcome.UNKNOWN


def _same_scalar(gold: Node, answer: Node, policy: Policy) -> Outcome:
    if policy.units == "match" and (a := _unit(gold)) and (b := _unit(answer)) and a != b:
        return Outcome.DIFFERENT
    gold, answer = _bare(gold), _bare(answer)
    if variables(gold) != variables(answer):
        answer = _rename_parameter(gold, answer)
    pairs = [(gold, answer)]
    for kind in ("pct", "deg"):
        if (gold.kind == kind) != (answer.kind == kind) and (kind == "deg" or policy.percent == "either"):
            inner_gold, inner = (_inner(n) if n.kind == kind else n for n in (gold, answer))
            pairs.append((inner_gold, inner))
    outcomes = [_same_value(g, a, policy) for g, a in pairs]
    return Outcome.EQUAL if Outcome.EQUAL in outcomes else outcomes[0]


def _rename_parameter(gold: Node, answer: Node) -> Node:
    """A free integer parameter may have any name: n*pi is k*pi."""
    free, theirs = variables(gold) - variables(answer), variables(answer) - variables(gold)
    if len(free) == len(theirs) == 1 and "pi" in str(gold) and free | theirs <= set("nkmlNKZt"):
        return _rename(answer, {next(iter(theirs)): next(iter(free))})
    return answer


def _bare(node: Node) -> Node:
    while node.kind == "unit":
        node = _inner(node)
    return node


def _inner(node: Node) -> Node:
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
    return _outcome(_close(a, b) or _rounds(gold, answer, a, b, policy))


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
        node = _inner(node)
    if node.kind != "num" or not isinstance(digits := node.args[1], int) or digits < 1:
        return None
    number = node.args[0]
    assert isinstance(number, Fraction)
    return _Decimal(scale * 10.0**-digits, len(str(abs(number.numerator * 10**digits // number.denominator))))


def is_literal(node: Node, integers: bool = False) -> bool:
    """A number as one writes a result: 12, -0.5, 3/4, 1 4/5, 25%, 2 x 10^{-10} (with `integers`: only a whole number)."""
    if node.kind in ("neg", "pct", "deg", "unit"):
        return is_literal(_inner(node), integers)
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
