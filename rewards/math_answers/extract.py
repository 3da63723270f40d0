"""Finding the final answer in a completion, in linear time.

Only what stands after the last `</think>` counts. There, in this order: `\\boxed{...}` (or `\\fbox`) with balanced braces,
`<answer>...</answer>`, and the fallbacks: GSM8K's `#### x`, a phrase such as `Answer: x`, a text that is short enough to
be the answer itself, the last formula in `$...$`, `\\(...\\)` or `\\[...\\]`, and the last number of the last line.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

How = Literal["box", "answer_tag", "marker", "whole", "formula", "number", "none"]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Every distinct candidate in order (more than one means that all must be right, or be a list), and how found."""

    candidates: tuple[str, ...]
    how: How


NOTHING = Extracted((), "none")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(
    r"####|^[ \t]*A:|\b(?:final\s+)?answer\**(?:\s*[:=]|\s+(?:is|are|was)\b\s*:?|\s*\n)", re.IGNORECASE | re.MULTILINE
)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")
_HEDGE = re.compile(r"\bor\b", re.IGNORECASE)
_BARE_LINE = re.compile(r"(?:A:|####)?[ \t]*(-?[\d,]*\.?\d+)")
_FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_GROUPED_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}")
_PHANTOM = re.compile(r"\\(?:[hv]?phantom|hspace|vspace)\*?\s*\{[^{}]*\}|\\q?quad")
_CONTENT = re.compile(r"[^\W_]|\\[a-z]")
"""An empty box, `\\boxed{?}` or a box of blanks belongs to the problem; it is no answer."""
_SENTENCE = re.compile(r"[.!?](?=\s|$)")
_JOINED = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*", re.IGNORECASE)
TAIL = 3000
"""Characters at the end of a text in which the fallbacks look."""


def final_text(completion: str, opened: bool = False) -> str | None:
    """What follows the last `</think>`; None if thinking was opened (by the prompt, with `opened`) and never closed."""
    if (end := completion.rfind("</think>")) >= 0:
        return completion[end + len("</think>") :]
    return None if opened or "<think>" in completion else completion


def extract(completion: str, opened: bool = False) -> Extracted:
    """The candidates for the final answer of a completion."""
    text = final_text(completion, opened)
    if text is None:
        return NOTHING
    found = [box for box in boxes(text) if _CONTENT.search(_PHANTOM.sub("", box))]
    if "<answer>" in text:
        found += [tag for tag in _ANSWER_TAG.findall(text)[-1:] if tag.strip() and "\\boxed" not in tag]
    if found:
        return Extracted(tuple(dict.fromkeys(found)), "box" if "\\boxed" in text or "\\fbox" in text else "answer_tag")
    return _fallback(text)


def boxes(text: str) -> list[str]:
    """The contents of the balanced boxes in order; of a box within a box only the outer one."""
    at = text.find("\\boxed")
    if at < 0 and (at := text.find("\\fbox")) < 0:
        return []
    found: list[tuple[int, int]] = []
    stack: list[int] = []  # for each open brace: where its content starts if it is a box's, else -1
    for match in _BOX.finditer(text, at):
        token = match.group()
        if token == "{":
            stack.append(-1)
        elif token != "}":
            stack.append(match.end())
        elif stack and (start := stack.pop()) >= 0:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.start()))
    return [text[start:end] for start, end in found]


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return deque(pattern.finditer(text), maxlen=1).pop() if pattern.search(text) else None


def _fallback(text: str) -> Extracted:
    text = text[-TAIL:].strip()
    if not text:
        return NOTHING
    if (plain_line := _BARE_LINE.fullmatch(text, text.rfind("\n") + 1)) is not None:
        return Extracted((plain_line.group(1),), "marker")
    marker = _last(_MARKER, text)
    if marker is not None and (stated := _stated(text[marker.end() :])):
        return Extracted((stated,), "marker")
    plain = _FORMULA.sub(" ", _GROUPED_TEXT.sub("", text))
    words = [word for word in _PROSE.findall(plain) if word.lower() not in ("and", "or")]
    mixed = bool(words) and _FORMULA.search(text) is not None
    if (len(text) <= 400 and len(words) <= 5 and not mixed) or not re.search(r"\d|\$|\\", text):
        return Extracted((text,), "whole")
    last_line = text[text.rfind("\n") + 1 :]
    if (formula := _last(_FORMULA, text)) is not None and formula.end() >= len(text) - len(last_line):
        return Extracted((_stated(last_line) or formula.group(formula.lastindex or 0),), "formula")
    if (number := _last(_NUMBER, text)) is not None:
        return Extracted((_near_hedge(text, number.start(), number.end()) or number.group(),), "number")
    return Extracted((text,), "whole")


def _stated(rest: str) -> str:
    """The answer of the first line or sentence with content: its formulas, else all of it if short, else its number."""
    line = next((line for line in rest.split("\n") if line.strip(" *:.")), "").strip().strip("*:").strip()
    if (end := _SENTENCE.search(line, 1)) is not None and line[: end.start()].count("$") % 2 == 0:
        line = line[: end.start()]
    formulas = list(_FORMULA.finditer(line))
    numbers = [n for n in _NUMBER.finditer(line) if not any(f.start() <= n.start() < f.end() for f in formulas)]
    if formulas and not (numbers and numbers[-1].start() > formulas[-1].end()):
        first, last = formulas[0], formulas[-1]
        gaps = [line[a.end() : b.start()] for a, b in pairwise(formulas)]
        if len(formulas) > 1 and all(_JOINED.fullmatch(gap) for gap in gaps):
            return line[first.start() : last.end()]  # a list or a hedge; either way all of it
        return last.group(last.lastindex or 0)
    if not formulas and (len(_PROSE.findall(line)) <= 3 or not numbers):
        return line
    if len(numbers) > 1 and _HEDGE.search(line, numbers[0].end(), numbers[-1].start()):
        return line
    return numbers[-1].group()


def _near_hedge(text: str, start: int, end: int) -> str:
    """`4 or 5` around the candidate, which is then taken whole and equals no single answer."""
    before, after = text[max(0, start - 40) : start], text[end : end + 40]
    if re.search(r"\d\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}$", before) or re.match(
        r"\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}\d", after
    ):
        found = [m.group() for m in _NUMBER.finditer(before[-20:] + text[start:end] + after[:20])]
        return " or ".join(found)
    return ""
