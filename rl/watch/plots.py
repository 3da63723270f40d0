"""Pictures whose words come from elsewhere: names of runs, data sets, and parts of a reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def plain_words(draw: Callable[P, T]) -> Callable[P, T]:
    """A decorator for functions that draw, within which `$` is an ordinary character: matplotlib
    would read the text between two of them as TeX, and raise if it is not valid."""

    @wraps(draw)
    def drawn(*arguments: P.args, **keywords: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*arguments, **keywords)

    return drawn
