"""Reference answers: read from what a data row holds, and proved usable before training."""

from __future__ import annotations

import ast
import re

from .compare import MAX_TEXT, Reference, read_reference
from .extract import boxes, extract

_LONG = 200
"""A longer reference is a whole solution, whose answer is found as in a completion."""
_NO_ANSWER = frozenset(
    ("proof", "notfound", "not found", "none", "null", "nan", "n/a", "-", "?", "", "answer", "see solution")
)
"""What data sets write where a problem has no answer (NuminaMath-1.5: proof, notfound)."""


def read_gold(gold: str) -> Reference:
    """The reference of a data row: an answer, a solution with a box or `#### x`, or a list of answers as JSON writes it."""
    text = _listed(gold.strip())
    if boxes(text) or "####" in text or len(text) > _LONG:
        candidates = extract(text).candidates
        return read_reference(", ".join(candidates[:8]) if candidates and len(candidates) <= 8 else text)
    return read_reference(text)


def _listed(gold: str) -> str:
    """`["$5$", "$-5$"]`, as OlympiadBench has it, is the list 5, -5."""
    if not (gold[:2] in ('["', "['") and gold[-1:] == "]"):
        return gold
    try:
        items = ast.literal_eval(gold)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return gold
    return ", ".join(items) if all(isinstance(item, str) for item in items) and items else gold


def why_no_answer(gold: str) -> str | None:
    """Why a text can be no reference for anything that a model writes; None if it may be one."""
    stripped = gold.strip()
    if not stripped:
        return "it is empty"
    if stripped.casefold().strip(" .") in _NO_ANSWER:
        return f"{stripped[:20]!r} says that there is no answer"
    if len(gold) > 20 * MAX_TEXT:
        return f"it is longer than {20 * MAX_TEXT} characters"
    return None


def rewritings(text: str) -> list[str]:
    """Completions that anyone would mark right, whatever the reference: the text in a box, and spelled in usual other ways."""
    forms = [text, text.strip().rstrip(".") + "."]
    if "$" not in text:
        forms.append(f"${text}$")
    if re.search(r"\\frac(?![A-Za-z])", text):
        forms.append(re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", text))
    if "(" in text and text.count("(") == text.count(")") and "\\left" not in text and "\\text" not in text:
        forms.append(text.replace("(", "\\left(").replace(")", "\\right)"))
    return [f"\\boxed{{{form}}}" for form in dict.fromkeys(forms)]
