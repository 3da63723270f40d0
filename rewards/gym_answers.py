"""Exact comparison of answers to reasoning-gym's tasks, since the package's own scorers accept
wrong ones.

They accept NaN for every complex number, any four numbers that make 24, lists of numbers that are
off by one, times that differ by a minute, and a right list with more words behind it; some run the
answer as Python. So answers to tasks with a single right value are compared with the reference
here, and expressions are evaluated here.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from .syntax import expression

Entry = Mapping[str, Any]
"""A row in the form of reasoning-gym's items: question, answer, metadata."""
Check = Callable[[str, Entry], bool]
_MOST_CHARS = 10_000
# few digits of exponent, as Fraction computes the power of ten exactly
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")
_HEXADECIMAL = re.compile(r"[+-]?0x[0-9a-f]+", re.I)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(
    r"\$?\s*(?:\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(-?\d+)\s*/\s*(-?\d+))\s*\$?"
)
_COMPLEX = re.compile(r"(?:([+-]?[\d.]+)(?![\d.]*[ij]))?(?:([+-]?[\d.]*)[ij])?")
_POWER_DIGITS = 3
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def is_right(task: str, answer: str, entry: Entry) -> bool:
    """Whether an answer to a task in `EXACT` is right."""
    answer = answer.strip()
    if not answer or len(answer) > _MOST_CHARS:
        return False
    try:
        return EXACT[task](answer, entry)
    # the answer is not of the form of the task
    except (ValueError, ArithmeticError, KeyError, TypeError, RecursionError):
        return False


def _reference(entry: Entry) -> str:
    return str(entry["answer"]).strip()


def _text(answer: str, entry: Entry) -> bool:
    return _words(answer) == _words(_reference(entry))


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _number(text: str) -> Fraction:
    """The exact value of a number. Raises ValueError for infinity, NaN and surrounding text."""
    text = _THOUSANDS.sub("", text.strip().strip("$"))
    if _HEXADECIMAL.fullmatch(text):
        return Fraction(int(text, 16))
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"no number: {text[:50]}")
    return Fraction(text)


def _value(answer: str, entry: Entry) -> bool:
    """Compares numbers if the reference is one, else texts."""
    try:
        wanted = _number(_reference(entry))
    except ValueError:
        return _text(answer, entry)
    return _number(answer) == wanted


def _numeral(answer: str, entry: Entry) -> bool:
    """Compares numerals of any base by their digits, without leading zeros and case."""
    return answer.casefold().lstrip("0") == _reference(entry).casefold().lstrip("0")


def _last_digit(answer: str, entry: Entry) -> bool:
    """Compares decimals up to one unit of the reference's last digit, as the task allows."""
    wanted = Decimal(_reference(entry))
    exponent = wanted.as_tuple().exponent
    assert isinstance(exponent, int), "a reference is finite"
    return abs(_number(answer) - Fraction(wanted)) <= Fraction(10) ** exponent


def _three_digits(answer: str, entry: Entry) -> bool:
    """Compares numbers at three significant digits, as the task asks."""
    return _rounded(_number(answer)) == _rounded(_number(_reference(entry)))


def _rounded(value: Fraction) -> Decimal:
    try:
        shown = f"{Decimal(value.numerator) / Decimal(value.denominator):.{_POWER_DIGITS - 1}e}"
    except InvalidOperation as error:
        raise ValueError("no number of this size") from error
    return Decimal(shown)


def _fraction(answer: str, entry: Entry) -> bool:
    """Compares numerators and denominators: a fraction that can be reduced is not simplified."""
    return _parts(answer) == _parts(_reference(entry))


def _parts(text: str) -> tuple[int, int]:
    if (match := _FRACTION.fullmatch(text)) is None:
        raise ValueError("no fraction")
    above, below = (int(part) for part in match.groups() if part is not None)
    return (-above, -below) if below < 0 else (above, below)


def _complex(answer: str, entry: Entry) -> bool:
    given, wanted = _complex_parts(answer), _complex_parts(_reference(entry))
    return all(abs(a - b) <= Fraction(1, 1000) for a, b in zip(given, wanted, strict=True))


def _complex_parts(text: str) -> tuple[Fraction, Fraction]:
    text = re.sub(r"[\s$()*]", "", text)
    match = _COMPLEX.fullmatch(text)
    if not text or match is None:
        raise ValueError("no complex number")
    real, imaginary = match.groups()
    if imaginary is not None and imaginary in ("", "+", "-"):
        imaginary += "1"
    return _number(real or "0"), _number(imaginary or "0")


def _list(answer: str, entry: Entry) -> bool:
    """Compares lists of numbers in order: `['1.5', '2']`, `[1.5, 2]` or `1.5, 2`."""
    return _items(answer) == _items(_reference(entry))


def _items(text: str) -> list[Fraction]:
    inner = text.removeprefix("[").removesuffix("]")
    return [_number(item.strip().strip("'\"")) for item in inner.split(",") if item.strip()]


def _matrix(answer: str, entry: Entry) -> bool:
    """Compares matrices of small integers, whose rows are lines or lists."""
    return _cells(answer) == _cells(_reference(entry))


def _cells(text: str) -> list[list[int]]:
    if "[" in text:
        cells = json.loads(text)
        rows = cells if cells and isinstance(cells[0], list) else [cells]
        if not all(type(cell) is int for row in rows for cell in row):
            raise ValueError("a matrix of something else")
        return [list(row) for row in rows]
    return [
        [int(word) for word in line.replace(",", " ").split()]
        for line in text.splitlines()
        if line.strip()
    ]


def _factors(answer: str, entry: Entry) -> bool:
    """Compares prime factors in any order."""
    return sorted(map(int, _split(answer))) == sorted(map(int, _split(_reference(entry))))


def _split(text: str) -> list[str]:
    return re.split(r"\s*(?:×|\*|x|·|\\times|\\cdot)\s*", text.strip("$ "))


def _duration(answer: str, entry: Entry) -> bool:
    """Compares days and times of day: their numbers and the signs between them must be equal."""
    return _clock(answer) == _clock(_reference(entry))


def _clock(text: str) -> list[str | Fraction]:
    words = re.findall(r"\d+(?:\.\d+)?|[a-z]+|[^\s\da-z]", text.casefold().replace("days", "day"))
    return [Fraction(word) if word[0].isdigit() else word for word in words]


def _word_list(answer: str, entry: Entry) -> bool:
    """Compares words in order, including their case."""
    return re.split(r"\s*,\s*", answer) == re.split(r"\s*,\s*", _reference(entry))


def _letters(answer: str, entry: Entry) -> bool:
    """Compares strings of letters, or lists of them."""
    return re.sub(r"[\s,'\"\[\]]", "", answer) == _reference(entry)


def _makes(target: str | int) -> Check:
    """The check of an expression with + - * / of exactly the numbers in the row, whose value must
    be the target (a number, or its key in the metadata)."""

    def check(answer: str, entry: Entry) -> bool:
        metadata = entry["metadata"]
        text = re.sub(r"[×xX]", "*", answer.replace("÷", "/"))
        if len(text) > 400 or not re.fullmatch(r"[\d+\-*/() ]+", text):
            raise ValueError("no arithmetic expression")
        used: list[int] = []
        try:
            value = _evaluated(expression(text), used)
        except (SyntaxError, MemoryError) as error:
            raise ValueError("no arithmetic expression") from error
        wanted = Fraction(str(metadata[target] if isinstance(target, str) else target))
        return value == wanted and sorted(used) == sorted(
            int(number) for number in metadata["numbers"]
        )

    return check


def _evaluated(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluated(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and (act := _OPERATORS.get(type(node.op))) is not None:
        return Fraction(act(_evaluated(node.left, used), _evaluated(node.right, used)))
    raise ValueError("no arithmetic expression")


def _for(check: Check, names: str) -> dict[str, Check]:
    return dict.fromkeys(names.split(), check)


EXACT: Mapping[str, Check] = {
    **_for(
        _value,
        "aiw basic_arithmetic bitwise_arithmetic calendar_arithmetic chain_sum count_bits"
        " count_primes",
    ),
    **_for(
        _value,
        "decimal_chain_sum gcd gsm_symbolic lcm leg_counting letter_counting number_sequence"
        " products",
    ),
    **_for(_value, "self_reference simple_equations simple_geometry"),
    **_for(_text, "isomorphic_strings spell_backward syllogism"),
    **_for(_numeral, "base_conversion"),
    **_for(_last_digit, "decimal_arithmetic"),
    **_for(_three_digits, "power_function"),
    **_for(_fraction, "fraction_simplification"),
    **_for(_complex, "complex_arithmetic"),
    **_for(_list, "number_filtering number_sorting"),
    **_for(_matrix, "binary_matrix spiral_matrix"),
    **_for(_letters, "string_insertion"),
    **_for(_factors, "prime_factorization"),
    **_for(_duration, "time_intervals"),
    **_for(_word_list, "word_sorting"),
    **_for(_makes("target"), "countdown"),
    **_for(_makes(24), "puzzle24"),
}
"""Tasks whose answers are compared here instead of by the package's scorer."""

_RUNS = "its scorer runs the answer as code"
_CONSTANT = "its scorer pays an answer that does not depend on the problem"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("intermediate_integration", "n_queens", "polynomial_multiplication", "simple_integration"),
        _RUNS,
    ),
    **dict.fromkeys(("coin_flip", "game_of_life_halting", "polynomial_equations"), _CONSTANT),
    "composite": "its items name a task of their own, which is the one to allow",
}
"""Tasks that cannot be graded, with the reason."""
