"""Which rows of a pass attend to which."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Neighbouring rows that attend to each other, causally, and all of them to a prompt that
    stands elsewhere."""

    start: int
    length: int
    prompt: int = 0
    """The first row of the prompt."""
    before: int = 0
    """Rows of the prompt."""


def spans_between(borders: tuple[int, ...]) -> tuple[Span, ...]:
    """Sequences one behind the other, none of which shares its prompt."""
    return tuple(Span(a, b - a) for a, b in pairwise(borders))
