"""Python source as trees and values, read by several threads at once."""

from __future__ import annotations

import ast
from typing import Any


def syntax_tree(source: str) -> ast.Module:
    """`ast.parse`, which some releases of CPython 3.11 and 3.12 let fail where another thread
    parses (gh-106905)."""
    for _ in range(20):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    raise ValueError("the interpreter cannot parse now")


def expression(text: str) -> ast.expr:
    """The tree of one expression. Raises ValueError, or what `ast.parse` raises."""
    body = syntax_tree(text.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        raise ValueError("no expression")
    return body[0].value


def literal(text: str) -> Any:
    """The value of a Python literal. Raises what `ast.literal_eval` does."""
    return ast.literal_eval(expression(text))
