"""Parses Python source; safe to use from several threads."""

from __future__ import annotations

import ast
from typing import Any


def syntax_tree(source: str) -> ast.Module:
    """`ast.parse`, repeated where another thread that parses makes it fail, as in some releases of
    CPython 3.11 and 3.12 (gh-106905)."""
    for _ in range(20):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    raise ValueError("the interpreter cannot parse now")


def expression(text: str) -> ast.expr:
    """The tree of a single expression. Raises ValueError, and the errors of `ast.parse`."""
    body = syntax_tree(text.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        raise ValueError("no expression")
    return body[0].value


def literal(text: str) -> Any:
    """The value of a Python literal. Raises the errors of `ast.literal_eval`."""
    return ast.literal_eval(expression(text))
