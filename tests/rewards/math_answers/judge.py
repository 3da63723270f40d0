"""Whether two LaTeX answers mean the same, by an evaluation that shares no code with the package.
None: no opinion."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import mpmath as mp

_spec = importlib.util.spec_from_file_location(
    "judge_reader", Path(__file__).parent / "judge_reader.py"
)
_reader = importlib.util.module_from_spec(_spec)
sys.modules["judge_reader"] = _reader
_spec.loader.exec_module(_reader)
Form, Reader, Unknown = _reader.Form, _reader.Reader, _reader.Unknown


def same(first: str, second: str) -> bool | None:
    """Whether two answers mean the same; None without an opinion, also if it depends on the reading
    of `f(x)`."""
    long = re.search(r"\^\{?\d{3}|\d{22}", first + second) is not None
    with mp.workdps(1500 if long else 30):
        opinions = {_same_read(first, second, applies) for applies in (True, False)}
    return opinions.pop() if len(opinions) == 1 else None


def readable(text: str) -> bool:
    return _read(text, False) is not None


def _same_read(first: str, second: str, applies: bool) -> bool | None:
    a, b = _read(first, applies), _read(second, applies)
    return None if a is None or b is None else _equal(a, b)


def _read(text: str, applies: bool) -> Form | None:
    try:
        return Reader(text, applies).whole()
    except (Unknown, ZeroDivisionError, ValueError, OverflowError, RecursionError, TypeError):
        return None


def _equal(a: Form, b: Form) -> bool | None:
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        loose = {a.kind, b.kind} & {"noted", "value"}
        return None if loose else False
    if a.kind == "scalar":
        return _close(a.parts, b.parts)
    if a.kind == "value":
        return None if a.parts[0] != b.parts[0] else _equal(a.parts[1], b.parts[1])
    if a.kind in ("list", "set", "union"):
        left = list(b.parts)
        for item in a.parts:
            match = next((o for o in left if _equal(item, o)), None)
            if match is None:
                return None if any(_equal(item, o) is None for o in left) else False
            left.remove(match)
        return True
    if a.kind == "equation":
        return _proportional(a.parts, b.parts)
    found = [
        _equal(x, y) if isinstance(x, Form) and isinstance(y, Form) else x == y
        for x, y in zip(a.parts, b.parts, strict=True)
    ]
    return False if False in found else None if None in found else True


def _close(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool | None:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    bound = mp.mpf(10) ** (10 - mp.mp.dps)
    if any(abs(x) < bound or abs(y) < bound for x, y in pairs):  # zero, or all digits cancelled
        return all(abs(x - y) <= bound * max(abs(x), abs(y), 1) for x, y in pairs)
    return all(abs(x - y) <= bound * max(abs(x), abs(y)) for x, y in pairs)


def _proportional(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool | None:
    ratios = [
        x / y for x, y in zip(a, b, strict=True) if x is not None and y is not None and y != 0
    ]
    if len(ratios) < 3:
        return None
    return all(abs(r - ratios[0]) <= 1e-13 * abs(ratios[0]) for r in ratios) and ratios[0] != 0
