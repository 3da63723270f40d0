"""Compares values and outputs of a model's program with the expected ones. The program controls
every byte of its own.

Values are compared in the plain JSON form of `child.encode`, never as live objects: without pickle
or `__eq__`, without hashing the model's numbers (numbers chosen to have equal hashes would
make a dict quadratic), and no deeper than the expected value goes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FLOAT_TOLERANCE = 1e-6  # relative to max(1, |expected|)
# `child.encode` sends longer ints as hexadecimal; int() of decimal digits is quadratic
_MOST_DIGITS = 1300
_WHOLE = re.compile(rb"-?\d+")
_ZEROS = re.compile(rb"\.0+")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Reply:
    """A child's answer to one call: a value in plain JSON form, or the name and text of the
    exception that it raised."""

    value: Any = None
    error: str = ""
    text: str = ""


def parse_reply(line: bytes) -> Reply:
    """Parses one line from a child. A line that is no well-formed reply counts as an error of the
    program."""
    try:
        data = _JSON.decode(line.decode())
    except (ValueError, RecursionError) as error:
        return Reply(
            error="Unreadable", text=f"the returned value is no plain value: {type(error).__name__}"
        )
    if type(data) is dict and data.keys() == {"ok"}:
        return Reply(value=data["ok"])
    if (
        type(data) is dict
        and data.keys() == {"error", "text"}
        and all(type(part) is str for part in data.values())
    ):
        return Reply(error=printable(data["error"]) or "Exception", text=printable(data["text"]))
    return Reply(error="Unreadable", text="the reply has no value")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("an integer of too many digits")
    return int(digits)


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_int=_bounded_int, parse_constant=_refused)


def printable(text: str) -> str:
    """The text for messages and logs: no lone surrogates or control characters, at most 300
    characters."""
    return "".join(
        c if c.isprintable() else " " for c in text[:300].encode("utf-8", "replace").decode()
    )


def equal(expected: Any, got: Any, tolerance: float = FLOAT_TOLERANCE) -> bool:
    """Whether two values in plain JSON form have the same value and type.

    Types must match (True is not 1, a tuple is not a list) except where Python's `==` ignores them
    too: a whole float equals the int and the reverse, a fraction equals its value, and 0 or 1
    passes for a bool. Where a float is expected, a number may differ by `tolerance * max(1,
    |expected|)`. NaN equals only NaN.
    """
    if type(got) is dict and got.keys() == {"ratio"}:
        got = _quotient(got["ratio"], exact=type(expected) is int)
    if type(expected) is bool:
        # MBPP's own solutions return 0 and 1 for bools
        return type(got) in (bool, int) and expected == got
    if type(got) is bool:
        return False
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return _numbers_equal(expected, got, tolerance)
    if type(expected) is not type(got):
        return False
    if type(expected) is list:
        return len(expected) == len(got) and all(
            equal(e, g, tolerance) for e, g in zip(expected, got, strict=True)
        )
    if type(expected) is dict:
        ((kind, body),) = expected.items()
        if got.keys() != {kind} or type(body) is not type(got[kind]):
            return False
        if kind == "dict":
            return _dicts_equal(body, got[kind], tolerance)
        if kind == "set":
            return _sets_equal(body, got[kind], tolerance)
        return equal(body, got[kind], tolerance)
    return bool(expected == got)


def _quotient(parts: list[Any], exact: bool) -> int | float | None:
    """The value of a fraction; None for a malformed one, and where an int is expected but the value
    is not whole."""
    above, below = (int(part["int"], 16) if type(part) is dict else part for part in parts)
    if type(above) is not int or type(below) is not int or below == 0:
        return None
    if above % below == 0:
        return above // below
    try:
        return None if exact else above / below
    except OverflowError:
        return None


def _numbers_equal(expected: int | float, got: int | float, tolerance: float) -> bool:
    if type(expected) is int:
        return expected == got
    try:
        difference = abs(float(expected) - float(got))
    except OverflowError:  # an int beyond every float
        return False
    return difference <= tolerance * max(1.0, abs(float(expected)))


def _dicts_equal(expected: list[Any], got: list[Any], tolerance: float) -> bool:
    if len(expected) != len(got) or not all(type(pair) is list and len(pair) == 2 for pair in got):
        return False
    values = {canonical(key): value for key, value in got}
    keys = [(canonical(key), value) for key, value in expected]
    return len(values) == len(got) and all(
        key in values and equal(value, values[key], tolerance) for key, value in keys
    )


def _sets_equal(expected: list[Any], got: list[Any], tolerance: float) -> bool:
    if len(expected) != len(got):
        return False
    if sorted(map(canonical, expected)) == sorted(map(canonical, got)):
        return True
    if not all(type(item) in (int, float) for item in (*expected, *got)):
        return False
    return all(
        _numbers_equal(e, g, tolerance) for e, g in zip(sorted(expected), sorted(got), strict=True)
    )


def canonical(value: Any) -> str:
    """A string that is equal for equal values, whatever the order of their sets and dicts."""
    if type(value) is list:
        return f"[{','.join(map(canonical, value))}]"
    if type(value) is dict and len(value) == 1:
        ((kind, body),) = value.items()
        if type(body) is list and kind in ("set", "dict", "tuple"):
            parts = list(map(canonical, body))
            return f"{kind}({','.join(parts if kind == 'tuple' else sorted(parts))})"
    if type(value) is float and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def without_tuples(value: Any) -> Any:
    """The value with lists for tuples, for tests whose values are JSON."""
    if type(value) is dict and value.keys() == {"tuple"}:
        value = value["tuple"]
    return [without_tuples(item) for item in value] if type(value) is list else value


def is_plain(value: Any) -> bool:
    """Whether a reply has the form that `child.encode` gives to plain values."""
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is not dict:
        return True
    if len(value) != 1:
        return False
    ((kind, body),) = value.items()
    if kind == "dict":
        return type(body) is list and all(
            type(p) is list and len(p) == 2 and is_plain(p) for p in body
        )
    if kind in ("tuple", "set"):
        return type(body) is list and is_plain(body)
    if kind == "complex":
        return type(body) is list and len(body) == 2 and all(type(p) in (int, float) for p in body)
    if kind == "ratio":
        return (
            type(body) is list
            and len(body) == 2
            and all(type(p) is int or _is_long(p) for p in body)
        )
    return kind in ("int", "float", "bytes") and type(body) is str


def _is_long(value: Any) -> bool:
    if type(value) is not dict or value.keys() != {"int"} or type(value["int"]) is not str:
        return False
    return re.fullmatch(r"-?0x[0-9a-f]+", value["int"]) is not None


def same_output(expected: str, got: bytes, tolerance: float = FLOAT_TOLERANCE) -> bool:
    """Whether a program printed the expected lines of tokens.

    White space between tokens and at line ends is ignored, and so are blank lines at the start and
    the end. A decimal may differ by `tolerance`, and `3.0` passes for a whole 3.
    """
    wanted, printed = _lines(expected.encode("utf-8", "surrogatepass")), _lines(got)
    return len(wanted) == len(printed) and all(
        _tokens_equal(w, p, tolerance) for w, p in zip(wanted, printed, strict=True)
    )


def _lines(text: bytes) -> list[list[bytes]]:
    lines = [line.split() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    first = next((number for number, line in enumerate(lines) if line), 0)
    return lines[first:]


def _tokens_equal(wanted: Sequence[bytes], printed: Sequence[bytes], tolerance: float) -> bool:
    if wanted == printed:
        return True
    return len(wanted) == len(printed) and all(
        w == p or _close(w, p, tolerance) for w, p in zip(wanted, printed, strict=True)
    )


def _close(wanted: bytes, printed: bytes, tolerance: float) -> bool:
    if b"." not in wanted and b"e" not in wanted.lower():
        return (
            _WHOLE.fullmatch(wanted) is not None
            and printed.partition(b".")[0] == wanted
            and (_ZEROS.fullmatch(printed, len(wanted)) is not None)
        )
    if len(printed) > 64 or not _NUMBER.fullmatch(wanted) or not _NUMBER.fullmatch(printed):
        return False
    value = float(wanted)
    return math.isfinite(value) and abs(value - float(printed)) <= tolerance * max(1.0, abs(value))
