"""Compares an answer with a reference in this process, in microseconds."""

from __future__ import annotations

from .lexer import squeeze
from .options import Comparison, Options
from .parser import TooDeep, Unreadable, parse
from .rationals import TooBig, Undefined
from .references import MAX_TEXT, Reference, plain_number
from .same import same
from .spelling import with_points


def compare(gold: Reference, answer: str, policy: Options) -> Comparison:
    """Compares an answer with a reference. A degenerate answer is TOO_BIG; no answer raises."""
    answer = answer.strip()
    if gold.number is not None and (number := plain_number(answer)) is not None:
        if number == gold.number:
            return Comparison.EQUAL
        if "." not in answer or "." not in gold.text:
            return Comparison.DIFFERENT  # neither can be a rounded form of the other
    if not answer:
        return Comparison.DIFFERENT
    try:
        if gold.tree is None:
            return _same_text(gold.text, answer)
        outcome = same(gold.tree, parse(answer), policy)
        # A comma is read as a decimal point only where the reference has a decimal point.
        if outcome is Comparison.EQUAL or "." not in gold.text:
            return outcome
        pointed = with_points(answer)
        return outcome if pointed is None else same(gold.tree, parse(pointed), policy)
    except (TooBig, TooDeep, RecursionError, MemoryError, OverflowError):
        return Comparison.TOO_BIG
    except Unreadable:
        # Empty once it is spelled out, or too long to parse: in no case a plain number.
        return _same_text(gold.text, answer) if gold.number is None else Comparison.DIFFERENT
    except Undefined:
        return Comparison.UNKNOWN


def _same_text(gold: str, answer: str) -> Comparison:
    """Compares texts outside the grammar, which are equal only if their tokens are."""
    if len(answer) > MAX_TEXT or len(gold) > MAX_TEXT:
        return Comparison.EQUAL if gold.split() == answer.split() else Comparison.UNKNOWN
    return Comparison.EQUAL if squeeze(gold) == squeeze(answer) else Comparison.UNKNOWN
