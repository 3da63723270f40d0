"""Splits an answer into tokens: LaTeX, plain text, Chinese, and mixtures of them.

Synonymous commands and words give the same token. Every text has tokens, in linear time.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .number_words import CHINESE_NUMBER, chinese_number, is_power
from .spelling import closing, spell
from .units import MEASURE_WORDS, MULTIPLIERS, is_unit, is_unit_word, read_unit, words


class Token(NamedTuple):
    """A token. `kind`: number, name, letter (upright), run (capitals in a row), text, command, join
    ("or"), both ("and") or sign; `spaced`: whether a blank precedes it."""

    kind: str
    text: str
    spaced: bool = False


_TOKEN = re.compile(
    r"(?P<space>\s+|\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\(?=\s|$))"
    r"|(?P<styled>\\(?:text(?:bf|it|rm|sf|tt|normal|color)?|mbox|hbox"
    r"|math(?:rm|bf|it|sf|bb|cal|frak|scr)|boldsymbol|bm|operatorname\*?|emph|underline)\s*\{)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w|\.\d))?)"
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
    "arcsinh arccosh arctanh erf"
)
_CONNECTIVES = {"land": "and", "wedge": "and", "lor": "or", "vee": "or"}
# Without a backslash these are words or letters: `90 deg` is an angle, `Re` may be R times e.
_WORD_FUNCTIONS = (FUNCTIONS | {"asin", "acos", "atan", "sqrt", "cbrt"}) - words(
    "deg dim ker tr rank det arg Pr Re Im"
)
_WORDS = {"pi": r"\pi", "infty": r"\infty", "infinity": r"\infty", "inf": r"\infty",
"oo": r"\infty", "asin": r"\arcsin",
          "acos": r"\arccos", "atan": r"\arctan", "theta": r"\theta", "alpha": r"\alpha",
          "beta": r"\beta", "lambda": r"\lambda",
          "omega": r"\omega", "mod": r"\bmod", "union": r"\cup", "cup": r"\cup"}  # fmt: skip
SEPARATORS = frozenset(("and", "or", "或", "和", "与", "及", "或者", "以及", "且", "并且"))
# Two or three letters are otherwise a product: `ab` is a times b, but `the` is a word.
_COMMON = words(
    "yes no odd all one two six ten the day per for if is are was not but it in of to at by on as "
    "its be an so due any has can may won new top bag box car dog cat man men her his she him they "
    "day end east west"
)


def tokenise(text: str) -> list[Token]:
    """The tokens of a text; a character of no known notation is a `sign`."""
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
            end = closing(text, at)
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


def _command(name: str, spaced: bool) -> list[Token]:
    bar = name == "|"
    if name in _CONNECTIVES:
        return [_separator(_CONNECTIVES[name], spaced)]
    name = _SYNONYMS.get(name, name)
    if name.startswith("mathbb "):
        return [Token("name", name, spaced)]
    if name == "\\":
        return [Token("command", r"\\", spaced)]
    if len(name) == 1 and not name.isalpha() and name not in "{}" and not bar:
        return [Token("sign", name, spaced)]
    return [Token("command", name if name.startswith("\\") else "\\" + name, spaced)]


def _styled(style: str, content: str, spaced: bool) -> list[Token]:
    """The tokens of `\\text{...}`, `\\mathrm{...}` and the like."""
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
        styled: list[Token] = []
        for part in parts:
            styled += [Token("text", part.strip(), spaced)] if part.strip() else []
            styled.append(Token("join", ",", spaced))
        return styled[:-1]
    return [Token("text", inner, spaced)] if not re.match(r"[\d.]", inner) else _scan(inner)


def _word(value: str, spaced: bool, before: list[Token]) -> list[Token]:
    """The tokens of a run of Latin letters: a function, separator, constant, unit or word, else a
    name for each letter."""
    if len(value) == 1:
        return [Token("name", value, spaced)]
    lower = value.lower()
    after_number = bool(before) and (before[-1].kind == "number" or before[-1].text == r"\pi")
    if lower in SEPARATORS:
        return [_separator(lower, spaced)]
    # `5 min` and `5 sec` are times; `min(2, 3)` and `sec x` apply a function.
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
    # capitals keep their order: as a product BAC would equal ABC
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
    """The tokens of letters of other scripts: Chinese separators, numerals and words."""
    if value in SEPARATORS:
        return [_separator(value, spaced)]
    for separator in ("或者", "或", "和", "与"):
        if len(value) > len(separator) and value.endswith(separator):
            return [*_other(value[: -len(separator)], spaced), Token("sign", ",")]
        if len(value) > len(separator) and value.startswith(separator):
            return [Token("sign", ",", spaced), *_other(value[len(separator) :], False)]
    # 万 alone is no number but a factor, as in 5万.
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
    """The tokens of a text joined without blanks, by which texts outside the grammar are
    compared."""
    return re.sub(r"\s+", "", "".join(token.text for token in tokenise(text)))
