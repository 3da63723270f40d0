"""Units of measurement with their dimensions and sizes, and words that only count things."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache


def words(text: str) -> frozenset[str]:
    """The set of words in a text, for tables."""
    return frozenset(text.split())


_PREFIXES = {
    "n": 1e-9,
    "µ": 1e-6,
    "μ": 1e-6,
    "m": 1e-3,
    "c": 1e-2,
    "d": 0.1,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
}
_LONG_PREFIXES = {
    **{"nano": 1e-9, "micro": 1e-6, "milli": 1e-3, "centi": 1e-2, "deci": 0.1},
    **{"kilo": 1e3, "mega": 1e6, "giga": 1e9},
}
_TABLE = """
length m meter meters metre metres 米 | 1 | P
length in inch inches 英寸 | 0.0254
length ft foot feet 英尺 | 0.3048
length yd yard yards | 0.9144
length mi mile miles 英里 | 1609.344
length 里 | 500
mass g gram grams gramme grammes 克 | 1 | P
mass t ton tons tonne tonnes 吨 | 1e6
mass lb lbs pound pounds | 453.59237
mass oz ounce ounces | 28.349523125
mass 斤 | 500
time s sec secs second seconds 秒 秒钟 | 1 | P
time min mins minute minutes 分 分钟 | 60
time h hr hrs hour hours 时 小时 | 3600
time day days 天 日 | 86400
time week weeks wk 周 星期 | 604800
time month months 月 个月 | 2629800
time year years yr yrs 年 | 31557600
angle rad radian radians 弧度 | 1
angle deg degree degrees ° 度 | degree
part % percent percents percentage pct 百分 | 0.01
dollar dollar dollars usd USD $ 美元 | 1
dollar cent cents ¢ | 0.01
euro euro euros eur EUR € 欧元 | 1
sterling gbp GBP £ 英镑 | 1
yuan yuan rmb RMB cny CNY ¥ 元 块 圆 人民币 | 1
yuan 角 | 0.1
rupee rupee rupees inr INR ₹ | 1
celsius celsius °C ℃ 摄氏度 | 1
fahrenheit fahrenheit °F ℉ | 1
kelvin K kelvin kelvins | 1
current A amp amps ampere amperes 安 安培 | 1 | P
amount mol mole moles | 1 | P
bit bit bits | 1
bit byte bytes | 8
"""
_DERIVED: dict[str, tuple[str, float]] = {
    "mph": ("mi/h", 1.0), "kmh": ("km/h", 1.0), "kph": ("km/h", 1.0),
    "L l liter liters litre litres 升": ("dm^3", 1.0),
    "mL ml milliliter milliliters millilitre millilitres 毫升": ("cm^3", 1.0),
    "ha hectare hectares 公顷": ("m^2", 1e4), "acre acres": ("m^2", 4046.8564224), "亩": ("m^2",
    2000 / 3), "gal gallon gallons": ("L", 3.785411784), "quart quarts": ("L", 0.946352946),
    "Hz hertz 赫兹": ("s^-1", 1.0), "N newton newtons 牛 牛顿": ("kg m s^-2", 1.0),
    "J joule joules 焦 焦耳": ("kg m^2 s^-2", 1.0), "W watt watts 瓦 瓦特": ("kg m^2 s^-3", 1.0),
    "Pa pascal pascals 帕": ("kg m^-1 s^-2", 1.0),
    "V volt volts 伏 伏特": ("kg m^2 s^-3 A^-1", 1.0),
    "C coulomb coulombs 库仑": ("A s", 1.0), "Ω ohm ohms 欧姆": ("kg m^2 s^-3 A^-2", 1.0),
    "T tesla teslas": ("kg s^-2 A^-1", 1.0), "F farad farads": ("kg^-1 m^-2 s^4 A^2", 1.0),
    "eV": ("J", 1.602176634e-19), "cal calorie calories": ("J", 4.184), "erg ergs": ("J", 1e-7),
    "dyn dyne dynes": ("N", 1e-5), "Nm": ("N m", 1.0),
    "pm picometer picometers picometre picometres": ("m", 1e-12),
    "ps picosecond picoseconds": ("s", 1e-12), "pF": ("F", 1e-12), "THz terahertz": ("Hz", 1e12),
    "TW": ("W", 1e12), "TJ": ("J", 1e12), "TeV": ("J", 1.602176634e-7), "atm": ("Pa", 101325.0),
    "bar bars": ("Pa", 1e5), "au AU": ("m", 1.495978707e11), "pc parsec parsecs": ("m", 3.0857e16),
    "Å angstrom angstroms": ("m", 1e-10), "ly": ("m", 9.4607e15),
}  # fmt: skip
_CHINESE_PREFIX = {"千": 1e3, "公": 1e3, "厘": 1e-2, "毫": 1e-3, "分": 0.1, "微": 1e-6}
_PREFIXED_SYMBOLS = ("Hz", "N", "J", "W", "Pa", "V", "C", "Ω", "T", "F", "L", "l", "eV", "cal",
"bar", "pc", "ohm", "hertz",
                     "watt", "watts", "joule", "joules", "volt", "volts", "newton", "newtons",
                     "pascal", "calorie", "calories",
                     "parsec", "parsecs")  # fmt: skip
MEASURE_WORDS = words(
    "个 只 本 人 名 条 块 张 种 次 组 件 辆 棵 支 箱 袋 页 岁 头 匹 位 朵 盒 道 题 层 排 行 列 "
    "颗 根 把 台 套 份 倍 分 对 双 枚 座 所 间 户 家 班 瓶 杯 碗 筐 桶 步 站 点 片 束 串 封 面 "
    "幅 架 艘 枝 株 粒 滴 段 圈 项 位数 个数 种方法 种可能 人次 名学生 个苹果 "
)
_NOT_A_NOUN = words(
    "is are was were be been not no nor false true wrong right correct incorrect if but or and "
    "could can may might maybe perhaps when where unless otherwise except less more than plus "
    "minus times over under about only either neither both else instead cannot never then so "
    "because since which that it this does do did has have possibly probably through to with "
    "without for in of as another other different any some all none per thousand million billion "
    "trillion dozen hundred half twice double triple squared cubed first second third at by "
    "from vs versus mod modulo equals equal"
)
"""Words that no unit holds. Without them `5 \\text{ is false}` and `5 \\text{ but it could be 6}`
would be 5 of something."""
MULTIPLIERS = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """A measure such as km/h (`dimension` and `factor`), or words that say what is counted, without
    a dimension."""

    factor: float
    dimension: tuple[tuple[str, int], ...]
    words: tuple[str, ...] = ()

    @property
    def measures(self) -> bool:
        return not self.words


PERCENT = Unit(0.01, (("part", 1),))
DEGREE = Unit(math.pi / 180, (("angle", 1),))

_Entry = tuple[float, dict[str, int]]


def _build() -> tuple[dict[str, _Entry], dict[str, _Entry]]:
    exact: dict[str, _Entry] = {}
    for line in _TABLE.strip().splitlines():
        words, factor, *flags = (part.strip() for part in line.split("|"))
        dimension, *aliases = words.split()
        size = math.pi / 180 if factor == "degree" else float(factor)
        for alias in aliases:
            exact[alias] = (size, {dimension: 1})
        if "P" in flags:
            symbol, *long = aliases
            for prefix, scale in _PREFIXES.items():
                if prefix == "d" and symbol != "m":
                    continue
                exact.setdefault(prefix + symbol, (scale * size, {dimension: 1}))
            for prefix, scale in _LONG_PREFIXES.items():
                for name in long:
                    exact[prefix + name] = (scale * size, {dimension: 1})
            for prefix, scale in _CHINESE_PREFIX.items() if long[-1] > "\u4e00" else ():
                exact.setdefault(prefix + long[-1], (scale * size, {dimension: 1}))
    for aliases_text, (definition, times) in _DERIVED.items():
        factor_, dims = _compound(definition, exact, {}) or (1.0, {})
        for alias in aliases_text.split():
            exact[alias] = (factor_ * times, dims)
    for symbol in _PREFIXED_SYMBOLS:
        prefixes = _PREFIXES | _LONG_PREFIXES if len(symbol) > 2 else _PREFIXES
        for prefix, scale_ in prefixes.items():
            if prefix == "d" and symbol not in "Ll":
                continue
            exact.setdefault(prefix + symbol, (scale_ * exact[symbol][0], exact[symbol][1]))
    lower: dict[str, _Entry] = {}
    for alias, entry in exact.items():
        if len(alias) > 1:
            lower.setdefault(alias.lower(), entry)
    lower |= {name: exact[name] for name in ("mm", "ms", "mg")} | {"ml": exact["mL"]}
    return exact, lower


_PIECE = re.compile(r"([^\s*·⋅/^\d\-−()]+)\s*(?:\^?\s*[({]?\s*([-−]?\d+)\s*[)}]?)?")


def _compound(text: str, exact: Mapping[str, _Entry], lower: Mapping[str, _Entry]) -> _Entry | None:
    """Size and dimensions of a unit such as `kg m^2/s^2`; None if a part is no unit."""
    factor, dims = 1.0, dict[str, int]()
    sign = 1
    at = 0
    text = text.strip()
    while at < len(text):
        if text[at] in " *·⋅()":
            at += 1
            continue
        if text[at] == "/":
            sign, at = -1, at + 1
            continue
        if (match := _PIECE.match(text, at)) is None:
            return None
        entry = exact.get(match.group(1)) or lower.get(match.group(1).lower())
        if entry is None:
            return None
        power = sign * int((match.group(2) or "1").replace("−", "-"))
        if abs(power) > 12:
            return None
        factor *= float(entry[0]) ** power
        for name, exponent in entry[1].items():
            dims[name] = dims.get(name, 0) + exponent * power
        at = match.end()
    return (factor, dims) if at else None


_EXACT, _LOWER = _build()
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bper\b|每"), "/"),
    (re.compile(r"\b(?:sq|square)\.?\s+([a-z]+)", re.I), r"\1^2"),
    (re.compile(r"\b(?:cu|cubic)\.?\s+([a-z]+)", re.I), r"\1^3"),
    (re.compile(r"\b([a-z]+)\s+squared\b", re.I), r"\1^2"),
    (re.compile(r"\b([a-z]+)\s+cubed\b", re.I), r"\1^3"),
    (re.compile(r"平方([^\s/]+)"), r"\1^2"),
    (re.compile(r"立方([^\s/]+)"), r"\1^3"),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
    (re.compile(r"(?<=[A-Za-z])\.(?=\s|$)|~"), " "),
)  # fmt: skip


def is_unit(word: str) -> bool:
    """Whether a single word is a unit."""
    return word in _EXACT or (len(word) > 1 and word.lower() in _LOWER)


def is_unit_word(word: str) -> bool:
    """Whether letters directly behind a number are a unit, as mg, Km and CM are; mv is a
    product."""
    if len(word) == 2:
        # `5 pm` is a time
        known = word in _EXACT and word not in ("pm", "ps")
        return known or (word[0].isupper() and word.lower() in _EXACT)
    return is_unit(word)


@lru_cache(maxsize=4096)
def read_unit(text: str) -> Unit | None:
    """The unit that the text behind a number states: a measure, or one to four words that count
    something; None for other texts."""
    text = text.strip().strip(",;").strip()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    if (entry := _compound(text, _EXACT, _LOWER)) is not None:
        return Unit(entry[0], tuple(sorted((n, e) for n, e in entry[1].items() if e)))
    counts = text[:1] in MEASURE_WORDS and len(text) <= 6 and not text.isascii()
    if counts or text in MEASURE_WORDS:
        return Unit(1.0, (), (text,))
    if re.fullmatch(r"units?(?:\^[23])?", text) is not None:  # square units
        return Unit(1.0, (), (text.replace("units", "unit"),))
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not 1 <= len(words) <= 4 or re.search(r"[^\w\s'\-/]|\d", text):
        return None
    if not all(word.isascii() for word in words):
        return None
    of = [i for i, word in enumerate(words) if word == "of"]
    if any(word in _NOT_A_NOUN for word in words if word != "of") or (of and of[0] == 0):
        return None
    return Unit(1.0, (), tuple(words))


def same_count(a: Unit, b: Unit) -> bool:
    """Whether two counted things may be the same, i.e. share a word, in singular or plural."""
    stems = [{word.rstrip("s") for word in unit.words} for unit in (a, b)]
    return bool(stems[0] & stems[1])


def may_be(counted: Unit, measured: Unit) -> bool:
    """Whether counted words may stand for a measure, as `school days` for days. `unit` may be any
    measure; words in other scripts are not examined."""
    if not all(word.isascii() for word in counted.words) or counted.words[0].startswith("unit"):
        return True
    units = [unit for word in counted.words if (unit := read_unit(word)) is not None]
    return any(unit.measures and unit.dimension == measured.dimension for unit in units)
