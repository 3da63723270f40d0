"""Whether two answers are the same, decided in this process in microseconds where that is certain.

Rationals are compared exactly, other scalars at fixed sample points, and lists, tuples, intervals, inequalities,
equations and matrices by their structure. What cannot be decided is `UNKNOWN` and left to the symbolic back end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .lexer import Unreadable, clean
from .options import Outcome, Policy
from .parser import Node, parse
from .scalars import outcome, same_scalar
from .shapes import align_arguments, interval, items_of, label, right_side, whole
from .values import TooBig, Undefined, signature, variables

MAX_ITEMS = 64


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
    gold, answer = align_arguments(whole(gold), whole(answer))
    gold_side, gold_equation = right_side(gold, "last")
    side, equation = right_side(answer, policy.chains)
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
    gold, answer = interval(gold_side), interval(side)
    if "rel" in (gold.kind, answer.kind):
        if gold.kind == answer.kind:
            return _same_relation(gold, answer, policy)
        return Outcome.UNKNOWN if {gold.kind, answer.kind} & {"group", "union"} else Outcome.DIFFERENT
    gold_items, items = items_of(gold), items_of(answer)
    if gold_items is not None or items is not None:
        return _same_items(gold, answer, gold_items, items, policy)
    if "text" in (gold.kind, answer.kind):
        return outcome(gold.kind == answer.kind and _words(gold) == _words(answer))
    if "base" in (gold.kind, answer.kind):
        return outcome(gold == answer)
    return same_scalar(gold, answer, policy)


def _words(node: Node) -> list[str]:
    words = re.findall(r"[^\W_]+", str(node.args[0]).lower())
    return [word for word in words if word not in ("the", "a", "an", "only")]


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
    names = [[label(item) for item in side] for side in (gold, answers)]
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
