"""Tests of code as the data sets write them, turned into plans that keep every expected answer out of the sandbox.

`FunctionPlan`: calls to make and values to expect, compared by the parent. Test code that is more than that (loops, tolerances,
helpers) becomes a `JudgePlan`: it runs in a second sandbox that never holds the model's code, and its calls of the tested
function are carried over one by one. `ProgramPlan`: inputs on stdin and outputs to expect on stdout.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import functools
import io
import json
import pickle
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sandbox.child import encode, source_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call, e.g. `Call(source="add(2, 3)", expected=5)`."""

    source: str
    expected: Any
    """In the plain JSON form of `child.encode`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionPlan:
    """Calls to evaluate after the model's code."""

    calls: tuple[Call, ...]
    before: str = ""
    after: str = ""
    """Code in front of and behind the model's, e.g. imports and a test's set-up."""
    from_json: bool = False
    """The expected values come from JSON, which has no tuples: a list will do for one and the reverse."""
    entry: str = ""
    prompt: str = ""
    """What a bare function body continues, as in HumanEval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePlan:
    """Test code for the judge, and the names in it that stand for the model's functions."""

    test: str
    names: Mapping[str, str]
    """From the name in the test to the name in the model's code."""
    setup: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    entry: str = ""
    prompt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramPlan:
    """Inputs and expected outputs of a whole program."""

    cases: tuple[tuple[str, str], ...]


Plan = FunctionPlan | JudgePlan | ProgramPlan

_CASE_COLUMNS = [
    "tests",
    "test",
    "input_output",
    "public_test_cases",
    "private_test_cases",
    "public_tests",
    "private_tests",
]


def plan_of(columns: Mapping[str, Any], answer: str = "") -> Plan:
    """The plan for a data row. Raises ValueError if the row holds no tests or they cannot be read.

    Forms: MBPP (`test_list`, `test_setup_code`, `test_imports`); HumanEval (`prompt`, `test`, `entry_point`); inputs and
    outputs as in CodeContests, APPS, LiveCodeBench and verl's (`tests`, `test`, `input_output`, `public_test_cases`,
    `private_test_cases`, `public_tests`, `private_tests`, or the `answer`), with `fn_name` or `metadata.func_name`
    where a function and not a program is tested.
    """
    if columns.get("test_list"):
        imports, setup = columns.get("test_imports") or (), str(columns.get("test_setup_code") or "")
        entry = str(columns.get("entry_point") or "")
        return _asserts_plan(tuple(map(str, columns["test_list"])), tuple(map(str, imports)), setup, entry)
    if columns.get("entry_point") and isinstance(test := columns.get("test"), str):
        return _check_plan(str(columns.get("prompt") or ""), test, str(columns["entry_point"]))
    cases: list[tuple[Any, Any]] = []
    name = _function_name(columns)
    for value in [columns[key] for key in _CASE_COLUMNS if columns.get(key)] or ([answer] if answer else []):
        found, its_name = _cases(value)
        cases, name = cases + found, name or its_name
    if not cases:
        raise ValueError(
            f"the row has no tests: none of test_list, test, {', '.join(_CASE_COLUMNS)} nor the answer holds any"
        )
    if name:
        return _json_plan(cases, name)
    return ProgramPlan(cases=tuple((str(given), str(wanted)) for given, wanted in cases))


@functools.lru_cache(maxsize=4096)
def _asserts_plan(tests: tuple[str, ...], imports: tuple[str, ...], setup: str, entry: str) -> Plan:
    """MBPP: assertions on a function that they name. The set-up stands behind the code, whose classes it may use."""
    before, source = "\n".join(imports), "\n".join(tests)
    tree = _parsed(source, "test_list")
    known = set(dir(builtins)) | _bound(_parsed(before, "test_imports")) | _bound(tree)
    known |= _bound(_parsed(setup, "test_setup_code"))
    names = {entry} if entry else _called(tree) - known or _outermost(tree)
    if not names:
        raise ValueError(f"the tests call no function that they do not define: {source[:200]!r}; give entry_point")
    if (calls := _calls(tree.body, names)) is not None:
        return FunctionPlan(calls=calls, before=before, after=setup)
    modules = sorted(_read(tree) - known & set(sys.stdlib_module_names))  # what the model's code was to import
    setup_code = "\n".join([before, *(f"import {name}" for name in modules)])
    aliases = {name: name for name in names}
    return JudgePlan(test=source, names=aliases, setup=(setup_code, setup), before=before, after=setup)


@functools.lru_cache(maxsize=4096)
def _check_plan(prompt: str, test: str, entry: str) -> Plan:
    """HumanEval: a function `check(candidate)`. The prompt's imports and helpers stand in front of the code."""
    tree = _parsed(test, "test")
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    if check is None:
        raise ValueError("the column 'test' defines no function check(candidate)")
    before = prompt.partition(f"def {entry}(")[0]
    if (calls := _calls(check.body, {"candidate"})) is not None:
        return FunctionPlan(calls=calls, before=before, after=f"candidate = {entry}", entry=entry, prompt=prompt)
    code = f"{test}\ncheck(candidate)\n"
    names = {"candidate": entry, entry: entry}
    return JudgePlan(test=code, names=names, setup=(prompt,), before=before, entry=entry, prompt=prompt)


def _calls(statements: Iterable[ast.stmt], names: set[str]) -> tuple[Call, ...] | None:
    """The calls behind plain assertions, or None if some statement is more than that."""
    calls: list[Call] = []
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value:
            continue  # `assert True` says nothing
        if (call := _call(statement.test, names)) is None:
            return None
        calls.append(call)
    return tuple(calls) or None


def _call(test: ast.expr, names: set[str]) -> Call | None:
    def tested(node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names

    if tested(test):  # only the value's truth counts, and every object has one
        return Call(source=f"not not {ast.unparse(test)}", expected=True)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and tested(test.operand):
        return Call(source=ast.unparse(test), expected=True)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        left, right = test.left, test.comparators[0]
        if not tested(left):
            left, right = right, left
        if tested(left):
            try:
                return Call(source=ast.unparse(left), expected=encode(ast.literal_eval(right)))
            except (ValueError, TypeError):  # the expected side is more than a literal
                return None
    return None


def _parsed(source: str, what: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the column {what!r} is no Python: {error}") from None


def _called(tree: ast.AST) -> set[str]:
    return {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def _read(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _outermost(tree: ast.Module) -> set[str]:
    """The one function that every assertion compares the value of: a tested function may be named like a built-in."""
    sides = [n.test.left if isinstance(n.test, ast.Compare) else n.test for n in tree.body if isinstance(n, ast.Assert)]
    names = {side.func.id for side in sides if isinstance(side, ast.Call) and isinstance(side.func, ast.Name)}
    return names if len(names) == 1 else set()


def _bound(tree: ast.AST) -> set[str]:
    """Every name that the code itself binds."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def _json_plan(cases: Sequence[tuple[Any, Any]], name: str) -> FunctionPlan:
    """LiveCodeBench's functional form: each line of the input is an argument in JSON, the output one value in JSON."""
    callee = f"(Solution().{name} if 'Solution' in globals() else {name})"
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is no name of a function")
    calls = []
    for given, wanted in cases:
        try:
            words = (
                [json.loads(line) for line in given.splitlines() if line.strip()] if isinstance(given, str) else given
            )
            value = json.loads(wanted) if isinstance(wanted, str) else wanted
        except ValueError as error:
            raise ValueError(f"a functional test is no JSON: {error}: {str(given)[:100]!r}") from None
        calls.append(Call(source=f"{callee}({', '.join(map(source_of, words))})", expected=encode(value)))
    return FunctionPlan(calls=tuple(calls), from_json=True)


def _function_name(columns: Mapping[str, Any]) -> str:
    metadata = columns.get("metadata")
    if isinstance(metadata, str) and metadata.startswith("{"):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None  # some data sets keep free text there
    named = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return str(columns.get("fn_name") or named or "")


def _cases(value: Any) -> tuple[list[tuple[Any, Any]], str]:
    """Pairs of input and output, and the function's name if the data gives one."""
    if isinstance(value, str):
        return _cases(_unpacked(value))
    if isinstance(value, Mapping):
        name = str(value.get("fn_name") or "")
        if "input_output" in value:
            return _cases(value["input_output"])
        for given, wanted in (("inputs", "outputs"), ("input", "output")):
            if isinstance(value.get(given), list) and isinstance(value.get(wanted), list):
                if len(value[given]) != len(value[wanted]):
                    raise ValueError(f"{len(value[given])} inputs but {len(value[wanted])} outputs in the tests")
                return list(zip(value[given], value[wanted], strict=True)), name
    if isinstance(value, list) and all(
        isinstance(case, Mapping) and "input" in case and "output" in case for case in value
    ):
        return [(_text(case["input"], "stdin"), _text(case["output"], "stdout")) for case in value], ""
    raise ValueError(f"tests of an unknown form: {str(value)[:100]!r}")


def _text(value: Any, key: str) -> Any:
    return value.get(key, "") if isinstance(value, Mapping) else value


def _unpacked(text: str) -> Any:
    """JSON, or JSON or plain lists behind base64, zlib and perhaps pickle, as LiveCodeBench ships its private tests."""
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"the tests are no JSON: {error}") from None
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
        return _PlainUnpickler(io.BytesIO(data)).load() if data[:1] == b"\x80" else json.loads(data)
    except (binascii.Error, zlib.error, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"the tests are neither JSON nor packed JSON: {error}: {text[:60]!r}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Plain containers and scalars only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the tests' pickle asks for {module}.{name}; only plain values are read")
