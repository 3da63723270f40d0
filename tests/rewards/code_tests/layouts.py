"""Rows as public data sets lay them out, each with right and wrong programs: the table behind the
code verdicts' tests.

`layouts.yaml` has them but for those that are too long to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Layout(NamedTuple):
    name: str
    columns: dict[str, Any]
    right: list[str]
    wrong: list[str]
    whole: bool = False
    """The programs are whole completions, fences included."""


_DIGITS = "7" * 5000
_HUGE = 10**5000  # more digits than `int` reads and `str` writes by default
LONG = [
    Layout(
        "large output",
        {"tests": [{"input": "", "output": "".join(f"{i}\n" for i in range(400_000))}]},
        ["print(*range(400000), sep='\\n')"],
        ["print(*range(399999), sep='\\n')"],
    ),
    Layout(
        "TACO, huge integers",
        {"input_output": f'{{"inputs": ["1\\n"], "outputs": ["{_DIGITS}"]}}'},
        ["print('7' * 5000)"],
        ["print('7' * 4999)"],
    ),
    Layout(
        "huge integers, printed",
        {"tests": [{"input": _HUGE, "output": _HUGE + 1}]},
        ["print(int(input()) + 1)"],
        ["print(int(input()))"],
    ),
    Layout(
        "TACO call, huge integers",
        {"input_output": f'{{"fn_name": "f", "inputs": [[5000]], "outputs": [{_DIGITS}]}}'},
        ["def f(n): return int('7' * n)"],
        ["def f(n): return 7"],
    ),
    Layout(
        "call, huge integers both ways",
        {"input_output": f'{{"fn_name": "f", "inputs": [[{_DIGITS}]], "outputs": [{_DIGITS}]}}'},
        ["def f(n): return n"],
        ["def f(n): return n + 1"],
    ),
]


def layouts() -> dict[str, list[Layout]]:
    """By group: programs, cases, python, more (of all kinds), and numpy (whose programs import
    it)."""
    text = (Path(__file__).parent / "layouts.yaml").read_text()
    found = {group: [Layout(**row) for row in rows] for group, rows in yaml.safe_load(text).items()}
    found["cases"] += LONG
    return found


ASSERTION = """
def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False


def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match
"""


def plus_check(inputs: str, results: str) -> str:
    """HumanEval+'s `test` column."""
    return (
        f"import numpy as np\n{ASSERTION}\ndef check(candidate):\n    inputs = {inputs}\n   "
        f" results = {results}\n    for i, (inp, exp) in enumerate(zip(inputs, results)):\n       "
        " assertion(candidate(*inp), exp, 0)\n"
    )


def plus_module(inputs: str, results: str, call: str) -> str:
    """MBPP+'s `test` column."""
    return (
        f"import numpy as np\nfrom math import inf\n{ASSERTION}\ninputs = {inputs}\nresults ="
        f" {results}\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n    {call}\n"
    )
