"""Cleaning and tokenising final answers: LaTeX, plain text, and the mixtures of both that models and datasets write."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Unreadable(ValueError):
    """The text is outside the grammar (it may still be mathematics)."""


_UNICODE = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
        "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "−": "-", "–": "-", "∪": r"\cup ", "∈": r"\in ", "√": r"\sqrt ",
        "°": r"^\circ ", "²": "^2", "³": "^3", "±": r"\pm ", "≈": r"\approx ", "＞": ">", "＜": "<", "：": ":", "，": ",",
        "（": "(", "）": ")", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "\u00a0": " ", "％": "%", "½": r"\frac{1}{2}",
    }
)  # fmt: skip
_CONDITION = re.compile(
    r"(?:,\s*)?(?:\\text\s*\{[\s,]*|\b)(?:for (?:all|any|some|every|each)|where|when|if)\b"
    r".*?(?=\\text\s*\{[\s,]*(?:and|or)\b|$)"
)
"""`where ...` and `for all ...` state a condition of the answer, up to the next answer."""
_FIXES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\q?quad"), " "),
    (re.compile(r"\\(?:displaystyle|limits|boxed|fbox|left|right|[bB]igg?[lrm]?)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<=\d)(?:,\\!\s*|\{,\s*\}|\\,(?=\d{3}(?!\d)))(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[!,;: ]|~|&nbsp;"), " "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])"), r"\\deg "),
    (re.compile(r"\^\s*\{?\s*\\(?:text|mathrm|rm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)\b"), ""),
    (re.compile(r"\\(?:d|t|c)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])|>=|=>"), r"\\ge "),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\neq(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\*\*"), "^"),
    (_CONDITION, " "),
    (re.compile(r"^\s*[=:]|[=:]\s*$"), " "),
)  # fmt: skip

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<text>\\(?:text|textbf|textit|textnormal|mbox|mathrm|mathbf|mathbb|rm|operatorname)\s*\{(?P<words>[^{}]*)\})"
    r"|(?P<num>\d+\.\d+|\d+\.(?!\d)|\d+|\.\d+)|(?P<cmd>\\(?:[a-zA-Z]+|[{}|%\\]))|(?P<word>[A-Za-z]+)|(?P<op>[-+*/^_!()\[\]{}|<>=,;:%&.'])"
)  # fmt: skip
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_DAMAGED = re.compile("\f(?=rac)|\t(?=ext|imes|frac|heta|an)|\b(?=oxed|egin|inom)|\r(?=ight|ho)")  # unescaped twice
FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
    "exp", "sqrt", "floor", "ceil", "abs", "min", "max", "gcd",
))  # fmt: skip
UNITS: dict[str, str] = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimeters millimetre millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
        "in": "inch inches", "ft": "ft foot feet", "yd": "yard yards", "mi": "mile miles", "kg": "kg kilogram kilograms",
        "g": "gram grams", "lb": "lb lbs pound pounds", "s": "sec second seconds", "min": "minute minutes",
        "h": "hr hrs hour hours", "day": "day days", "week": "week weeks", "month": "month months", "year": "year years",
        "l": "liter liters litre litres", "ml": "ml milliliter milliliters", "dollar": "dollar dollars usd",
        "cent": "cent cents", "mph": "mph", "kmh": "kmh",
    }.items()
    for alias in aliases.split()
}  # fmt: skip


class Token(NamedTuple):
    kind: str
    text: str
    spaced: bool


def clean(text: str) -> str:
    """The answer with spacing, delimiters and spelling variants of LaTeX removed."""
    if text.isascii():
        if text.isdigit():
            return text
    else:
        text = text.translate(_UNICODE)
    if not text.isprintable():
        text = _DAMAGED.sub(lambda match: repr(match.group())[1:-1].replace("x0c", "f").replace("x08", "b"), text)
    if "\\\\" in text and "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = " ".join(text.split())
    for pattern, replacement in _FIXES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".").strip()


def tokenise(text: str) -> list[Token]:
    """Tokens of a cleaned answer. Raises Unreadable on any character outside the grammar."""
    if "," in text and not any(c in text for c in "([{"):
        text = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), text)  # inside brackets a comma separates
    tokens: list[Token] = []
    at, spaced = 0, False
    while at < len(text):
        if (match := _TOKEN.match(text, at)) is None:
            raise Unreadable(f"unexpected {text[at]!r}")
        at = match.end()
        kind = match.lastgroup or "op"
        if kind == "space":
            spaced = True
            continue
        value = match.group()
        if match.group("text") is not None:
            kind, value = "text", match.group("words").strip()
        tokens += _spell(kind, value, spaced)
        spaced = False
    return tokens


def _spell(kind: str, value: str, spaced: bool) -> list[Token]:
    """Words in their meaning: functions, separators, constants, one letter, or text."""
    if kind == "text":
        inner = value.strip("() ")
        if len(inner) == 1 and inner.isalpha():
            return [Token("var", inner, spaced)]
        if inner in FUNCTIONS:
            return [Token("cmd", "\\" + inner, spaced)]
        if re.fullmatch(r"-?[\d.,]+", value):
            return [] if not value else tokenise(value)
    if kind not in ("word", "text"):
        return [Token(kind, value, spaced)]
    lower = value.lower()
    if lower in ("and", "or"):
        return [Token("op", ",", spaced)]
    if lower in ("pi", "infty", "infinity", "inf"):
        return [Token("cmd", r"\pi" if lower == "pi" else r"\infty", spaced)]
    if lower in ("percent", "percentage", "pct"):
        return [Token("op", "%", spaced)]
    if lower in ("degrees", "degree"):
        return [Token("cmd", r"\deg", spaced)]
    if kind == "text":
        parts = re.split(r"\b(?:and|or)\b", value) if re.search(r"^(?:and|or)\b|\b(?:and|or)$", value) else [value]
        found = [
            token for part in parts for token in ([Token("text", part.strip(" ,"), spaced)], [Token("op", ",", False)])
        ]
        return [t for pair in found[:-1] for t in pair if t.text]
    if value in FUNCTIONS:
        return [Token("cmd", "\\" + value, spaced)]
    if len(value) >= 4 or value in UNITS or value in ("odd", "yes", "no", "the"):
        return [Token("text", value, spaced)]
    return [Token("var", letter, spaced and i == 0) for i, letter in enumerate(value)]
