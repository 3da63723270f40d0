"""Whether an answer was copied from the problem: it stands there, and is not how the reference is written."""

from __future__ import annotations

from .lexer import tokenise
from .parser import TooDeep, Unreadable, parse
from .scalars import amount, is_literal
from .shapes import state
from .tree import Kind, Node, negative, number, number_of
from .units import PERCENT

_OPERATORS = frozenset("+-*/^_=<>!")
_FREE = (Kind.TEXT, Kind.CHOICE, Kind.CLOCK, Kind.RUN, Kind.NAME, Kind.BASED)
"""What a problem names, and an answer must name as well."""


def is_copy(reference: Node | None, answer: str, prompt: str) -> bool:
    """Whether `answer`, which equals the reference, only repeats the problem, e.g. `\\log_2 8` for 3."""
    if reference is None or not prompt:
        return False
    try:
        tree = parse(answer)
    except (Unreadable, TooDeep):
        return False
    ours, theirs = essence(reference), essence(tree)
    percent = amount(tree).unit is PERCENT and amount(reference).unit is not PERCENT
    if (ours == theirs and not percent) or theirs.kind in _FREE:
        return False
    needle = [token.text for token in tokenise(answer)]
    while needle and needle[-1] in (".", ",", ";"):
        needle.pop()
    return bool(needle) and _stands_in(needle, [token.text for token in tokenise(prompt)], is_literal(theirs))


def _stands_in(needle: list[str], text: list[str], alone: bool) -> bool:
    """Whether a text has these tokens in a row (`alone`: not as a part of a formula)."""
    first, size = needle[0], len(needle)
    for at, token in enumerate(text):
        if token == first and text[at : at + size] == needle:
            around = {*text[max(0, at - 1) : at], *text[at + size : at + size + 1]}
            if not alone or not around & _OPERATORS:
                return True
    return False


def essence(node: Node) -> Node:
    """An answer without the name, the unit and the order of a list; decimals by their value, signs in front."""
    body = state(node, lambda a, b: True, True, True).body
    core = amount(body).core
    if core.kind is Kind.NUMBER:
        return number(number_of(core))
    if core.kind is Kind.QUOTIENT and core.args[0].kind is Kind.NEGATIVE:
        return essence(negative(Node(Kind.QUOTIENT, (core.args[0].args[0], core.args[1]))))
    if core.kind in (Kind.LIST, Kind.SET, Kind.UNION, Kind.GROUP):
        parts = sorted((essence(a) for a in core.args), key=repr)
        return Node(
            Kind.LIST if core.kind is not Kind.GROUP else Kind.GROUP,
            tuple(parts),
            core.data if core.kind is Kind.GROUP else None,
        )
    return Node(core.kind, tuple(essence(a) for a in core.args), core.data) if core.args else core
