"""Which rows of a pass attend to which."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Consecutive rows of a pass with causal attention among them, and all of them to a prompt
    whose rows are elsewhere in the pass."""

    start: int
    length: int
    prompt: int = 0
    """The prompt's first row."""
    before: int = 0
    """The prompt's number of rows."""


def spans_between(borders: tuple[int, ...]) -> tuple[Span, ...]:
    """One span for each sequence between two cumulative `borders`; none has a shared prompt."""
    return tuple(Span(a, b - a) for a, b in pairwise(borders))
