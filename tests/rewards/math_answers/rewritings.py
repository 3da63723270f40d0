"""Usual rewritings of a reference answer: each says the same and must be accepted.
Deterministic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

_INTEGER = re.compile(r"-?\d+\Z")
_DECIMAL = re.compile(r"-?\d+\.\d+\Z")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}\Z")
_WIDE = str.maketrans("0123456789()+-=,", "0123456789()+-=,")
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_VULGAR = {
    "1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾", "1/5": "⅕", "2/5": "⅖", "3/5": "⅗",
    "4/5": "⅘", "1/6": "⅙", "5/6": "⅚", "1/8": "⅛", "3/8": "⅜", "5/8": "⅝", "7/8": "⅞",
}  # fmt: skip
Rewriting = Callable[[str], str | None]

ANY: dict[str, Rewriting] = {
    "itself": lambda a: a,
    "blanks around": lambda a: f"  {a}  ",
    "final period": lambda a: a + ".",
    "dollars": lambda a: f"${a}$",
    "double dollars": lambda a: f"$${a}$$",
    "round math": lambda a: rf"\({a}\)",
    "square math": lambda a: rf"\[{a}\]",
    "newlines": lambda a: f"\n{a}\n",
    "displaystyle": lambda a: r"\displaystyle " + a,
    "thin space after": lambda a: a + r"\,",
    "thin space before": lambda a: r"\, " + a,
    "negative space": lambda a: r"\!" + a,
    "zero-width before": lambda a: "\u200b" + a,
    "zero-width after": lambda a: a + "\u200b",
    "byte order mark": lambda a: "\ufeff" + a,
    "no-break space": lambda a: "\u00a0" + a + "\u00a0",
    "bold stars": lambda a: f"**{a}**",
    "boldsymbol": lambda a: rf"\boldsymbol{{{a}}}",
    "mathbf": lambda a: rf"\mathbf{{{a}}}" if re.fullmatch(r"-?\d+", a) else None,
    "braces": lambda a: f"{{{a}}}",
    "Chinese full stop": lambda a: a + "。",
    "Chinese sentence": lambda a: f"答案是{a}",
    "Chinese sentence, colon": lambda a: f"答案：{a}。",
    "Chinese brackets": lambda a: f"【{a}】" if "," not in a else None,
    "the answer is": lambda a: f"The answer is {a}",
    "trailing break": lambda a: a + r" \\",
    "color": lambda a: rf"\color{{blue}}{{{a}}}",
    "textcolor": lambda a: rf"\textcolor{{red}}{{{a}}}",
    "left dot": lambda a: rf"\left. {a} \right." if _INTEGER.match(a) else None,
}


def _named(a: str) -> str | None:
    bare = re.sub(r"\\(?:frac|sqrt|left|right|pi|cdot|sin|cos|tan|ln|log)", "", a)
    shape = re.search(
        r"[=<>,≥≠≤]|\^\Z|\\(?:le|ge|text|in|ne|begin|cup|mbox|pm)|[a-zA-Z]{3,}|^[A-E]\Z", bare
    )
    return None if shape else f"x = {a}"


def _spaced(a: str) -> str | None:
    return (
        re.sub(r"\s*([=+,])\s*", r" \1 ", a)
        if "\\text" not in a and "\\!" not in a and not re.search("[,<>!]", a)
        else None
    )


def _tight(a: str) -> str | None:
    if re.search(r"\\(?:text|mbox|mathrm)|\d \d|\\[,!;: ]", a) or re.search(
        r"[a-zA-Z]{2,} ", a.replace("\\", "")
    ):
        return None
    return re.sub(r"(?<![a-zA-Z\\])\s+|\s+(?![a-zA-Z\s])", "", a)


def _replaced(old: str, new: str) -> Rewriting:
    return lambda a: a.replace(old, new) if old in a else None


FORM: dict[str, Rewriting] = {
    "spaced": _spaced,
    "tight": _tight,
    "dfrac": _replaced("\\frac", "\\dfrac"),
    "tfrac": _replaced("\\frac", "\\tfrac"),
    "cfrac": _replaced("\\frac", "\\cfrac"),
    "left right": lambda a: (
        a.replace("(", "\\left(").replace(")", "\\right)")
        if "(" in a and "\\left" not in a and "text" not in a and balanced(a)
        else None
    ),
    "no left right": lambda a: re.sub(r"\\(?:left|right)", "", a) if "\\left" in a else None,
    "big": lambda a: (
        a.replace("(", "\\big(").replace(")", "\\big)")
        if "(" in a and "\\left" not in a and "text" not in a
        else None
    ),
    "le to leq": lambda a: (
        re.sub(r"\\le(?![a-z])", r"\\leq", a) if re.search(r"\\le(?![a-z])", a) else None
    ),
    "leq to sign": lambda a: (
        re.sub(r"\\leq?(?![a-z])", "≤", a) if re.search(r"\\leq?(?![a-z])", a) else None
    ),
    "geq to sign": lambda a: (
        re.sub(r"\\geq?(?![a-z])", "≥", a) if re.search(r"\\geq?(?![a-z])", a) else None
    ),
    "leqslant": lambda a: (
        re.sub(r"\\leq?(?![a-z])", r"\\leqslant ", a) if re.search(r"\\leq?(?![a-z])", a) else None
    ),
    "pi sign": lambda a: (
        re.sub(r"\\pi(?![a-z])\s*", "π", a) if re.search(r"\\pi(?![a-z])", a) else None
    ),
    "infinity sign": _replaced("\\infty", "∞"),
    "cup sign": _replaced("\\cup", "∪"),
    "cdot to times": _replaced("\\cdot", "\\times"),
    "minus sign": lambda a: a.replace("-", "−") if "-" in a and "\\text" not in a else None,
    "root of a digit": lambda a: (
        re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", a) if re.search(r"\\sqrt\{\d\}", a) else None
    ),
    "power of a digit": lambda a: (
        re.sub(r"\^\{(\w)\}", r"^\1", a) if re.search(r"\^\{\w\}", a) else None
    ),
    "power in braces": lambda a: re.sub(r"\^(\w)", r"^{\1}", a) if re.search(r"\^\w", a) else None,
    "degree words": lambda a: (
        re.sub(r"\^\{?\\circ\}?\Z", " degrees", a) if re.search(r"\^\{?\\circ\}?\Z", a) else None
    ),
    "degree text": lambda a: (
        re.sub(r"\^\{?\\circ\}?\Z", r" \\text{ degrees}", a)
        if re.search(r"\^\{?\\circ\}?\Z", a)
        else None
    ),
    "degree sign": lambda a: (
        re.sub(r"\^\{?\\circ\}?", "°", a) if re.search(r"\^\{?\\circ\}?", a) else None
    ),
    "no degree": lambda a: (
        re.sub(r"\^\{?\\circ\}?\Z", "", a) if re.search(r"^-?[\d.]+\^\{?\\circ\}?\Z", a) else None
    ),
    "percent word": lambda a: (
        re.sub(r"\\?%\Z", " percent", a) if re.search(r"\d\\?%\Z", a) else None
    ),
    "text bare": lambda a: (
        re.sub(r"\\text\{([^{}]*)\}", r"\1", a) if re.fullmatch(r"\\text\{[^{}]*\}", a) else None
    ),
    "text to mathrm": lambda a: (
        a.replace("\\text{", "\\mathrm{") if re.fullmatch(r"\\text\{\w+\}", a) else None
    ),
    "text to textbf": lambda a: (
        a.replace("\\text{", "\\textbf{") if re.fullmatch(r"\\text\{[^{}]*\}", a) else None
    ),
    "capitals": lambda a: (
        a.upper().replace("\\TEXT", "\\text") if re.fullmatch(r"\\text\{[a-z]{3,}\}", a) else None
    ),
    "matrix to brackets": _replaced("pmatrix", "bmatrix"),
    "set sides": lambda a: (
        a.replace("\\{", "\\left\\{").replace("\\}", "\\right\\}")
        if "\\{" in a and "\\left" not in a
        else None
    ),
    "lbrace": lambda a: (
        a.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
        if "\\{" in a and "\\left" not in a
        else None
    ),
    "wide digits": lambda a: a.translate(_WIDE) if re.fullmatch(r"[\d()+=,\-]+", a) else None,
    "superscripts": lambda a: (
        re.sub(r"\^(?:\{(\d+)\}|(\d))", lambda m: (m[1] or m[2]).translate(_SUPERSCRIPTS), a)
        if re.search(r"[a-z)]\^(?:\d(?!\d)|\{\d+\})", a)
        else None
    ),
    "root sign": lambda a: (
        re.sub(r"\\sqrt\{(\d+)\}", r"√\1", a)
        if re.search(r"(?<![\\{])\\sqrt\{\d+\}\Z", a)
        else None
    ),
    "with name": _named,
}


def _grouped(a: str, separator: str) -> str | None:
    if not re.fullmatch(r"-?\d{4,}(?:\.\d+)?", a):
        return None
    return f"{int(a.split('.')[0]):,}".replace(",", separator) + (
        "." + a.split(".")[1] if "." in a else ""
    )


def _decimal(a: str) -> str | None:
    if (found := _FRACTION.match(a)) is None or int(found[3]) == 0:
        return None
    value = Fraction(int(found[2]), int(found[3]))
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return found[1] + repr(float(value)) if rest == 1 and len(repr(float(value))) < 12 else None


def _as_fraction(a: str) -> str | None:
    if not _DECIMAL.match(a):
        return None
    value = Fraction(a)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _mixed(a: str) -> str | None:
    found = _FRACTION.match(a)
    if (
        found is None
        or int(found[3]) < 2
        or int(found[2]) < int(found[3])
        or int(found[2]) % int(found[3]) == 0
    ):
        return None
    whole, rest = divmod(int(found[2]), int(found[3]))
    return f"{found[1]}{whole}\\frac{{{rest}}}{{{found[3]}}}"


def _vulgar(a: str) -> str | None:
    found = _FRACTION.match(a)
    return (
        found[1] + _VULGAR[f"{found[2]}/{found[3]}"]
        if found and f"{found[2]}/{found[3]}" in _VULGAR
        else None
    )


def _scientific(a: str) -> str | None:
    """`3.83e35` as a product with a power of ten, and a long round integer too."""
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)[eE]\+?(-?\d+)", a)
    if found is not None:
        return rf"{found[1]} \times 10^{{{int(found[2])}}}"
    if _INTEGER.match(a) and len(a.lstrip("-")) > 2 and a.endswith("00"):
        digits = a.lstrip("-").rstrip("0")
        sign, zeros = "-" if a.startswith("-") else "", len(a.lstrip("-")) - len(digits)
        return rf"{sign}{digits} \times 10^{{{zeros}}}"
    return None


def _exponent_letter(a: str) -> str | None:
    if _INTEGER.match(a) and len(a.lstrip("-")) > 2 and a.endswith("000"):
        return f"{float(a):e}".replace("e+0", "e").replace("e+", "e").replace("00000e", "e")
    return None


def _plus_minus(a: str) -> str | None:
    found = re.fullmatch(r"([^,=]*?)\s*\\pm\s*([^,=]+)", a)
    if found is None:
        return None
    first = found[1]
    return f"{first}+{found[2]}, {first}-{found[2]}" if first else f"{found[2]}, -{found[2]}"


def _to_plus_minus(a: str) -> str | None:
    items = [item.strip() for item in a.split(",")]
    if len(items) == 2 and sorted(items) == sorted((items[0], "-" + items[0])):
        return rf"\pm {items[0]}"
    return None


def _number(template: str) -> Rewriting:
    return lambda a: template.replace("@", a) if _INTEGER.match(a) or _DECIMAL.match(a) else None


def _fraction(template: str) -> Rewriting:
    def rewrite(a: str) -> str | None:
        found = _FRACTION.match(a)
        return (
            template.replace("S", found[1]).replace("N", found[2]).replace("D", found[3])
            if found
            else None
        )

    return rewrite


def balanced(a: str) -> bool:
    return a.count("(") == a.count(")") and "[" not in a and "]" not in a


NUMBER: dict[str, Rewriting] = {
    "thousands comma": lambda a: _grouped(a, ","),
    "thousands braces": lambda a: _grouped(a, "{,}"),
    "thousands negative space": lambda a: _grouped(a, ",\\!"),
    "thousands thin space": lambda a: _grouped(a, "\\,"),
    "thousands tilde": lambda a: _grouped(a, "~"),
    "thousands blank": lambda a: _grouped(a, " "),
    "thousands narrow blank": lambda a: _grouped(a, "\u202f"),
    "thousands apostrophe": lambda a: _grouped(a, "'"),
    "point zero": lambda a: a + ".0" if _INTEGER.match(a) else None,
    "point zeros": lambda a: a + ".00" if _INTEGER.match(a) else None,
    "trailing zero": lambda a: a + "0" if _DECIMAL.match(a) else None,
    "no leading zero": lambda a: (
        a.replace("0.", ".", 1) if re.match(r"-?0\.", a) and _DECIMAL.match(a) else None
    ),
    "plus sign": lambda a: "+" + a if re.match(r"\d+\Z", a) else None,
    "decimal": _decimal,
    "fraction": _as_fraction,
    "mixed number": _mixed,
    "vulgar fraction": _vulgar,
    "power of ten": _scientific,
    "letter e": _exponent_letter,
    "plus and minus listed": _plus_minus,
    "listed as plus-minus": _to_plus_minus,
    "slash": _fraction("SN/D"),
    "slash in brackets": _fraction("S(N/D)"),
    "sign in numerator": lambda a: _fraction(r"\frac{-N}{D}")(a) if a.startswith("-") else None,
    "sign in denominator": lambda a: _fraction(r"\frac{N}{-D}")(a) if a.startswith("-") else None,
    "over": _fraction(r"S{N \over D}"),
    "percent": _number(r"@\%"),
    "percent bare": _number("@%"),
    "percent word on number": _number("@ percent"),
    "degrees": _number(r"@^\circ"),
    "degrees in braces": _number(r"@^{\circ}"),
    "degree sign on number": _number("@°"),
    "degree word on number": _number("@ degrees"),
    "dollars escaped": lambda a: rf"\${a}" if re.match(r"[\d.]+\Z", a) else None,
    "dollars word": _number(r"@ \text{ dollars}"),
    "cm": _number(r"@ \text{ cm}"),
    "cm mathrm": _number(r"@\,\mathrm{cm}"),
    "CM": _number("@ CM"),
    "Days": _number("@ Days"),
    "hours": _number(r"@\text{ hours}"),
    "square metres": _number(r"@ \text{ m}^2"),
    "Chinese yuan": _number("@元"),
    "Chinese pieces": _number("@个"),
    "Chinese centimetres": _number("@厘米"),
    "Chinese text unit": _number(r"@\text{元}"),
    "Chinese text unit, blank": _number(r"@\text{ 个}"),
    "Chinese degrees": _number("@度"),
    "Chinese: so": _number("所以答案是@。"),
    "Chinese: answer in all": _number("答：一共有@个。"),
    "text number": _number(r"\text{@}"),
    "mbox number": _number(r"\mbox{@}"),
    "equation chain": lambda a: f"x = {int(a) - 1} + 1 = {a}" if re.match(r"\d+\Z", a) else None,
    "underline": _number(r"\underline{@}"),
    "approx": lambda a: None,
}
NOT_WITH: dict[str, str] = {}


def rewritings(reference: str) -> Iterator[tuple[str, str]]:
    """(name, answer) for every rewriting that applies."""
    for family in (ANY, FORM, NUMBER):
        for name, rewrite in family.items():
            answer = rewrite(reference)
            if answer is not None and (answer != reference or name == "itself"):
                yield name, answer
