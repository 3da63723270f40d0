"""Normalises the spelling of an answer: Unicode, LaTeX's styles and spaces, damaged commands,
separators of thousands, decimal commas.

Braces and everything else that carries structure are kept. Linear time.
"""

from __future__ import annotations

import re

_UNICODE = str.maketrans(
    {
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
        "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ",
        "⋅": r"\cdot ", "∙": r"\cdot ", "−": "-", "–": "-", "—": "-", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∉": r"\notin ", "°": r"\degree ", "º": r"\degree ", "±": r"\pm ",
        "∓": r"\mp ", "≈": r"\approx ", "≡": r"\equiv ", "∠": r"\angle ", "△": r"\triangle ",
        "…": r"\ldots ", "⋯": r"\ldots ", "′": "'", "’": "'", "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
        "⌈": r"\lceil ", "⌉": r"\rceil ", "→": r"\to ", "∑": r"\sum ", "∫": r"\int ",
        "∂": r"\partial ", "ℏ": r"\hbar ", "。": ".", "、": ",", "；": ";", "，": ",", "：": ":",
        "【": " ", "】": " ", "「": " ", "」": " ", "￥": "¥", "“": '"', "”": '"', "﹣": "-",
        "〜": "~",
        "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
        "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\varphi ",
        "ω": r"\omega ", "ρ": r"\rho ", "ε": r"\epsilon ",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2003": " ", "\u3000": " ",
    }
    | {chr(0xFEE0 + c): chr(c) for c in range(0x21, 0x7F) if chr(c) not in ",;:"}
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u00ad\u2061\u2062\u2063\u2064", "")
)  # fmt: skip
_VULGAR = {c: (a, b) for c, a, b in (
    ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5),
    ("⅗", 3, 5), ("⅘", 4, 5), ("⅙", 1, 6),
    ("⅚", 5, 6), ("⅐", 1, 7), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8), ("⅑", 1, 9),
    ("⅒", 1, 10),
)}  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_DAMAGED = re.compile("\f(?=rac)|\t(?=ext|imes|frac|heta|an)|\b(?=oxed|egin|inom)|\r(?=ight|ho)")
"""Control characters made of `\\f`, `\\t`, `\\b` and `\\r` at the start of a command by unescaping
twice."""
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_BLOCKS = (
    (re.compile(r"<sup>([^<]*)</sup>"), r"^{\1}"),
    (re.compile(r"<sub>([^<]*)</sub>"), r"_{\1}"),
    (re.compile(r"\\q?quad(?=[A-Za-z])"), " "),
    (
        re.compile(
            r"\\(mathbb|mathbf|mathrm|mathcal|mathit|boldsymbol|bm|text)\s+([A-Za-z])(?![A-Za-z])"
        ),
        r"\\\1{\2}",
    ),
    (
        re.compile(
            r"\\(?:begin|end)\s*"
            r"\{(?:align(?:ed|\*)?|equation\*?|gathered|split|center|displaymath)\}"
        ),
        " ",
    ),
    (
        re.compile(
            r"\\(?:boxed|fbox|displaystyle|textstyle|limits|nolimits"
            r"|rm|bf|it|tiny|small|large|Large)(?![A-Za-z])"
        ),
        " ",
    ),
    (re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*(?:\.(?=\s|\\end|$))?"), ""),
    (re.compile(r"\.{3,}"), r"\\ldots "),
    (re.compile(r"\\(?:textcolor|color)\s*\{[A-Za-z]+\}"), " "),
    (re.compile(r"√\s*(\d+(?:\.\d+)?)"), r"\\sqrt{\1}"),
    (
        re.compile(
            r"\\(?:hspace|vspace|color|tag|label)\*?\s*\{[^{}]*\}"
            r"|\\(?:hline|qedhere|notag|nonumber|par|newline)(?![A-Za-z])"
        ),
        " ",
    ),
    (
        re.compile(
            r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))"
            r"|\\(?:degree|textdegree)(?![A-Za-z])"
        ),
        r"\\degree ",
    ),
    (
        re.compile(
            r"\^\s*(?:\{\s*\\(?:text|mathrm|rm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}"
            r"|\\(?:text|mathrm|rm)\s*\{\s*(?:st|nd|rd|th)\s*\}|\{\s*(?:st|nd|rd|th)\s*\})"
        ),
        "th ",
    ),
    (re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![A-Za-z]))"), "'"),
    (re.compile(r"(?<=\d)\{\s*\}(?!\s*\{)|(?<=\\degree )\{\s*\}"), ""),
    (re.compile(r"^\s*\*\*(.+)\*\*\s*$"), r"\1"),
    # bold has been removed, so that this is Python's power
    (re.compile(r"\*\*"), "^"),
    # before `<=` and `->`, which it contains
    (re.compile(r"<=>|<->"), r"\\iff "),
    (re.compile(r"->"), r"\\to "),
    (re.compile(r">=|=>"), r"\\ge "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r"(?<![\d)])!=(?!=)|<>"), r"\\ne "),
    (re.compile(r"(?<=\d)\s?[xX](?=\s?10\s?\^)"), r"\\times "),
)
_WRAPPER = re.compile(
    r"\s*(?:\\(?:boldsymbol|bm|math(?:bf|it|sf)|text(?:bf|it)|underline))?\s*\{(?!,)"
)
_GROUPED = re.compile(
    r"(?<![\d.,])(?:\d{1,3}(?:(?:\s?\{\s?,\s?\}|,\\!|,\\,|\\,|\\ |[ '~](?=\d{3}))\s?\d{3})+"
    r"(?!\d)(?:\.\d+)?"
    r"|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?![\d.]))"
)
"""A number whose thousands are separated by `{,}`, `,\\!`, a thin or plain blank, an apostrophe or
full stops."""
_COMMAS = re.compile(
    r"(?<![\d.,])(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3})(?![\d,]|\s*,\s*\d)"
)
_SEPARATING = re.compile(r"[(\[]|\\\{|(?<![\^_}A-Za-z])\{")
"""Brackets of a tuple or set. Inside them a comma separates items; in the braces of a fraction or a
power it separates thousands."""
_BRACED_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d{1,3}(?:[. ]\d{3})+|\d+),(\d+)(?![\d.]|,\d)")
_ONE_NUMBER = re.compile(
    r"\s*[-+−$€£]*\s*(?:\d{1,3}(?:[. ]\d{3})+|\d+),\d+(?!\s*[,;.]?\s*\d)[^,;()\[\]]*"
)


def spell(text: str) -> str:
    """Returns the text in one spelling of all that Unicode, LaTeX and number formats spell in
    several ways."""
    if not text.isascii():
        for vulgar, (top, bottom) in _VULGAR.items():
            if vulgar in text:
                text = text.replace(vulgar, rf"\frac{{{top}}}{{{bottom}}}")
        text = _RAISED.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPT) + "}", text)
        text = _LOWERED.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPT) + "}", text)
        text = text.translate(_UNICODE)
    if not text.isprintable():
        text = _DAMAGED.sub(
            lambda match: repr(match.group())[1:-1].replace("x0c", "f").replace("x08", "b"), text
        )
    text = " ".join(text.split())
    if "\\" in text:
        # Commands escaped twice. In an environment two backslashes end a row instead.
        if "\\\\" in text and "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
        text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    for pattern, replacement in _BLOCKS:
        text = pattern.sub(replacement, text)
    # `¤` marks dollars of money while those around formulas are removed.
    text = re.sub(r"\\\$(?=\s*[-\d.])", "¤", text)
    text = re.sub(r"\$\s*([-\d.,]+)\s*$", r"¤\1", text) if text.count("$") == 1 else text
    text = text.replace("$", " ").replace("¤", "$")
    while (wrapper := _WRAPPER.match(text)) is not None and closing(text, wrapper.end()) == len(
        text.rstrip()
    ) - 1:
        text = text.rstrip()[wrapper.end() : -1]
    text = _GROUPED.sub(_plain_number, text)
    text = _BRACED_COMMA.sub(".", text)
    if "," in text and _SEPARATING.search(text) is None:
        # No group of thousands begins with 0: `0,111` is 0.111, not 111.
        text = re.sub(r"(?<![\d.,])0,(?=\d{3,}(?![\d,.]))", "0.", text)
        text = _COMMAS.sub(lambda m: m.group().replace(",", ""), text)
    return text


def _plain_number(match: re.Match[str]) -> str:
    number = match.group()
    if re.fullmatch(r"[\d.]+,\d+", number):
        return number.replace(".", "").replace(",", ".")
    if re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", number):
        return number.replace(".", "")
    return re.sub(r"\{\s?,\s?\}|\\[!, ]|[,' ~]", "", number)


def with_points(text: str) -> str | None:
    """The text with points for the decimal commas of its numbers: `3,14`, `1.234,5`, `(0,5; 2)`.
    None where commas separate, or may: `1,234`, `(3,14)`, `3, 14`."""
    if "," not in text:
        return None
    text = _BRACED_COMMA.sub(",", text)
    numbers = list(_DECIMAL_COMMA.finditer(text))
    thousands = any(
        len(after) == 3 and before != "0" and before.isdigit() and len(before) <= 3
        for before, after in (number.groups() for number in numbers)
    )
    listed = ";" in text and text.count(",") == len(numbers)
    if not numbers or thousands or not (listed or _ONE_NUMBER.fullmatch(text)):
        return None
    text = _DECIMAL_COMMA.sub(lambda m: re.sub("[. ]", "", m[1]) + "." + m[2], text)
    return text.replace(";", ",")


def closing(text: str, at: int) -> int:
    """Index of the brace that closes the one opened before `at`; the length of the text if none
    does."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return len(text)
