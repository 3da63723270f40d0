"""Reference answers: reads them from data rows, checks that they are usable, and recognises answers
copied from the problem."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..syntax import literal
from .extract import boxes, extract
from .lexer import tokenise
from .parser import TooDeep, Unreadable, parse
from .scalars import amount, is_literal
from .statements import state
from .tree import Kind, Node, negative, number, number_of
from .units import PERCENT

_NAME = re.compile(r"[^\W\d_]{3,}(?:[ '.,-]+[^\W\d_]+\.?)*")
"""A name in words. Of a list of names one is the answer; of numbers or letters all are."""
MAX_TEXT = 4000
"""Most characters of a text outside the grammar that is compared by its tokens."""

_LONG = 200
"""Number of characters from which a reference is a whole solution, whose answer is extracted as
from a completion."""
_NO_ANSWER = frozenset(
    (
        "proof",
        "notfound",
        "not found",
        "none",
        "null",
        "nan",
        "n/a",
        "-",
        "?",
        "",
        "answer",
        "see solution",
    )
)
"""Texts that stand for a missing answer (NuminaMath-1.5: proof, notfound)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference answer. `tree` is None if it cannot be parsed; `problem` then says why."""

    text: str
    tree: Node | None
    problem: str = ""
    number: Fraction | None = None
    """Its value if it is a plain integer or decimal."""


_PLAIN = re.compile(r"[-+]?(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?\Z")


def plain_number(text: str) -> Fraction | None:
    """The value of an integer or decimal, with or without separators of thousands; None for other
    texts."""
    if len(text) > 400 or _PLAIN.match(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def read_reference(text: str) -> Reference:
    if not (stripped := text.strip()):
        return Reference(text, None, "it is empty")
    try:
        return Reference(text, parse(stripped), number=plain_number(stripped))
    except (Unreadable, TooDeep) as error:
        return Reference(text, None, f"it cannot be read: {error}")


def read_gold(gold: str) -> Reference:
    """Returns the reference of a data row: an answer, a solution with a box or `#### x`, or a JSON
    list of answers."""
    # `["$5$", "$-5$"]`, as OlympiadBench has it, is the list 5, -5
    text = ", ".join(_items(gold.strip())) or gold.strip()
    if boxes(text) or "####" in text or len(text) > _LONG:
        candidates = extract(text).candidates
        return read_reference(
            ", ".join(candidates[:8]) if candidates and len(candidates) <= 8 else text
        )
    return read_reference(text)


def _items(gold: str) -> list[str]:
    """The texts of a list written in JSON or Python; empty if the text is no such list."""
    if gold[:2] not in ('["', "['") or gold[-1:] != "]":
        return []
    try:
        items = literal(gold)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return items if all(isinstance(item, str) for item in items) else []


def accepted(gold: str) -> tuple[str, ...]:
    """The answers each of which is right: the names of a list of names, else the reference
    alone."""
    items = _items(gold)
    return tuple(items) if items and all(map(_NAME.fullmatch, items)) else (gold,)


_CHOICE = re.compile(r"^[ \t]*\(?([A-J])[).:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


def as_choice(answer: str, prompt: str) -> str:
    """The letter under which the prompt lists this answer, e.g. C for Rome if it has a line `C.
    Rome`; else the answer."""
    said = answer.strip(" .$").casefold()
    letters = [a for a, text in _CHOICE.findall(prompt) if text.strip(" .$").casefold() == said]
    return letters[0] if len(letters) == 1 else answer


def why_no_answer(gold: str) -> str | None:
    """Why a text cannot be the reference of any answer; None if it can be."""
    stripped = gold.strip()
    if not stripped:
        return "it is empty"
    if stripped.casefold().strip(" .") in _NO_ANSWER:
        return f"{stripped[:20]!r} says that there is no answer"
    if len(gold) > 20 * MAX_TEXT:
        return f"it is longer than {20 * MAX_TEXT} characters"
    return None


def rewritings(text: str) -> list[str]:
    """Completions that are right for any reference: its text in a box, and that text in other usual
    spellings."""
    forms = [text, text.strip().rstrip(".") + "."]
    if "$" not in text:
        forms.append(f"${text}$")
    if re.search(r"\\frac(?![A-Za-z])", text):
        forms.append(re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", text))
    plain = "\\left" not in text and "\\text" not in text
    if plain and text.count("(") == text.count(")") > 0:
        forms.append(text.replace("(", "\\left(").replace(")", "\\right)"))
    return [f"\\boxed{{{form}}}" for form in dict.fromkeys(forms)]


_OPERATORS = frozenset("+-*/^_=<>!")
_FREE = (Kind.TEXT, Kind.CHOICE, Kind.CLOCK, Kind.RUN, Kind.NAME, Kind.BASED)
"""Kinds of answers that can only be given in the problem's own words, e.g. a name."""


def is_copy(reference: Node | None, answer: str, prompt: str) -> bool:
    """Whether `answer`, which equals the reference, merely repeats an expression of the problem, as
    `\\log_2 8` for 3."""
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
    return bool(needle) and _stands_in(
        needle, [token.text for token in tokenise(prompt)], is_literal(theirs)
    )


def _stands_in(needle: list[str], text: list[str], alone: bool) -> bool:
    """Whether `text` holds the tokens `needle` in a row; `alone`: not next to an operator, as part
    of a formula."""
    first, size = needle[0], len(needle)
    for at, token in enumerate(text):
        if token == first and text[at : at + size] == needle:
            around = {*text[max(0, at - 1) : at], *text[at + size : at + size + 1]}
            if not alone or not around & _OPERATORS:
                return True
    return False


def essence(node: Node) -> Node:
    """An answer without its name, its unit and the order of a list, with decimals by value and
    signs in front."""
    body = state(node, True, True).body
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
