"""Pictures whose words come from elsewhere: names of runs, data sets, and parts of a reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def plain_words(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws, in which `$` is a sign like others: matplotlib would take what stands
    between two of them for TeX, and raise for what is none."""

    @wraps(draw)
    def drawn(*arguments: P.args, **keywords: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*arguments, **keywords)

    return drawn
