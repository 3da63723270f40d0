"""LeetCode's linked lists and trees: tests write them as plain lists, and the signature of the
function tells which arguments they are."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..syntax import syntax_tree

HELPERS = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right


def _to_ListNode(values):
    first = None
    for value in reversed(values or ()):
        first = ListNode(value, first)
    return first


def _to_TreeNode(values):
    if not values:
        return None
    nodes = [None if value is None else TreeNode(value) for value in values]
    parents, children = [nodes[0]], iter(nodes[1:])
    for parent in parents:
        parent.left = next(children, None)
        parent.right = next(children, None)
        parents += [child for child in (parent.left, parent.right) if child]
    return nodes[0]


def _from_ListNode(node):
    values = []
    while node is not None and len(values) < 1_000_000:
        values.append(node.val)
        node = node.next
    return values


def _from_TreeNode(node):
    values, level = [], [node]
    for node in level:
        values.append(None if node is None else node.val)
        level += [] if node is None else [node.left, node.right]
        if len(values) > 1_000_000:
            break
    while values and values[-1] is None:
        values.pop()
    return values
"""
"""Code that is run before the model's. The bounds of a million end lists and trees that the model
has made circular."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The node classes in a function's arguments and value: "" for none, else the class, with "*"
    before it for a list of them."""

    arguments: tuple[tuple[str, str], ...] = ()
    """Name and class of each argument."""
    value: str = ""
    in_place: bool = False
    """Whether the function returns nothing, so that its first argument is compared after the
    call."""

    def call(self, callee: str, words: Sequence[str], keywords: Mapping[str, str]) -> str:
        """The source of a call whose value is plain again."""
        forms = dict(self.arguments)
        order = [form for _, form in self.arguments]
        made = [
            _made(word, form)
            for word, form in zip(words, [*order, *[""] * len(words)], strict=False)
        ]
        named = [(key, _made(word, forms.get(key, ""))) for key, word in keywords.items()]
        if self.in_place and (made or named):
            first = made[0] if made else named[0][1]
            rest = ["_first", *made[1:]] if made else [f"{named.pop(0)[0]}=_first"]
            rest += [f"{key}={word}" for key, word in named]
            return _plain(
                f"(lambda _first: ({callee}({', '.join(rest)}), _first)[1])({first})",
                order[0] if order else "",
            )
        words = [*made, *(f"{key}={word}" for key, word in named)]
        return _plain(f"{callee}({', '.join(words)})", self.value)


def _made(word: str, form: str) -> str:
    if form.startswith("*"):
        return f"[_to_{form[1:]}(_each) for _each in {word}]"
    return f"_to_{form}({word})" if form else word


def _plain(source: str, form: str) -> str:
    if form.startswith("*"):
        return f"[_from_{form[1:]}(_each) for _each in {source}]"
    return f"_from_{form}({source})" if form else source


def signature_of(starter: str, name: str) -> Signature:
    """The signature in code such as `class Solution: def f(self, head: Optional[ListNode]) ->
    None:`, with or without a body."""
    function = next((n for n in _functions(starter) if n.name == name), None)
    if function is None:
        return Signature()
    arguments = tuple((a.arg, _form(a.annotation)) for a in function.args.args if a.arg != "self")
    value, in_place = (
        _form(function.returns),
        ast.unparse(function.returns) == "None" if function.returns else False,
    )
    if not in_place and not value and not any(form for _, form in arguments):
        return Signature()
    return Signature(arguments, value, in_place)


def _functions(starter: str) -> list[ast.FunctionDef]:
    lines = starter.rstrip().split("\n")
    indent = len(lines[-1]) - len(lines[-1].lstrip())
    # most starters end with the signature, which is no Python without a body
    for text in (starter, f"{starter.rstrip()}\n{' ' * (indent + 4)}pass\n"):
        try:
            return [n for n in ast.walk(syntax_tree(text)) if isinstance(n, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return []


def _form(annotation: ast.expr | None) -> str:
    if annotation is None:
        return ""
    text = ast.unparse(annotation).strip("'\"")
    name = next((name for name in ("ListNode", "TreeNode") if name in text), "")
    return (
        f"*{name}" if name and text.lower().replace("optional[", "").startswith("list[") else name
    )
