"""Tokens of an answer: LaTeX, plain text, Chinese, and the mixtures that models and data sets
write.

Only spelling is evened out here: sizes of delimiters, spaces, fonts, synonyms of commands,
separators of thousands, Unicode.
Braces, and all else that carries structure, stay. Any text has tokens, and they take linear time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .number_words import CHINESE_NUMBER, chinese_number, is_power
from .units import MEASURE_WORDS, MULTIPLIERS, is_unit, is_unit_word, read_unit, words


class Token(NamedTuple):
    """`kind` is number, name, letter (upright), run, text, command, join ("or"),
    both ("and") or sign; `spaced`: a blank stands before it."""

    kind: str
    text: str
    spaced: bool = False


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
"""What `\\f`, `\\t`, `\\b` and `\\r` of a command became in a string that was unescaped twice."""
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
            r"\\(?:begin|end)\s*\{(?:align(?:ed|\*)?|equation\*?|gathered|split|center|displaymath)\}"
        ),
        " ",
    ),
    (
        re.compile(
            r"\\(?:boxed|fbox|displaystyle|textstyle|limits|nolimits|rm|bf|it|tiny|small|large|Large)"
            r"(?![A-Za-z])"
        ),
        " ",
    ),
    (re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*(?:\.(?=\s|\\end|$))?"), ""),
    (re.compile(r"\.{3,}"), r"\\ldots "),
    (re.compile(r"\\(?:textcolor|color)\s*\{[A-Za-z]+\}"), " "),
    (re.compile(r"√\s*(\d+(?:\.\d+)?)"), r"\\sqrt{\1}"),
    (
        re.compile(
            r"\\(?:hspace|vspace|color|tag|label)\*?\s*\{[^{}]*\}|\\(?:hline|qedhere|notag|nonumber|par|newlin"
            r"e)(?![A-Za-z])"
        ),
        " ",
    ),
    (
        re.compile(
            r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\(?:degree|textdegree)(?![A-"
            r"Za-z])"
        ),
        r"\\degree ",
    ),
    (
        re.compile(
            r"\^\s*(?:\{\s*\\(?:text|mathrm|rm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}|\\(?:text|mathrm|rm)\s*\{\s*"
            r"(?:st|nd|rd|th)\s*\}|\{\s*(?:st|nd|rd|th)\s*\})"
        ),
        "th ",
    ),
    (re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![A-Za-z]))"), "'"),
    (re.compile(r"(?<=\d)\{\s*\}(?!\s*\{)|(?<=\\degree )\{\s*\}"), ""),
    (re.compile(r"^\s*\*\*(.+)\*\*\s*$"), r"\1"),
    (re.compile(r"\*\*"), "^"),
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
"""Thousands set apart by `{,}`, `,\\!`, a thin or plain blank, an apostrophe or full stops."""
_COMMAS = re.compile(
    r"(?<![\d.,])(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3})(?![\d,]|\s*,\s*\d)"
)
_SEPARATING = re.compile(r"[(\[]|\\\{|(?<![\^_}A-Za-z])\{")
"""Brackets of a tuple or set; in braces of a fraction or a power a comma separates thousands."""
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_TOKEN = re.compile(
    r"(?P<space>\s+|\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\(?=\s|$))"
    r"|(?P<styled>\\(?:text(?:bf|it|rm|sf|tt|normal|color)?|mbox|hbox|math(?:rm|bf|it|sf|bb|cal|frak|scr)|boldsymbol|bm"
    r"|operatorname\*?|emph|underline)\s*\{)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w|\.\d))?)"
    r"|(?P<word>[A-Za-z]+)|(?P<other>[^\W\d_a-zA-Z]+)|(?P<sign>.)",
    re.DOTALL,
)
_SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "choose": "choose",
    "geq": "ge",
    "geqslant": "ge",
    "leq": "le",
    "leqslant": "le",
    "neq": "ne",
    "lt": "<",
    "gt": ">",
    "colon": ":",
    "ast": "*",
    "cdot": "*",
    "times": "*",
    "bullet": "*",
    "div": "/",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "vert": "|",
    "mid": "|",
    "lvert": "|",
    "rvert": "|",
    "Vert": r"\|",
    "lVert": r"\|",
    "rVert": r"\|",
    "%": "%",
    "$": "$",
    "#": "#",
    "_": "_",
    "dots": "ldots",
    "cdots": "ldots",
    "dotsc": "ldots",
    "dotsb": "ldots",
    "varnothing": "emptyset",
    "rightarrow": "to",
    "longrightarrow": "to",
    "bigcup": "cup",
    "bigcap": "cap",
    "backslash": "setminus",
    "land": ",",
    "wedge": ",",
    "lor": ",",
    "vee": ",",
    "arccot": "arccot",
    "tg": "tan",
    "ctg": "cot",
    "arctg": "arctan",
    "varepsilon": "epsilon",
    "phi": "varphi",
    "ldotp": "ldots",
    "infin": "infty",
    "infinity": "infty",
    "euro": "€",
    "pounds": "£",
    "yen": "¥",
    "textdollar": "$",
    "sim": "sim",
    "approxeq": "approx",
    "simeq": "approx",
    "thickapprox": "approx",
    "cdotp": "*",
    "overrightarrow": "vec",
    "widehat": "hat",
    "widetilde": "tilde",
    "And": "&",
    "&": "&",
    "iiint": "iiint",
    "R": "mathbb R",
    "Z": "mathbb Z",
    "N": "mathbb N",
    "Q": "mathbb Q",
    "C": "mathbb C",
    "middot": "*",
    "lg": "lg",
    "log": "log",
    "Re": "Re",
    "Im": "Im",
}
FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech "
    "csch log ln lg exp floor ceil abs min max gcd lcm det arg Re Im sgn dim deg ker rank tr Pr "
    "arcsinh arccosh arctanh erf Gamma"
) - {"Gamma"}
_WORD_FUNCTIONS = FUNCTIONS | {"asin", "acos", "atan", "sqrt", "cbrt"} - {
    "deg",
    "dim",
    "ker",
    "tr",
    "rank",
    "det",
    "arg",
    "Pr",
    "Re",
    "Im",
}
_WORDS = {"pi": r"\pi", "infty": r"\infty", "infinity": r"\infty", "inf": r"\infty",
"oo": r"\infty", "asin": r"\arcsin",
          "acos": r"\arccos", "atan": r"\arctan", "theta": r"\theta", "alpha": r"\alpha",
          "beta": r"\beta", "lambda": r"\lambda",
          "omega": r"\omega", "mod": r"\bmod", "union": r"\cup", "cup": r"\cup"}  # fmt: skip
SEPARATORS = frozenset(("and", "or", "或", "和", "与", "及", "或者", "以及", "且", "并且"))
_COMMON = words(
    "yes no odd all one two six ten the day per for if is are was not but it in of to at by on as "
    "its be an so due any has can may won new top bag box car dog cat man men her his she him they "
    "day end east west"
)


def spell(text: str) -> str:
    """One spelling for what Unicode, LaTeX's styles and number formats spell in several ways."""
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
        if "\\\\" in text and "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)
        text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    for pattern, replacement in _BLOCKS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\\$(?=\s*[-\d.])", "¤", text)
    text = re.sub(r"\$\s*([-\d.,]+)\s*$", r"¤\1", text) if text.count("$") == 1 else text
    text = text.replace("$", " ").replace("¤", "$")
    while (found := _WRAPPER.match(text)) is not None and _closing(text, found.end()) == len(
        text.rstrip()
    ) - 1:
        text = text.rstrip()[found.end() : -1]
    text = _GROUPED.sub(_plain_number, text)
    text = _DECIMAL_COMMA.sub(".", text)
    if "," in text and _SEPARATING.search(text) is None:
        text = re.sub(r"(?<![\d.,])0,(?=\d{3,}(?![\d,.]))", "0.", text)
        text = _COMMAS.sub(
            lambda m: m.group().replace(",", ""), text
        )  # inside brackets a comma separates
    return text


def _plain_number(match: re.Match[str]) -> str:
    found = match.group()
    if re.fullmatch(r"[\d.]+,\d+", found):
        return found.replace(".", "").replace(",", ".")
    if re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", found):
        return found.replace(".", "")
    return re.sub(r"\{\s?,\s?\}|\\[!, ]|[,' ~]", "", found)


def tokenise(text: str) -> list[Token]:
    """Every token; what is no part of any notation is a `sign`."""
    return _scan(spell(text))


def _scan(text: str) -> list[Token]:
    tokens: list[Token] = []
    at, spaced = 0, False
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None, "the last branch takes any character"
        kind, value = match.lastgroup or "sign", match.group()
        at = match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "styled":
            style = value[1:-1].strip()
            end = _closing(text, at)
            content, at = text[at:end], end + 1
            tokens += _styled(style, content, spaced)
        elif kind == "command":
            tokens += _command(value[1:], spaced)
        elif kind == "word":
            tokens += _word(value, spaced, tokens)
        elif kind == "other":
            tokens += _other(value, spaced)
        else:
            tokens.append(Token(kind, value, spaced))
        spaced = False
    return tokens


def _closing(text: str, at: int) -> int:
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return len(text)


def _command(name: str, spaced: bool) -> list[Token]:
    bar = name == "|"
    name = _SYNONYMS.get(name, name)
    if name.startswith("mathbb "):
        return [Token("name", name, spaced)]
    if name == "\\":
        return [Token("command", r"\\", spaced)]
    if len(name) == 1 and not name.isalpha() and name not in "{}" and not bar:
        return [Token("sign", name, spaced)]
    return [Token("command", name if name.startswith("\\") else "\\" + name, spaced)]


def _styled(style: str, content: str, spaced: bool) -> list[Token]:
    """`\\text{...}` and its kin."""
    inner = content.replace("~", " ").replace("\\ ", " ").replace("\\,", " ").strip()
    if style in ("mathbb", "mathcal", "mathfrak", "mathscr"):
        return [Token("name", f"{style if style != 'mathscr' else 'mathcal'} {inner}", spaced)]
    if style == "textcolor":
        return [Token("command", r"\textcolor", spaced)]
    if not inner:
        return []
    if inner.lower() in SEPARATORS:
        return [_separator(inner.lower(), spaced)]
    if len(inner) == 1 and inner.isascii() and inner.isalpha():
        upright = style not in ("boldsymbol", "bm", "mathbf", "mathit")
        return [Token("letter" if upright else "name", inner, spaced)]
    if inner in FUNCTIONS:
        return _word(inner, spaced, [])
    if style[:4] == "text" and re.search(r"\\[A-Za-z]", inner) and "$" not in inner:
        return [Token("text", inner, spaced)]
    unit = read_unit(inner) if style == "mathrm" else None
    if unit is not None and unit.measures:
        return [Token("text", inner, spaced)]
    if re.search(r"[$\\]", inner) or not re.search(r"[^\W\d_]", inner):
        return _scan(inner)
    formula = style.startswith("math") and re.search(r"[\d=+^_]", inner)
    if formula or style in ("boldsymbol", "bm", "underline"):
        return _scan(inner)
    if re.fullmatch(r"[A-Z]{2,4}", inner):
        return [Token("run", inner, spaced)]
    bare = re.sub(r"^(?:,\s*)?(and|or)\b", r"\1", inner)
    parts = re.split(r"^(?:and|or)\b|\b(?:and|or)$|^[，,、]|[，,、]$", bare)
    if len(parts) > 1:
        found: list[Token] = []
        for part in parts:
            found += [Token("text", part.strip(), spaced)] if part.strip() else []
            found.append(Token("join", ",", spaced))
        return found[:-1]
    return [Token("text", inner, spaced)] if not re.match(r"[\d.]", inner) else _scan(inner)


def _word(value: str, spaced: bool, before: list[Token]) -> list[Token]:
    """A run of Latin letters: a function, a separator, a constant, a unit, a word, or letters side
    by side."""
    if len(value) == 1:
        return [Token("name", value, spaced)]
    lower = value.lower()
    after_number = bool(before) and (before[-1].kind == "number" or before[-1].text == r"\pi")
    if lower in SEPARATORS:
        return [_separator(lower, spaced)]
    if value in _WORD_FUNCTIONS and not (after_number and value in ("min", "sec")):
        name = "arc" + value[1:] if value in ("asin", "acos", "atan") else value
        return [Token("command", "\\" + name, spaced)]
    if lower in ("degrees", "degree", "deg"):
        return [Token("command", r"\degree", spaced)]
    if lower in ("percent", "percentage", "pct"):
        return [Token("sign", "%", spaced)]
    if value in _WORDS or lower in ("infinity", "pi"):
        return [Token("command", _WORDS[value if value in _WORDS else lower], spaced)]
    if value in ("am", "pm", "AM", "PM") or (after_number and value in ("th", "st", "nd", "rd")):
        return [Token("text", lower, spaced)]
    unit = after_number and is_unit_word(value)
    if value.isupper():
        return [Token("text" if unit else "run", value, spaced)]
    is_word = len(value) >= 4 or lower in _COMMON or lower in MULTIPLIERS
    if unit or is_word or (len(value) == 3 and value.istitle()):
        return [Token("text", value, spaced)]
    for name in ("sin", "cos", "tan", "ln", "log"):
        if value.startswith(name):
            return [Token("command", "\\" + name, spaced), Token("name", value[len(name) :], False)]
    return [Token("name", letter, spaced and i == 0) for i, letter in enumerate(value)]


def _separator(word: str, spaced: bool) -> Token:
    return Token("both" if word in ("and", "且", "并且") else "join", ",", spaced)


def _other(value: str, spaced: bool) -> list[Token]:
    """Letters of other scripts: Chinese separators, numerals and words."""
    if value in SEPARATORS:
        return [_separator(value, spaced)]
    for separator in ("或者", "或", "和", "与"):
        if len(value) > len(separator) and value.endswith(separator):
            return [*_other(value[: -len(separator)], spaced), Token("sign", ",")]
        if len(value) > len(separator) and value.startswith(separator):
            return [Token("sign", ",", spaced), *_other(value[len(separator) :], False)]
    if CHINESE_NUMBER.fullmatch(value) and not is_power(value):
        return [Token("number", str(chinese_number(value)), spaced)]
    head = CHINESE_NUMBER.match(value)
    if head is not None and not is_unit(value) and not is_power(head.group()):
        rest = value[head.end() :]
        if len(rest) <= 2 and (rest in MEASURE_WORDS or is_unit(rest)):
            digits = str(chinese_number(head.group()))
            return [Token("number", digits, spaced), Token("text", rest)]
    if value.startswith("百分之"):
        rest = value[3:]
        if CHINESE_NUMBER.fullmatch(rest):
            return [Token("number", str(chinese_number(rest)), spaced), Token("sign", "%")]
    return [Token("text", value, spaced)]


def squeeze(text: str) -> str:
    """The spelling of a text with every blank left out, for `does it stand there?`."""
    return re.sub(r"\s+", "", "".join(token.text for token in tokenise(text)))
