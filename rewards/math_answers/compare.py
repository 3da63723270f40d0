"""Whether an answer is the reference, decided in this process in microseconds where that is
certain."""

from __future__ import annotations

from .lexer import squeeze
from .options import Outcome, Policy
from .parser import TooDeep, Unreadable, parse
from .rationals import TooBig, Undefined
from .references import MAX_TEXT, Reference, plain_number
from .same import same
from .spelling import with_points


def compare(gold: Reference, answer: str, policy: Policy) -> Outcome:
    """Whether `answer` is the reference. A degenerate answer is TOO_BIG, and never raises."""
    answer = answer.strip()
    if gold.number is not None and (number := plain_number(answer)) is not None:
        if number == gold.number:
            return Outcome.EQUAL
        if "." not in answer or "." not in gold.text:
            return Outcome.DIFFERENT  # no decimal that could round the other
    if not answer:
        return Outcome.DIFFERENT
    try:
        if gold.tree is None:
            return _same_text(gold.text, answer)
        outcome = same(gold.tree, parse(answer), policy)
        if outcome is Outcome.EQUAL or "." not in gold.text:  # the reference says what a comma is
            return outcome
        pointed = with_points(answer)
        return outcome if pointed is None else same(gold.tree, parse(pointed), policy)
    except (TooBig, TooDeep, RecursionError, MemoryError, OverflowError):
        return Outcome.TOO_BIG
    except Unreadable:
        return _same_text(gold.text, answer) if gold.number is None else Outcome.DIFFERENT
    except Undefined:
        return Outcome.UNKNOWN


def _same_text(gold: str, answer: str) -> Outcome:
    """An expression outside the grammar equals only one with the same tokens."""
    if len(answer) > MAX_TEXT or len(gold) > MAX_TEXT:
        return Outcome.EQUAL if gold.split() == answer.split() else Outcome.UNKNOWN
    return Outcome.EQUAL if squeeze(gold) == squeeze(answer) else Outcome.UNKNOWN
