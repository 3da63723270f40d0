"""The options of the math reward, and the outcomes of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Comparison(StrEnum):
    """The result of a comparison. UNKNOWN: it cannot be decided; TOO_BIG: too big or too deep to
    compute."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"
    TOO_BIG = "too_big"


def outcome(equal: bool) -> Comparison:
    return Comparison.EQUAL if equal else Comparison.DIFFERENT


def all_of(outcomes: Sequence[Comparison]) -> Comparison:
    """The outcome of a comparison all of whose parts must be equal."""
    if Comparison.DIFFERENT in outcomes:
        return Comparison.DIFFERENT
    return Comparison.UNKNOWN if Comparison.UNKNOWN in outcomes else Comparison.EQUAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Conventions on which users differ; the defaults suit reinforcement learning on MATH-like
    data."""

    percent: Literal["either", "exact"] = "either"
    """`either`: 10% is 10 as well as 1/10; `exact`: it is 1/10."""
    units: Literal["match", "ignore"] = "match"
    """`match`: known units (cm, kg, dollars, ...) must agree if both sides state one; `ignore`:
    they never count."""
    unsimplified: Literal["reject", "accept"] = "reject"
    """`reject`: where the reference is a plain number, so must the answer be: 2+3, 17*23 or a sum
    is no answer to it."""
    chains: Literal["reject", "last"] = "reject"
    """`reject`: an answer `4 = 5` or `x = 4 = 5` is wrong; `last`: its last side counts."""
    list_order: Literal["ignore", "keep"] = "ignore"
    """Whether the order of a bare list counts; tuples in brackets are always ordered."""
    boxes: Literal["agree", "last"] = "agree"
    """`agree`: all final boxes must be right (or be the items of a list); `last`: only the last one
    counts."""
    rounding: int = 4
    """Significant digits from which a decimal answer may stand for an exact reference that it
    rounds; 0: never.
    A reference that is itself a decimal of 3 digits or more is taken as rounded."""
