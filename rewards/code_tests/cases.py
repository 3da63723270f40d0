"""Plans for tests that are inputs and outputs, of whole programs on stdin and stdout or of
functions with JSON values.

Forms, and who writes so: `{"inputs", "outputs", "fn_name"}` (APPS, TACO, Eurus-2, verl); lists of
`{"input", "output"}` with `testtype` or `type`, `fn_name` or `metadata.func_name` in each
(LiveCodeBench, DeepCoder, PRIME's SYNTHETIC-1); `{"input": [...], "output": [...]}` (CodeContests);
base64 of zlib of JSON or of a pickle of plain values (LiveCodeBench).
"""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import decimal
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sandbox.child import encode, source_of
from ..syntax import expression, literal
from .nodes import HELPERS, Signature, signature_of
from .plans import Call, FunctionPlan, Plan, ProgramPlan

_MOST_PACKED = 1 << 28  # bytes that packed tests may unfold to
_MOST_DIGITS = 1_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """An input and output as the data has them, and the name of the function to call, empty for a
    program."""

    given: Any
    wanted: Any
    name: str = ""


def cases_of(value: Any, name: str = "") -> list[Case]:
    """The cases in a column. Raises ValueError for an unknown form."""
    if isinstance(value, str):
        return cases_of(unpacked(value), name)
    if isinstance(value, Mapping):
        name = _name_in(value) or name
        for key in ("input_output", "test_cases", "tests", "ground_truth"):
            if key in value:
                return cases_of(value[key], name)
        for given, wanted in (("inputs", "outputs"), ("input", "output")):
            if isinstance(value.get(given), list) and isinstance(value.get(wanted), list):
                if len(value[given]) != len(value[wanted]):
                    raise ValueError(
                        f"{len(value[given])} inputs but {len(value[wanted])} outputs in the tests"
                    )
                return [Case(g, w, name) for g, w in zip(value[given], value[wanted], strict=True)]
        value = [value]
    if isinstance(value, list) and all(
        isinstance(case, Mapping) and _sides(case) for case in value
    ):
        cases = []
        for case in value:
            given, wanted = _sides(case)
            stdin = case.get("testtype", case.get("type")) in ("stdin", "stdin_stdout")
            cases.append(Case(case[given], case[wanted], "" if stdin else _name_in(case) or name))
        return cases
    raise ValueError(f"tests of an unknown form: {str(value)[:100]!r}")


_GIVEN = ("input", "inputs", "stdin", "args", "arguments")
_WANTED = ("output", "outputs", "stdout", "expected_output", "expected_stdout", "expected")


def _sides(case: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the input and the output; empty if either is missing."""
    given = next((name for name in _GIVEN if name in case), None)
    wanted = next((name for name in _WANTED if name in case), None)
    return () if given is None or wanted is None else (given, wanted)


def _name_in(value: Mapping[str, Any]) -> str:
    return str(
        value.get("fn_name")
        or value.get("func_name")
        or value.get("function_name")
        or named_in_metadata(value.get("metadata"))
        or ""
    )


def named_in_metadata(metadata: Any) -> str:
    if isinstance(metadata, str) and metadata.startswith("{"):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None  # some data sets keep free text there
    return str(metadata.get("func_name") or "") if isinstance(metadata, Mapping) else ""


def plan_of_cases(cases: Sequence[Case], name: str = "", starter: str = "") -> Plan:
    """The plan for cases. `name`: the function, if the row and not the case names it; `starter`:
    the signature that the model was given. Raises ValueError if they cannot be graded."""
    names = {case.name or name for case in cases}
    if len(names) > 1:
        raise ValueError(f"the tests call different functions: {', '.join(sorted(names))}")
    if name := names.pop():
        return _function_plan(cases, name, starter)
    return ProgramPlan(cases=tuple((text_of(case.given), text_of(case.wanted)) for case in cases))


def text_of(value: Any) -> str:
    """A program's input or output as text, from a text or a list of lines (APPS), perhaps behind a
    key or in a list of one. Raises ValueError for another form."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Mapping) and len(value) == 1 and set(value) <= {"stdin", "stdout"}:
        return text_of(next(iter(value.values())))
    if isinstance(value, list):
        return "\n".join(
            text_of(line).removesuffix("\n") if len(value) > 1 else text_of(line) for line in value
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"a test on stdin and stdout is neither text nor lines: {str(value)[:100]!r}"
        )
    # Python limits the digits that `str` writes
    return str(decimal.Decimal(value) if isinstance(value, int) else value)


def _function_plan(cases: Sequence[Case], name: str, starter: str) -> FunctionPlan:
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is no name of a function")
    callee = (
        f"(Solution().{name} if 'Solution' in globals() and hasattr(Solution, '{name}') else"
        f" {name})"
    )
    signature = signature_of(starter, name)
    if all(case.wanted in (None, "null", "None") for case in cases):
        signature = dataclasses.replace(signature, in_place=False)
    native = [not isinstance(case.given, str) for case in cases]
    # TACO and APPS wrap outputs; verl's harness accepts `output` and `output[0]`
    wrapped = all(native) and all(
        isinstance(case.wanted, list) and len(case.wanted) == 1 for case in cases
    )
    calls = []
    for case in cases:
        text = isinstance(case.given, str)
        words, keywords = _arguments(case.given)
        value = (
            _value(case.wanted, "the output")
            if text and isinstance(case.wanted, str)
            else case.wanted
        )
        if not text:  # APPS's own harness does so
            words, value = [_with_numbers(word) for word in words], _with_numbers(value)
            if wrapped:
                value = [_with_numbers(value[0])]
        try:
            source = signature.call(
                callee,
                [source_of(w) for w in words],
                {k: source_of(v) for k, v in keywords.items()},
            )
        except TypeError as error:
            raise ValueError(str(error)) from None
        calls.append(Call(source=source, expected=encode(value), wrapped=wrapped))
    before = HELPERS if signature != Signature() else ""
    return FunctionPlan(calls=tuple(calls), from_json=True, usual=True, before=before, entry=name)


def _arguments(given: Any) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments, from lines of JSON (one an argument), a list, a mapping, or
    `a = 2, b = 3`."""
    if isinstance(given, str) and re.match(r"\s*[A-Za-z_]\w* = ", given):
        try:  # LeetCode's: a = 2, b = 3
            call = expression(f"f({given.strip()})")
            words = call.keywords if isinstance(call, ast.Call) else []
            return [], {str(each.arg): ast.literal_eval(each.value) for each in words}
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"the arguments of a test are no Python: {given[:100]!r}") from None
    if isinstance(given, str):
        try:
            return [_value(line, "an argument") for line in given.splitlines() if line.strip()], {}
        except ValueError:
            return [_value(given, "an argument")], {}  # one value over several lines
    if isinstance(given, Mapping):
        return [], {str(key): value for key, value in given.items()}
    return list(given) if isinstance(given, list) else [given], {}


def _value(text: str, what: str) -> Any:
    """The value of JSON, or of a Python literal. Raises ValueError."""
    try:
        return json.loads(text, parse_int=_integer)
    except ValueError as error:
        try:
            return literal(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(
                f"{what} of a functional test is no JSON: {error}: {text[:100]!r}"
            ) from None


def _with_numbers(value: Any) -> Any:
    """The mapping with numbers for keys that are all digits, which JSON cannot express."""
    if (
        isinstance(value, Mapping)
        and value
        and all(str(key).lstrip("-").isdecimal() for key in value)
    ):
        return {int(key): item for key, item in value.items()}
    return value


def _integer(digits: str) -> int:
    """An integer from digits. The decimal module reads more of them than `int` does, as contest
    tests need."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError("an integer of too many digits")
    return int(digits) if len(digits) < 4000 else int(decimal.Decimal(digits))


def unpacked(text: str) -> Any:
    """The value of JSON, or of JSON or a pickle of plain values behind zlib and base64, as
    LiveCodeBench packs its private tests. Raises ValueError."""
    if text.lstrip()[:1] in ("[", "{"):
        return _value(text, "a column")
    try:
        opened = zlib.decompressobj()
        data = opened.decompress(base64.b64decode(text, validate=True), _MOST_PACKED)
        if opened.unconsumed_tail:
            raise ValueError(f"packed tests of more than {_MOST_PACKED >> 20} MiB")
        parsed = (
            _PlainUnpickler(io.BytesIO(data)).load()
            if data[:1] == b"\x80"
            else json.loads(data, parse_int=_integer)
        )
    except (
        binascii.Error,
        zlib.error,
        ValueError,
        pickle.UnpicklingError,
        EOFError,
        IndexError,
        KeyError,
    ) as error:
        raise ValueError(
            f"the tests are neither JSON nor packed JSON: {error}: {text[:60]!r}"
        ) from None
    return parsed


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers and scalars only. A pickle that names a class or function could run code,
    and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"the tests' pickle asks for {module}.{name}; only plain values are read"
        )
