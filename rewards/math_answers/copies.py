"""Whether an answer was copied from the problem: it stands there, and is not how the reference is written."""

from __future__ import annotations

from .lexer import squeeze
from .parser import TooDeep, Unreadable, parse
from .scalars import amount, is_literal
from .shapes import state
from .tree import Kind, Node, negative, number, number_of
from .units import PERCENT

_OPERATORS = "+-*/^_=<>!"
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
    needle = squeeze(answer).strip(".,;")
    if not needle:
        return False
    return _stands_in(needle, squeeze(prompt), is_literal(theirs))


def _stands_in(needle: str, text: str, alone: bool) -> bool:
    """Whether a text has these tokens, not as a part of longer ones (`alone`: nor as a part of a formula)."""
    forbidden = _OPERATORS if alone else ""
    at = text.find(needle)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(needle) : at + len(needle) + 1]
        cut = (before.isalnum() and needle[0].isalnum() and before.isdigit() == needle[0].isdigit()) or (
            after.isdigit() and needle[-1].isdigit()
        )
        if not cut and (not before or before not in forbidden) and (not after or after not in forbidden):
            return True
        at = text.find(needle, at + 1)
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
