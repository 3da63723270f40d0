"""The shape of a parsed answer: names and what they are said to be, inequalities as intervals, items of collections."""

from __future__ import annotations

from .lexer import UNITS
from .parser import Node
from .values import Undefined, real, value, variables


def whole(node: Node) -> Node:
    """`x in S` and `{x | condition}` stand for S and the condition."""
    while node.kind in ("member", "such"):
        inner = node.args[1]
        assert isinstance(inner, Node)
        node = inner
    return node


def is_name(node: Node) -> bool:
    """Something that an equation can define: x, a_n, f(x), AB, |AB|, (x, y), A:B, T(10)."""
    if node.kind == "var":
        return True
    if node.kind == "apply":
        return isinstance(node.args[0], Node) and node.args[0].kind == "var"
    if node.kind == "mul":
        return all(
            isinstance(a, Node) and (is_name(a) and (a.kind == "mul" or str(a.args[0]).isupper())) for a in node.args
        )
    if node.kind == "call":
        return node.args[0] == "abs" and isinstance(node.args[1], Node) and is_name(node.args[1])
    if node.kind in ("group", "ratio", "div", "list"):
        return all(is_name(a) for a in node.args if isinstance(a, Node))
    return False


def right_side(node: Node, chains: str) -> tuple[Node | None, bool]:
    """(what a statement says, whether it is an equation that defines no name); None for a chain that is refused."""
    if node.kind != "rel":
        return node, False
    ops = str(node.args[0]).split(",")
    sides = [a for a in node.args[1:] if isinstance(a, Node)]
    if "~" in ops:  # `exact = value \approx rounded`: what stands before the sign counts
        cut = ops.index("~")
        if cut == 0 and is_name(sides[0]):
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
    named = is_name(sides[0])
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


def align_arguments(gold: Node, answer: Node) -> tuple[Node, Node]:
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
    return gold, rename(answer, {old: new})


def rename(node: Node, names: dict[str, str]) -> Node:
    if node.kind == "var":
        return Node("var", (names.get(str(node.args[0]), node.args[0]),))
    return Node(node.kind, tuple(rename(a, names) if isinstance(a, Node) else a for a in node.args))


def interval(node: Node) -> Node:
    """An inequality in one name as its interval; other nodes unchanged."""
    if (
        node.kind == "unit"
        and node.args[1] not in UNITS
        and isinstance(node.args[0], Node)
        and node.args[0].kind != "num"
    ):
        return node
    if node.kind == "list" and all(isinstance(a, Node) and a.kind == "rel" for a in node.args):
        pieces = [interval(a) for a in node.args if isinstance(a, Node)]
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
    if len(sides) == 3 and is_name(sides[1]) and not is_name(sides[0]) and not is_name(sides[2]):
        return Node("group", (("[" if ops[0] == "<=" else "(") + ("]" if ops[1] == "<=" else ")"), sides[0], sides[2]))
    if len(sides) == 2 and is_name(sides[0]) and not variables(sides[1]):
        return Node("group", ("(" + ("]" if ops[0] == "<=" else ")"), Node("neg", (infinite,)), sides[1]))
    if len(sides) == 2 and is_name(sides[1]) and not variables(sides[0]):
        return Node("group", (("[" if ops[0] == "<=" else "(") + ")", sides[0], infinite))
    return node


def items_of(node: Node) -> list[Node] | None:
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
            found += (items_of(item) or []) if spread else [item]
        return found
    if node.kind == "matrix":
        return [cell for row in node.args if isinstance(row, tuple) for cell in row]
    if node.kind == "ratio" and len(node.args) > 2:
        return [a for a in node.args if isinstance(a, Node)]
    return None


def label(node: Node) -> Node | None:
    """What an item `x = 1` names."""
    if node.kind == "rel" and node.args[0] == "=" and isinstance(name := node.args[1], Node) and is_name(name):
        return name
    return None
