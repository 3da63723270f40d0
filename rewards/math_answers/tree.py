"""`Node`: an answer as a tree that keeps the structure as written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction


class Kind(StrEnum):
    """The kind of a node. The comments say what `args` (in brackets) and `data` hold; a kind
    without `data` has None."""

    # scalars
    NUMBER = "number"  # data (Fraction, digits after the point; -1: an integer, or exact)
    NAME = "name"  # a variable, data its spelling with subscript, accent, primes: "x", "a_{n+1}"
    RUN = "run"  # capitals in a row: AB is a segment, BAC an order, RT a product; data the letters
    CONSTANT = "constant"  # data "pi", "e", "i", "infty"
    SUM = "sum"  # (terms)
    PRODUCT = "product"  # (factors)
    INVERSE = "inverse"  # (a): a divisor within a product
    QUOTIENT = "quotient"  # (a, b)
    POWER = "power"  # (base, exponent)
    NEGATIVE = "negative"  # (a)
    MIXED = "mixed"  # (whole, fraction)
    CALL = "call"  # (arguments), data the function
    APPLY = "apply"  # (name, arguments): f(2), which is a product where f is a quantity
    PLUS_MINUS = "plus_minus"  # (a), data "+-" or "-+"
    QUANTITY = "quantity"  # (a), data a Unit
    BASED = "based"  # digits in another base, data (digits, base)
    DERIVATIVE = "derivative"  # (top, bottom) as written in Leibniz's form
    BIG = "big"  # (body, lower, upper), data ("sum" | "prod" | "int" | "lim", bound variable)
    DOTS = "dots"
    # shapes
    LIST = "list"  # (items)
    GROUP = "group"  # (items), data both brackets: "()" a tuple or open interval, "[)" ...
    SET = "set"  # (items)
    BUILDER = "builder"  # (element, condition)
    UNION = "union"  # (parts), data "union", "intersection" or "without"
    RATIO = "ratio"  # (parts)
    MATRIX = "matrix"  # (rows, each a LIST), data "matrix", "vmatrix" or "Vmatrix"
    CASES = "cases"  # (rows, each a LIST of value and condition)
    RELATION = "relation"  # (sides), data the signs between them
    MODULO = "modulo"  # (statement, modulus)
    QUALIFIED = "qualified"  # (statement), data the condition as tokens
    # words
    TEXT = "text"  # data the words
    CHOICE = "choice"  # (content) or (), data the letter
    CLOCK = "clock"  # data minutes after midnight
    VERBATIM = "verbatim"  # outside the grammar: data the tokens


@dataclass(frozen=True, slots=True)
class Node:
    """A node, e.g. `Node(Kind.POWER, (x, two))`. Sums and products are flat, so that depth is the
    depth of brackets."""

    kind: Kind
    args: tuple[Node, ...] = ()
    data: object = None


def number(value: Fraction | int, digits: int = -1) -> Node:
    return Node(Kind.NUMBER, (), (Fraction(value), digits))


def number_of(node: Node) -> Fraction:
    """The value of a NUMBER node."""
    assert isinstance(node.data, tuple)
    value: Fraction = node.data[0]
    return value


def negative(node: Node) -> Node:
    return node.args[0] if node.kind is Kind.NEGATIVE else Node(Kind.NEGATIVE, (node,))


def walk(node: Node) -> Iterator[Node]:
    """All nodes of a tree, the root included."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack += node.args


def has(node: Node, *kinds: Kind) -> bool:
    return any(inner.kind in kinds for inner in walk(node))


def variables(node: Node) -> frozenset[str]:
    return frozenset(str(n.data) for n in walk(node) if n.kind in (Kind.NAME, Kind.RUN))


def rename(node: Node, names: dict[str, str]) -> Node:
    if node.kind is Kind.NAME:
        return Node(Kind.NAME, (), names.get(str(node.data), node.data))
    if not node.args:
        return node
    return Node(node.kind, tuple(rename(a, names) for a in node.args), node.data)


def substitute(node: Node, name: str, value: Node) -> Node:
    """The tree with `value` for every occurrence of a variable."""
    if node.kind is Kind.NAME:
        return value if node.data == name else node
    if not node.args:
        return node
    return Node(node.kind, tuple(substitute(a, name, value) for a in node.args), node.data)


INFINITY = Node(Kind.CONSTANT, (), "infty")
