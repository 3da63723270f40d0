"""Splits the end of a text into sentences, and finds the formulas and numbers in it."""

from __future__ import annotations

import re

from .number_words import with_signs

TAIL = 4000
"""Number of characters at the end of a text that are searched for answers without a box or tag."""
FORMULA = re.compile(
    r"(?<!\\)\$\$([^$]+)\$\$|(?<!\\)\$([^$]+)(?<!\\)\$"
    r"|\\\(((?:(?!\\\(|\\\)).)+)\\\)|\\\[((?:(?!\\\[|\\\]).)+)\\\]"
    r"|\\begin\{(?:equation|align|gather)\*?\}((?:(?!\\end|\\begin).)+)"
    r"\\end\{(?:equation|align|gather)\*?\}",
    re.DOTALL,
)
NUMBER = re.compile(
    r"\b(?:Jan|Febr|Septem|Octo|Novem|Decem)[a-z]*\s\d{1,2}(?:,?\s\d{4})?(?!\d)"  # a date
    r"|\b(?:March|April|May|June|July|August)\s\d{1,2}(?:,?\s\d{4})?(?!\d)|"
    r"\d+(?:\.\d+)?\s?(?:[x×]|\\times)\s?10\s?\^\s?\{?-?\d+\}?"  # scientific notation
    r"|(?<![\d:])\d+(?::\d+)+(?:\s?[AaPp]\.?[Mm]\b)?"  # a ratio or a time
    r"|(?:(?<![\w)\]}])[-−])?\d+\s\d+/\d+(?![\w/])"  # a mixed number
    r"|(?<![A-Za-z_])(?:(?<![\w)\]}])[-−])?(?:\\?[$€£¥￥]\s?)?"
    # the second: a decimal comma
    r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|(?:\d{1,3}(?:\.\d{3})+|\d+),\d+(?![\d,])|\d+)(?:\.\d+)?"
    r"(?:[eE][+-]?\d+(?!\w))?"
    r"(?:\s?/\s?\d+(?![\w.]))?[½⅓⅔¼¾]?(?:√\d+)?π?(?:\s?(?:\\?%|°|％))?"
    r"|(?<!\d)[-−]?\.\d+|[-−]?√\d+π?|(?<!\d)[-−]?π(?:/\d+)?"
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u4e00-\u9fff]+")
GROUPED_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s?\{[^{}]*\}")
_GAP = re.compile(r"[^\S\n]{3,}")
_CODE = re.compile(
    r"^[ \t]*```(?:python|py|cpp|c\+\+|java|javascript|sql|bash|sh)\b(?:(?!```).)*(?:```|\Z)",
    re.M | re.S | re.I,
)
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.M)
_SENTENCE = re.compile(r"(?:[.!?](?=[\s*_)\"]|$)|[。！？])[*_)\"]*")
_DISPLAY = re.compile(r"\s{0,9}(?:\\\[|\$\$|\\begin\{(?:equation|align))")
_DOLLAR = re.compile(r"(?<!\\)\$")
_WORDS = re.compile(r"\s[A-Za-z]{2,}")
_MATHEMATICS = re.compile(r"[\\^]")
_NUMBER_FIRST = re.compile(r"\.?\d")
_LINES = re.compile(r"\n+")


def tail(text: str) -> str:
    """The last `TAIL` characters of a text without code and long gaps, with minus signs in digits
    and with `\\$` for dollars of money."""
    text = text.rstrip()[-TAIL:].strip()
    if "```" in text:
        text = _FENCE.sub("", _CODE.sub("", text)).strip()
    text = text.replace("`", "")
    text = with_signs(_GAP.sub("  ", text))
    return _money_told(text) if "$" in text else text


def _money_told(text: str) -> str:
    """The text with `\\$` for every dollar of money: one before a number, unless the next dollar
    closes a formula. That one closes none if it too stands before a number, as in `$20 / 4 = $5`,
    or if there are words between the two."""
    pieces = _DOLLAR.split(text)
    told, at = pieces[0], 1
    while at < len(pieces):
        inside, after = pieces[at], pieces[at + 1] if at + 1 < len(pieces) else None
        prose = _WORDS.search(inside) is not None and _MATHEMATICS.search(inside) is None
        opens_number = after is None or _NUMBER_FIRST.match(after) is not None
        if _NUMBER_FIRST.match(inside) is not None and (prose or opens_number):
            told += "\\$" + inside
            at += 1
        else:  # a formula, with what follows it
            told += "$" + inside + ("$" + after if after is not None else "")
            at += 2
    return told


def sentences(text: str) -> list[str]:
    """The sentences in order. A formula is never split, and a display formula belongs to the
    sentence before it."""
    spans = [m.span() for m in FORMULA.finditer(text)]
    parts, start, at = list[str](), 0, 0
    for end in sorted(m.span() for pattern in (_SENTENCE, _LINES) for m in pattern.finditer(text)):
        while at < len(spans) and spans[at][1] <= end[0]:
            at += 1
        if at < len(spans) and spans[at][0] <= end[0] < spans[at][1]:
            continue
        piece = text[start : end[1]].strip()
        if text[end[0]] == "\n" and _DISPLAY.match(text, end[1]) is not None:
            continue  # `The result is` and a display formula below it
        if piece:
            parts.append(piece)
        start = end[1]
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def unbold(text: str) -> str:
    return text.replace("**", "").replace("__", "").strip()


def bare(text: str) -> str:
    """The text without bold, quotes and the full stop at its end."""
    text = unbold(text).rstrip("。！").strip().removesuffix(".").strip()
    quoted = len(text) > 2 and text[0] + text[-1] in ('""', "“”")
    return text[1:-1].strip(" .") if quoted else text
