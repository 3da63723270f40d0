"""The shapes of a tree: names, inequalities as intervals, items of collections, words, clock
times."""

from __future__ import annotations

import re
from itertools import pairwise, product

from .options import Comparison, outcome
from .tree import INFINITY, Kind, Node, negative, variables
from .values import exact

NUMBER_SETS = ("mathbb R", "mathbb Z", "mathbb N", "mathbb Q", "mathbb C")
_REAL_LINE = Node(Kind.GROUP, (negative(INFINITY), INFINITY), "()")
_ALL_REALS = (
    "all real numbers",
    "all reals",
    "real numbers",
    "全体实数",
    "一切实数",
    "任意实数",
    "all real values",
)


def is_name(node: Node) -> bool:
    """Whether an equation can define this node: x, a_n, f(x), AB, |AB|, (x, y), A:B, dy/dx,
    \\text{Area}."""
    if node.kind in (Kind.NAME, Kind.RUN, Kind.TEXT, Kind.APPLY, Kind.DERIVATIVE, Kind.CHOICE):
        return True
    if node.kind is Kind.CALL:
        return node.data in (
            "abs",
            "norm",
            "det",
            "arg",
            "Pr",
            "Re",
            "Im",
            "deg",
            "dim",
            "tr",
            "rank",
        ) and is_name(node.args[0])
    if node.kind in (Kind.GROUP, Kind.RATIO, Kind.LIST, Kind.QUOTIENT):
        return all(is_name(a) for a in node.args)
    return node.kind is Kind.BIG


def whole_set(node: Node) -> Node:
    """The interval of a set builder with inequalities in a single name, or of a name of the real
    line; other nodes unchanged."""
    if node.kind is Kind.BUILDER:
        element, condition = node.args
        if element.kind is Kind.RELATION and element.data == ("in",):
            if element.args[1] != Node(Kind.NAME, (), "mathbb R"):
                return node
            element = element.args[0]
        # only of x itself: in {3k | k \in Z} the element counts too
        if element.kind is Kind.NAME:
            interval = as_interval(condition)
            if interval.kind in (Kind.GROUP, Kind.UNION) and variables(condition) == {element.data}:
                return interval
    if node == Node(Kind.NAME, (), "mathbb R") or (
        node.kind is Kind.TEXT and str(node.data).lower() in _ALL_REALS
    ):
        return _REAL_LINE
    return node


def as_interval(node: Node) -> Node:
    """The interval of an inequality in one name, or the union of a list of them; other nodes
    unchanged."""
    if node.kind is Kind.LIST and len(node.args) > 1:
        pieces = [as_interval(a) for a in node.args]
        if not (
            all(p.kind is Kind.GROUP for p in pieces)
            and all(a.kind is Kind.RELATION for a in node.args)
        ):
            return node
        if len({_subject(a) for a in node.args}) > 1:
            return node  # a > 1, b > 4: each says something of its own
        if node.data == "and":
            return _overlap(pieces) or Node(Kind.UNION, tuple(pieces), "intersection")
        return Node(Kind.UNION, tuple(pieces), "union")
    if node.kind is Kind.UNION and node.data == "without":
        return _without_points(node)
    if node.kind is not Kind.RELATION or not isinstance(node.data, tuple):
        return node
    signs, sides = list(node.data), list(node.args)
    if signs == ["in"] and is_name(sides[0]):
        return whole_set(sides[1])
    if all(sign in (">", ">=") for sign in signs):
        signs, sides = ["<" + sign[1:] for sign in reversed(signs)], sides[::-1]
    if not all(sign in ("<", "<=") for sign in signs):
        return node
    left, right = ("[" if signs[0] == "<=" else "("), ("]" if signs[-1] == "<=" else ")")
    if len(sides) == 3 and is_name(sides[1]) and not is_name(sides[0]) and not is_name(sides[2]):
        return Node(Kind.GROUP, (sides[0], sides[2]), left + right)
    if len(sides) == 2 and is_name(sides[0]) and not variables(sides[1]):
        return Node(Kind.GROUP, (negative(INFINITY), sides[1]), "(" + right)
    if len(sides) == 2 and is_name(sides[1]) and not variables(sides[0]):
        return Node(Kind.GROUP, (sides[0], INFINITY), left + ")")
    return node


def _subject(relation: Node) -> Node:
    """The name that an inequality bounds."""
    sides = relation.args
    return sides[1] if len(sides) == 3 or not is_name(sides[0]) else sides[0]


def _overlap(pieces: list[Node]) -> Node | None:
    """The interval in which two opposite half-lines overlap, as of x > 2 and x < 5; None for other
    pieces."""
    if len(pieces) != 2:
        return None
    pieces = sorted(pieces, key=lambda p: p.args[0] == negative(INFINITY))
    right, left = pieces
    lowest = negative(INFINITY)
    if left.args[0] != lowest or right.args[0] == lowest or right.args[1] != INFINITY:
        return None
    return Node(Kind.GROUP, (right.args[0], left.args[1]), str(right.data)[0] + str(left.data)[1])


def _without_points(node: Node) -> Node:
    """The real line without some numbers as a union of open intervals; other nodes unchanged."""
    line, *others = (whole_set(a) for a in node.args)
    if line != _REAL_LINE or len(others) != 1 or others[0].kind is not Kind.SET:
        return node
    points = sorted(((exact(p), p) for p in others[0].args), key=lambda pair: pair[0] or 0)
    if any(value is None for value, _ in points):
        return node
    ends = [negative(INFINITY), *(p for _, p in points), INFINITY]
    return Node(Kind.UNION, tuple(Node(Kind.GROUP, pair, "()") for pair in pairwise(ends)), "union")


def expanded(node: Node) -> list[Node] | None:
    """Both values of a tree that holds `+-`, the one with the upper signs first; None for other
    trees."""
    if not _has_sign(node):
        return None
    return [_signed(node, upper) for upper in (True, False)]


def independent(node: Node) -> list[Node] | None:
    """The values of a tuple whose `+-` are independent of each other, so that (+-1, +-2) has four;
    None for other nodes."""
    signs = sum(_has_sign(a) for a in node.args)
    # at most 2^5 tuples
    if node.kind is not Kind.GROUP or signs < 2 or len(node.args) > 5:
        return None
    choices = [expanded(a) or [a] for a in node.args]
    return [Node(Kind.GROUP, tuple(parts), node.data) for parts in product(*choices)]


def _has_sign(node: Node) -> bool:
    return node.kind is Kind.PLUS_MINUS or (
        node.kind not in (Kind.LIST, Kind.SET, Kind.UNION) and any(_has_sign(a) for a in node.args)
    )


def _signed(node: Node, upper: bool) -> Node:
    if node.kind is Kind.PLUS_MINUS:
        inner = _signed(node.args[0], upper)
        return inner if (node.data == "+-") == upper else negative(inner)
    if not node.args:
        return node
    return Node(node.kind, tuple(_signed(a, upper) for a in node.args), node.data)


def items_of(node: Node) -> list[Node] | None:
    """The items of an unordered collection with `+-` expanded; None for other nodes."""
    if node.kind not in (Kind.LIST, Kind.SET) and not (
        node.kind is Kind.UNION and node.data == "union"
    ):
        return expanded(node)
    items: list[Node] = []
    for item in node.args:
        nested = item.kind is Kind.SET and node.kind is Kind.UNION
        inner = items_of(item) if nested or _has_sign(item) else None
        items += [item] if inner is None else inner
    return items


NO_SOLUTION = (["no", "solution"], ["no", "real", "solution"], ["无解"])
_SPELLED = {"dne": ["does", "not", "exist"], "solutions": ["solution"]}


def words_of(node: Node) -> list[str]:
    """The words of a text in lower case, without articles and with synonyms made equal."""
    words = re.findall(r"[^\W_]+", str(node.data).casefold())
    kept = [word for word in words if word not in ("the", "a", "an", "only")]
    return [part for word in kept for part in _SPELLED.get(word, [word])]


def same_letters(gold: Node, answer: Node) -> Comparison | None:
    """Compares capitals in a row with letters: AB is A, B; another order of letters is another
    answer. None: to be compared by value."""
    if gold.kind is Kind.RUN and answer.kind is Kind.RUN:
        return outcome(gold.data == answer.data)
    run, other = (gold, answer) if gold.kind is Kind.RUN else (answer, gold)
    if other.kind is Kind.TEXT:
        return outcome(words_of(other) == words_of(run))
    names = (Kind.NAME, Kind.CHOICE, Kind.CONSTANT)
    if other.kind is Kind.LIST and all(i.kind in names for i in other.args):
        letters = [str(i.data) for i in other.args]
        choices = all("A" <= c <= "H" for c in letters) and sorted(letters) == letters
        return outcome(choices and "".join(letters) == run.data)
    return None


def same_clock(gold: Node, answer: Node) -> Comparison:
    """Compares clock times: 10:30 AM is 10:30 AM or just 10:30."""
    if gold.kind is answer.kind is Kind.CLOCK:
        return outcome(gold.data == answer.data)
    clock, other = (gold, answer) if gold.kind is Kind.CLOCK else (answer, gold)
    if other.kind is not Kind.RATIO or len(other.args) != 2 or not isinstance(clock.data, int):
        return Comparison.DIFFERENT
    hour, minute = divmod(clock.data, 60)
    hours, minutes = (exact(a) for a in other.args)
    return outcome(minutes == minute and hours in (hour, (hour - 1) % 12 + 1))
