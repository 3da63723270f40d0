"""The statement of a tree (a name and its value, a chain of equations, conditions), and comparisons
of statements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .options import Comparison, Options, outcome
from .rationals import Undefined
from .scalars import amount, is_literal, same_scalar, same_value
from .shapes import NUMBER_SETS, is_name, whole_set
from .tree import Kind, Node, has, negative, number, rename, substitute, variables
from .units import words
from .values import Reading, signature


@dataclass(frozen=True, slots=True)
class Statement:
    """A name and its value, `name = body`. `equation`: the body is an equation that defines no
    name; `false`: it is a chain whose sides differ; `unproved`: whether they do is unknown."""

    body: Node
    name: Node | None = None
    equation: bool = False
    false: bool = False
    unproved: bool = False


def is_expression_of_names(node: Node) -> bool:
    """Whether a node is an expression of names alone, as x + y, m n or a^2 + b^2: what a problem
    asks for."""
    if node.kind in (Kind.SUM, Kind.PRODUCT, Kind.QUOTIENT, Kind.INVERSE):
        return all(
            is_expression_of_names(a.args[0] if a.kind is Kind.NEGATIVE else a) for a in node.args
        )
    if node.kind is Kind.POWER:
        return is_expression_of_names(node.args[0])
    return is_name(node) or node.kind is Kind.CONSTANT


def state(node: Node, take_last: bool, loose: bool) -> Statement:
    """Returns the statement of a tree. `take_last`: a chain counts by its last side, be it true or
    false; `loose`: `x + y = 5` states 5."""
    if node.kind is not Kind.RELATION or not isinstance(node.data, tuple):
        return Statement(whole_set(node))
    signs, sides = list(node.data), list(node.args)
    if signs == ["in"] and is_name(sides[0]):
        return Statement(whole_set(sides[1]), sides[0])
    if any(sign not in ("=", "~") for sign in signs):
        return Statement(node)
    if "~" in signs:
        cut = signs.index("~")
        if len(sides) == 2 and (is_name(sides[0]) or (loose and is_expression_of_names(sides[0]))):
            return Statement(whole_set(sides[1]), sides[0])
        if len(sides) > cut + 1 and not _roughly(sides[cut], sides[cut + 1]):
            return Statement(node, false=True)
        signs, sides = signs[:cut], sides[: cut + 1]
        if len(sides) == 1:
            return Statement(whole_set(sides[0]))
    name: Node | None = None
    computed = len(sides) == 2 or not any(variables(side) for side in sides[1:])
    if is_name(sides[0]) or (loose and computed and is_expression_of_names(sides[0])):
        name, sides = sides[0], sides[1:]
    elif len(sides) == 2 and is_name(sides[1]) and not variables(sides[0]):
        name, sides = sides[1], sides[:1]
    if len(sides) == 1:
        return Statement(whole_set(sides[0]), name)
    if len(sides) == 2 and name is None and variables(node):
        if agree(*sides) is True:  # an identity: (x + 1)(x + 2) = x^2 + 3x + 2
            return Statement(whole_set(sides[1]))
        return Statement(node, equation=True)
    if _is_system(name, sides):
        return Statement(node)
    # A = bh/2 = 12: the formula in the middle cannot be compared with 12
    if name is not None and not variables(sides[-1]):
        sides = [side for side in sides if not variables(side)]
    checks = [] if take_last else [agree(a, b) for a, b in pairwise(sides)]
    return Statement(whole_set(sides[-1]), name, false=False in checks, unproved=None in checks)


def _is_system(name: Node | None, sides: list[Node]) -> bool:
    """Whether a chain relates unknowns without computing one: x/2 = y/3 = z/4."""
    if name is not None:
        return all(is_name(side) and variables(side) for side in sides)
    return len({frozenset(variables(side)) for side in sides if variables(side)}) > 1


def _roughly(exact: Node, rounded: Node) -> bool:
    """Whether a number may stand for another behind an approximation sign; true if that is
    unknown."""
    try:
        a, b = (signature(side, Reading()) for side in (exact, rounded))
    except (Undefined, ArithmeticError):
        return True
    if len(a) != 1 or len(b) != 1 or a[0] is None or b[0] is None:
        return True
    # `42.857 \approx 43` rounds, `7 \approx 5` is a hedge
    return abs(complex(a[0]) - complex(b[0])) <= 0.05 * max(abs(complex(a[0])), abs(complex(b[0])))


def without_declarations(node: Node) -> tuple[Node, tuple[tuple[str, ...], ...]]:
    """Splits a tree into its statement and its conditions: `k\\pi, k \\in \\mathbb{Z}`, `k\\pi
    \\text{ for } k \\in \\mathbb{Z}`."""
    if node.kind is Kind.QUALIFIED:
        inner, conditions = without_declarations(node.args[0])
        assert isinstance(node.data, tuple)
        return inner, (*conditions, node.data)
    if node.kind is Kind.LIST:
        kept = [a for a in node.args if not _declares(a)]
        if 0 < len(kept) < len(node.args):
            conditions = tuple((str(a.args[1].data),) for a in node.args if _declares(a))
            last, more = without_declarations(kept[-1])
            body = last if len(kept) == 1 else Node(Kind.LIST, (*kept[:-1], last))
            return body, (*conditions, *more)
    return node, ()


def _declares(node: Node) -> bool:
    """Whether a node only says in which set a name is, as `k \\in \\mathbb{Z}`."""
    return (
        node.kind is Kind.RELATION
        and node.data == ("in",)
        and node.args[0].kind is Kind.NAME
        and str(node.args[1].data).startswith(NUMBER_SETS)
    )


def same_conditions(
    gold: Node, ours: tuple[tuple[str, ...], ...], theirs: tuple[tuple[str, ...], ...]
) -> Comparison:
    """Compares conditions. One that only declares a letter may be missing on either side."""
    if ours == theirs:
        return Comparison.EQUAL
    if ours and theirs and sorted(map(_essence, ours)) == sorted(map(_essence, theirs)):
        return Comparison.EQUAL
    if is_plain(gold):
        return Comparison.DIFFERENT
    if ours and theirs and len({tuple(sorted(_number_sets(side))) for side in (ours, theirs)}) > 1:
        return Comparison.DIFFERENT
    return (
        Comparison.EQUAL
        if all(_is_declaration(condition) for condition in (*ours, *theirs))
        else Comparison.UNKNOWN
    )


def with_same_parameter(gold: Node, answer: Node, conditions: Sequence[tuple[str, ...]]) -> Node:
    """The answer with its parameter named as the reference's, if a condition declares it: `for some
    integer t`."""
    free, theirs = variables(gold) - variables(answer), variables(answer) - variables(gold)
    if len(free) != 1 or len(theirs) != 1:
        return answer
    (name,), (other,) = free, theirs
    declared = any(
        n in token.split() for condition in conditions for token in condition for n in (name, other)
    )
    return rename(answer, {other: name}) if declared else answer


def _number_sets(conditions: Sequence[object]) -> list[str]:
    return re.findall(r"mathbb [A-Z]|integers?|naturals?|reals?|rationals?", str(conditions))


_FILLER = words("for all any every each some where with when if is are a an the , such that given")


def _essence(condition: tuple[str, ...]) -> list[str]:
    return [word for token in condition for word in token.split() if word not in _FILLER]


def _is_declaration(condition: Sequence[str]) -> bool:
    """Whether a condition only declares a letter, as `where n is an integer` and `for all k in Z`:
    it holds no number, inequality or case."""
    words = [word for token in condition for word in token.split()]
    if any(
        word
        in ("if", "when", "unless", "otherwise", "else", "but", "not", "is", "could", "can", "may")
        for word in words[:1]
    ):
        return False
    return not any(
        re.search(r"\d|[<>=|]|\\(?:le|ge|ne|notin)\b|^(?:if|otherwise|but|not|or|odd|even)$", w)
        for w in words
    )


def names_differ(gold: Node | None, answer: Node | None) -> bool:
    """Whether two statements define different things, as y = 5 and x = 5, or f'(x) and f(x). Names
    in words may differ."""
    if gold is None or answer is None or gold == answer:
        return False
    kinds = {gold.kind, answer.kind}
    if kinds == {Kind.NAME}:  # the solutions of an equation in x are x_1, x_2, ...
        solution = re.fullmatch(r"([xyzt])_[1-4]", str(answer.data))
        return solution is None or solution.group(1) != gold.data
    if kinds == {Kind.NAME, Kind.APPLY}:  # y = 2x and f(x) = 2x
        return "y" not in (gold.data, answer.data)
    return Kind.TEXT not in kinds


def with_same_argument(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Both sides with the same argument if each defines a function of one variable: f(z) = z is
    f(x) = x."""

    def argument(node: Node) -> str | None:
        if node.kind is Kind.RELATION and node.data == ("=",) and node.args[0].kind is Kind.APPLY:
            inner = node.args[0].args[1]
            return str(inner.data) if inner.kind is Kind.NAME else None
        return None

    old, new = argument(answer), argument(gold)
    if old is None or new is None or old == new or new in variables(answer):
        return gold, answer
    return gold, rename(answer, {old: new})


def solves(equation: Node, name: str, solution: Node) -> bool:
    """Whether `solution` solves an equation that is linear in `name`, as 6/x solves xy = 6 for
    y."""
    sides = []
    for shift in range(3):
        value = Node(Kind.SUM, (solution, number(shift)))
        left, right = (substitute(side, name, value) for side in equation.args)
        sides.append(Node(Kind.SUM, (left, negative(right))))
    # the second difference is 0 if the equation is linear in the name
    bend = Node(Kind.SUM, (sides[0], Node(Kind.PRODUCT, (number(-2), sides[1])), sides[2]))
    zero = number(0)
    return same_value(sides[0], zero, None) is same_value(bend, zero, None) is Comparison.EQUAL


def proportional(gold: Node, answer: Node, positive: bool) -> Comparison:
    """Compares two equations or inequalities: the differences of their sides must be a constant
    multiple of each other, for inequalities a positive one."""
    if variables(gold) != variables(answer):
        return Comparison.DIFFERENT
    sides = [Node(Kind.SUM, (n.args[0], negative(n.args[1]))) for n in (gold, answer)]
    reading = Reading.of(gold, answer)
    ratios: list[complex] = []
    for a, b in zip(signature(sides[0], reading), signature(sides[1], reading), strict=True):
        if a is None or b is None:
            continue
        x, y = complex(a), complex(b)
        if abs(x) < 1e-9 or abs(y) < 1e-9:
            if abs(x) > 1e-6 or abs(y) > 1e-6:
                return Comparison.DIFFERENT
            continue
        ratios.append(x / y)
    if len(ratios) < 2:
        return Comparison.UNKNOWN
    if any(abs(r - ratios[0]) > 1e-9 * abs(ratios[0]) for r in ratios):
        return (
            Comparison.UNKNOWN
            if has(gold, Kind.BIG) or has(answer, Kind.BIG)
            else Comparison.DIFFERENT
        )
    return outcome(not positive or ratios[0].real > 0)


def is_plain(node: Node) -> bool:
    """Whether a node is a plain number, with or without a unit."""
    return is_literal(amount(node).core)


def agree(a: Node, b: Node) -> bool | None:
    """Whether two sides of a chain are equal, where the last may be rounded; None if that is
    unknown."""
    try:
        ours, theirs = amount(a), amount(b)
        outcome = same_value(ours.core, theirs.core, Options())
        if outcome is Comparison.DIFFERENT and ours.unit != theirs.unit:
            outcome = same_scalar(a, b, Options(unsimplified="accept"))
    except Undefined:
        return None
    return None if outcome is Comparison.UNKNOWN else outcome is Comparison.EQUAL
