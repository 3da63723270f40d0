"""Reads a data row's tests as a plan: which columns hold them, and in which form."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..sandbox.child import source_of
from ..syntax import expression, literal
from .assertions import asserts_plan, check_plan, module_plan
from .cases import Case, cases_of, named_in_metadata, plan_of_cases, unpacked
from .names import parsed
from .plans import Plan
from .solutions import defined_names

_CASE_COLUMNS = [
    *("tests", "test", "input_output", "test_cases", "verification_info"),
    *("public_test_cases", "private_test_cases", "official_tests"),
    *("public_tests", "private_tests", "generated_tests"),
]


def plan_of(columns: Mapping[str, Any], answer: str = "") -> Plan:
    """Returns the plan for a data row. Raises ValueError if the row holds no tests, or tests that
    cannot be graded.

    Python: MBPP and MBPP+ (`test_list`, `test`, `test_setup_code`, `test_imports`), AceCode
    (`test_cases`), HumanEval, HumanEval+ and LeetCodeDataset (`prompt`, `test`, `entry_point`),
    KodCode and BigCodeBench (`test`, a module for pytest or unittest), verl's `assert_case`. Inputs
    and outputs: any of `_CASE_COLUMNS` together, or else the `answer`, in the forms of `cases_of`,
    with `fn_name` or `metadata.func_name` if a function and not a program is tested.
    """
    entry = str(columns.get("entry_point") or "")
    if entry.isidentifier() and "class Solution" in str(columns.get("starter_code")):
        entry = f"Solution().{entry}"
    defined = defined_names(columns)
    test = columns.get("test") or columns.get("tests") or columns.get("test_code") or answer
    code = test if isinstance(test, str) and _is_code(test) else ""
    if columns.get("test_list"):
        tests = _texts(columns["test_list"], "test_list")
        imports = _texts(columns.get("test_imports") or (), "test_imports")
        setup = str(columns.get("test_setup_code") or "")
        # MBPP+ has its own, larger tests in `test`: answers fitted to `test_list` must not pass
        if not code:
            return asserts_plan(tests, imports, setup, entry, defined)
        return module_plan(code, "\n".join(imports), setup, entry, defined, _outermost(tests))
    if entry and code:
        prompt = columns.get("prompt")
        prompt = prompt if isinstance(prompt, str) else ""
        if "def check(" in code:
            return check_plan(prompt, code, entry)
        return module_plan(code, "", "", entry, defined, frozenset())
    if entry and isinstance(test, str) and test.lstrip()[:1] not in ("[", "{") and " " in test:
        raise ValueError(
            "the column 'test' defines no function check(candidate) and asserts nothing"
        )
    for asserted in (
        columns.get("test_cases"),
        _assert_case(columns.get("input_output") or answer),
        unpacked(answer) if answer[:2] in ('["', "['") and "assert" in answer else None,
    ):
        if (
            isinstance(asserted, Sequence)
            and asserted
            and all(isinstance(t, str) and "assert" in t for t in asserted)
        ):
            return asserts_plan(tuple(asserted), (), "", entry, defined)
    if code:
        return module_plan(code, "", "", "", defined, frozenset())
    return _plan_of_cases(columns, answer)


def _plan_of_cases(columns: Mapping[str, Any], answer: str) -> Plan:
    names = [str(columns.get(key) or "") for key in ("fn_name", "function_name", "entry_point")]
    name = next(filter(None, names), "") or named_in_metadata(columns.get("metadata"))
    name = name.removeprefix("Solution().")
    cases: list[Case] = []
    for value in [columns[key] for key in _CASE_COLUMNS if columns.get(key)] or (
        [answer] if answer else []
    ):
        if given := cases_of(value):
            cases += given
    if not cases:
        raise ValueError(
            f"the row has no tests: none of test_list, {', '.join(_CASE_COLUMNS)} nor the answer"
            " holds any"
        )
    if not name and (asserts := _asserted(cases)):
        return asserts_plan(asserts, (), "", "", frozenset())
    return plan_of_cases(cases, name, str(columns.get("starter_code") or ""))


def _asserted(cases: Sequence[Case]) -> tuple[str, ...]:
    """Assertions for cases whose inputs are calls such as `add(2, 3)`; empty for other cases."""
    asserted = []
    for case in cases:
        # texts only: `str` of an integer with more than 4,300 digits raises ValueError
        given = case.given.strip() if isinstance(case.given, str) and not case.name else ""
        if re.fullmatch(r"[A-Za-z_]\w*\(.*\)", given, re.DOTALL) is None:
            return ()
        try:
            text = isinstance(case.wanted, str)
            wanted = case.wanted.strip() if text else source_of(case.wanted)
            literal(wanted)
            expression(given)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ()
        asserted.append(f"assert {given} == {wanted}")
    return tuple(asserted)


def _is_code(text: str) -> bool:
    """Whether a column is Python rather than JSON or packed JSON."""
    return text.lstrip()[:1] not in ("[", "{") and any(word in text for word in ("assert", "def "))


def _texts(value: Any, what: str) -> tuple[str, ...]:
    """The texts of a list, which some files store as the source of a list."""
    if isinstance(value, str):
        try:
            value = literal(value)
        except (ValueError, SyntaxError):
            value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"the column {what!r} is no list of texts: {str(value)[:100]!r}")
    return tuple(value)


def _assert_case(value: Any) -> Any:
    """verl's assertions, whose columns of inputs and outputs are empty; None if there are none."""
    if isinstance(value, str) and '"assert_case"' in value:
        value = unpacked(value)
    return value.get("assert_case") if isinstance(value, Mapping) else None


def _outermost(tests: Sequence[str]) -> frozenset[str]:
    """The functions that assertions call outermost, e.g. `f` in `assert f(g(1)) == 2`."""
    tree = parsed("\n".join(tests), "test_list")
    calls = [
        n.test.left if isinstance(n.test, ast.Compare) else n.test
        for n in tree.body
        if isinstance(n, ast.Assert)
    ]
    return frozenset(
        c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)
    )
