"""Numbers in words: `forty-two`, `negative five`, `three fourths`, 二十五, 二分之一."""

from __future__ import annotations

import re

_SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: value for value, word in enumerate(_SMALL)}
_VALUES |= {word: 20 + 10 * index for index, word in enumerate(_TENS)}
_LARGE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_ORDINALS = ["half", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_PARTS = {word: value for value, word in enumerate(_ORDINALS, start=2)}
_PARTS |= {"quarter": 4, "halve": 2, "hundredth": 100}
_WORD = "|".join([*sorted(_VALUES, key=len, reverse=True), *_LARGE])
_ENGLISH = re.compile(
    rf"(?P<sign>(?:negative|minus)\s)?\b(?P<number>(?:{_WORD})"
    rf"(?:(?:\s|-|(?<=hundred)\sand\s|(?<=thousand)\sand\s)(?:{_WORD})\b)*)\b"
    rf"(?:(?P<half>\sand\sa\shalf)\b|[\s-](?P<part>{'|'.join(_PARTS)})s?\b"
    r"|(?!-|\sof\s(?:the|these|those|them)\b))",
    re.IGNORECASE,
)
_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_NUMERAL = "[零〇一二两三四五六七八九十百千万亿]+"
CHINESE_NUMBER = re.compile(_NUMERAL)
_CHINESE = re.compile(
    rf"(?P<sign>负)?(?:百分之(?P<percent>{_NUMERAL})|(?P<bottom>{_NUMERAL})分之(?P<top>{_NUMERAL})"
    rf"|(?P<number>{_NUMERAL})(?:点(?P<after>[零〇一二三四五六七八九]+))?"
    r"(?=\W|\Z"
    r"|[个只本人名条块张种件辆棵支箱袋页岁头匹位朵盒道题颗根把台套份倍对双枚座间户家瓶杯碗步站束串封项天年月日周小分秒米克吨升千厘毫公斤里平立度](?!式)"
    r"|[元次](?:\W|\Z)))"
)
_STATING = re.compile(
    r"(?:\b(?:is|are|was|were|has|have|had|be|equals?|gets?|needs?|exactly|only|with|of|or|and"
    r"|makes?|made|earn(?:s|ed)|pa(?:ys|id)|spen(?:ds|t)|sold|bought|ate|read|costs?|t(?:akes|ook)"
    r"|gave|saved|received|contains?|remain)\s"
    r"|[是为有共得到剩于需负要了或和]|^\W*)\Z",
    re.IGNORECASE,
)
"""Words before a number that a sentence states, as in `there are two left`; not `both of the
two`."""
_SIGNED = re.compile(
    r"(?<![\d)}\]])(?<![\d)}\]]\s)\b(?:negative|minus)\s(?=\$?\.?\d)|负(?=\d)", re.I
)
_BELOW_ZERO = re.compile(
    r"(?<![\d-])(\d+(?:\.\d+)?)(?=\s?(?:degrees?|°\s?[CF]?)?\sbelow zero)|零下(?=\d)"
)


def chinese_number(text: str) -> int:
    """The value of Chinese numerals: `一百二十三` is 123, `三万` 30000."""
    if all(c in _DIGITS for c in text):
        return int("".join(str(_DIGITS[c]) for c in text))
    total = section = digit = 0
    for character in text:
        if (value := _DIGITS.get(character)) is not None:
            digit = value
        elif (power := _POWERS[character]) >= 10**4:
            total = (total + section + digit) * power
            section = digit = 0
        else:
            section += (digit or 1) * power
            digit = 0
    return total + section + digit


def is_power(text: str) -> bool:
    """Whether Chinese numerals are only a power of ten, as the 万 of 5万."""
    return all(c in _POWERS for c in text)


def with_signs(text: str) -> str:
    """The text with a minus sign for `negative 5` and `5 degrees below zero`."""
    if "inus " in text or "egative " in text or "负" in text:
        text = _SIGNED.sub("-", text)
    if "below zero" in text or "零下" in text:
        text = _BELOW_ZERO.sub(lambda match: "-" + (match.group(1) or ""), text)
    return text


def in_digits(sentence: str) -> str:
    """The sentence with digits for the numbers in words that it states."""

    def written(match: re.Match[str]) -> str:
        before = sentence[max(0, match.start() - 12) : match.start()]
        groups = match.groupdict()
        part = groups.get("part") or groups.get("half") or groups.get("bottom")
        value = _value(match) if part or _STATING.search(before) is not None else None
        return match.group() if value is None else value

    pattern = _ENGLISH if sentence.isascii() else _CHINESE
    return pattern.sub(written, sentence)


def read_number(text: str) -> str | None:
    """The number in digits that a text spells in words; None if it is no number in words."""
    pattern = _ENGLISH if text[:1].isascii() else _CHINESE
    match = pattern.fullmatch(text)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> str | None:
    groups = match.groupdict()
    sign = "-" if groups["sign"] else ""
    if "percent" not in groups:
        return _english_value(sign, groups)
    if groups["percent"]:
        return f"{sign}{chinese_number(groups['percent'])}%"
    if groups["bottom"]:
        return f"{sign}{chinese_number(groups['top'])}/{chinese_number(groups['bottom'])}"
    if is_power(groups["number"]) and groups["number"] != "十":
        return None
    whole = f"{sign}{chinese_number(groups['number'])}"
    after = groups["after"]
    return f"{whole}.{''.join(str(_DIGITS[c]) for c in after)}" if after else whole


def _english_value(sign: str, groups: dict[str, str | None]) -> str | None:
    total = section = 0
    room = 10**12  # what comes next must be smaller: `two three` is no number
    for word in re.findall("[a-z]+", str(groups["number"]).lower()):
        if word == "and":
            continue
        if (small := _VALUES.get(word)) is not None:
            if not small < room:
                return None
            section, room = section + small, 10 if small >= 20 else 1
        elif word == "hundred":
            section, room = (section or 1) * 100, 100
        else:
            total, section, room = total + (section or 1) * _LARGE[word], 0, 10**12
    if groups["half"]:
        return f"{sign}{total + section} 1/2"
    if groups["part"]:
        return f"{sign}{total + section}/{_PARTS[groups['part'].lower()]}"
    return f"{sign}{total + section}"
