"""Near misses of reference answers: one brace moved, or one change of value. Deterministic."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\s+|\d|[^\s]")
_SWAPS = {
    "\\sin": "\\cos", "\\cos": "\\sin", "\\tan": "\\cot", "\\cot": "\\tan", "\\sec": "\\csc",
    "\\csc": "\\sec", "\\ln": "\\lg", "\\log": "\\sin", "\\arctan": "\\tan", "\\arcsin": "\\arccos",
    "\\arccos": "\\arcsin", "\\lfloor": "\\lceil", "\\rfloor": "\\rceil", "\\cup": "\\cap",
    "\\le": "<", "\\leq": "<", "\\ge": ">", "\\geq": ">", "\\pi": "e", "\\alpha": "\\beta",
    "\\theta": "\\phi", "\\omega": "\\Omega", "<": "\\le", ">": "\\ge", "\\infty": "0",
    "\\sinh": "\\sin", "\\cosh": "\\cos", "\\in": "\\notin", "\\pm": "+", "\\sqrt": "",
    "\\lbrace": "(", "x": "y", "n": "m", "a": "b", "k": "n", "t": "s", "i": "j",
}  # fmt: skip
_BRACKETS = {"(": "[", "[": "(", ")": "]", "]": ")"}
Mutation = tuple[str, str]


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def brace_moves(text: str) -> Iterator[Mutation]:
    """Every balanced text with one brace moved by one token or, for a group, over its whole
    neighbour."""
    parts = tokens(text)
    for at, part in enumerate(parts):
        if part not in ("{", "}"):
            continue
        rest = parts[:at] + parts[at + 1 :]
        for step in (-3, -2, -1, 1, 2, 3):
            to = at + step
            if not 0 <= to <= len(rest):
                continue
            moved = [*rest[:to], part, *rest[to:]]
            if moved != parts and _balanced(moved) and "".join(moved) != text:
                yield "brace", "".join(moved)
    yield from _groups_opened(parts)


def _groups_opened(parts: list[str]) -> Iterator[Mutation]:
    """A superscript's or a root's group cut to its first token: `2^{n+1}` becomes `2^n+1`."""
    for at, part in enumerate(parts):
        if part == "{" and at and (parts[at - 1] in ("^", "_", "\\sqrt")):
            end = _closing(parts, at)
            inner = parts[at + 1 : end]
            if len(inner) > 1 and "{" not in inner:
                yield "brace", "".join([*parts[:at], *inner, *parts[end + 1 :]])


def _closing(parts: list[str], at: int) -> int:
    depth = 0
    for index in range(at, len(parts)):
        depth += (parts[index] == "{") - (parts[index] == "}")
        if depth == 0:
            return index
    return len(parts) - 1


def _balanced(parts: list[str]) -> bool:
    depth = 0
    for part in parts:
        depth += (part == "{") - (part == "}")
        if depth < 0:
            return False
    return depth == 0


def value_changes(text: str) -> Iterator[Mutation]:
    """Every single change of a digit, sign, exponent, order, function, factor, bracket or
    relation."""
    parts = tokens(text)
    yield from _digits(parts)
    yield from _signs(parts)
    yield from _names(parts)
    yield from _exponents(parts)
    yield from _orders(text, parts)
    yield from _factors(text, parts)
    yield from _deletions(parts)


def _with(parts: list[str], at: int, new: str) -> str:
    spaced = new + " " if re.search(r"\\[a-zA-Z]+\Z", new) else new
    return "".join([*parts[:at], spaced, *parts[at + 1 :]])


def _digits(parts: list[str]) -> Iterator[Mutation]:
    for at, part in enumerate(parts):
        if part.isdigit():
            yield "digit", _with(parts, at, str((int(part) + 1) % 10))
            yield "digit", _with(parts, at, str((int(part) + 5) % 10))
            yield "digit inserted", _with(parts, at, part + "7")


def _signs(parts: list[str]) -> Iterator[Mutation]:
    text = "".join(parts)
    if not text.startswith("\\text"):
        yield "sign", text[1:] if text.startswith("-") else "-" + text
    for at, part in enumerate(parts):
        if part in "+-" and at:
            yield "sign", _with(parts, at, "-" if part == "+" else "+")
            yield "operator", _with(parts, at, "\\cdot")
        if part in ("\\cdot", "\\times", "*"):
            yield "operator", _with(parts, at, "+")
        if part == "/":
            yield "operator", _with(parts, at, "\\cdot")


def _names(parts: list[str]) -> Iterator[Mutation]:
    text, hidden = "".join(parts), _in_words(parts)
    for at, part in enumerate(parts):
        if at not in hidden and part in _SWAPS:
            yield "name", _with(parts, at, _SWAPS[part])
        if at not in hidden and part in _BRACKETS and "," in text:
            yield "bracket", _with(parts, at, _BRACKETS[part])


def _in_words(parts: list[str]) -> set[int]:
    """Where the tokens of `\\text{...}` and its kin stand."""
    hidden: set[int] = set()
    for at, part in enumerate(parts):
        if part in ("\\text", "\\mbox", "\\mathrm", "\\textbf", "\\begin", "\\end"):
            hidden.update(
                range(at, _closing(parts, parts.index("{", at)) + 1 if "{" in parts[at:] else at)
            )
    return hidden


def _exponents(parts: list[str]) -> Iterator[Mutation]:
    for at, part in enumerate(parts):
        if part in ("^", "_") and at + 1 < len(parts):
            end = _closing(parts, at + 1) if parts[at + 1] == "{" else at + 1
            group = "".join(parts[at + 1 : end + 1])
            if group in ("\\circ", "{\\circ}"):
                continue
            yield "exponent", "".join([*parts[: at + 1], "{9}", *parts[end + 1 :]])
            yield "exponent dropped", "".join([*parts[:at], *parts[end + 1 :]])
            inner = group[1:-1] if group.startswith("{") else group
            yield "exponent", "".join([*parts[: at + 1], "{-", inner, "}", *parts[end + 1 :]])


def _orders(text: str, parts: list[str]) -> Iterator[Mutation]:
    for match in re.finditer(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", text):
        top, bottom = match.groups()
        if top != bottom:
            yield "swap", f"{text[: match.start()]}\\frac{{{bottom}}}{{{top}}}{text[match.end() :]}"
            yield "frac flattened", f"{text[: match.start()]}{top}/{bottom}{text[match.end() :]}"
    found = re.fullmatch(r"(\\left)?\(\s*([^()\[\]]+?),([^()\[\],]+?)(\\right)?\s*\)", text)
    if found is not None:
        left, first, last, right = found.groups(default="")
        yield "order", f"{left}({last},{first}{right})"
    commas = [at for at, part in enumerate(parts) if part == ","]
    if commas:
        yield "item dropped", "".join(parts[: commas[-1]])
        yield "item added", text + ", 97"
    if re.fullmatch(r"[^=]*=[^=]*", text) and "\\" not in text.split("=")[0]:
        yield "equation to relation", text.replace("=", "<")


def _factors(text: str, parts: list[str]) -> Iterator[Mutation]:
    if not text.startswith("\\text"):
        yield "factor", "3" + text if not re.match(r"[\d.]", text) else "3 \\cdot " + text
        yield "factor", text + " \\cdot 2"
        yield "sum", text + "+1"
    for at, part in enumerate(parts):
        if part == "\\sqrt" and at + 1 < len(parts) and parts[at + 1] == "{":
            yield "root degree", _with(parts, at, "\\sqrt[5]")
        if part == "!":
            yield "factorial", _with(parts, at, "")
    if (number := re.fullmatch(r"(-?)(\d+)\.(\d+)", text)) is not None:
        yield "point moved", f"{number[1]}{number[2]}{number[3]}"


def _deletions(parts: list[str]) -> Iterator[Mutation]:
    hidden = _in_words(parts)
    for at, part in enumerate(parts):
        if at not in hidden and re.fullmatch(r"[a-zA-Z\d]|\\pi|\\sqrt|!|\\infty", part):
            yield "deleted", "".join(parts[:at] + parts[at + 1 :])
