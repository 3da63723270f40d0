"""The parts of pytest that tests of data sets use; pytest itself is not visible in the judge's
sandbox.

`raises`, `approx`, `mark.parametrize` (other marks do nothing), fixtures of functions, `fail`,
`skip`, `capsys`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


class Skipped(BaseException):
    """The test does not apply."""


class Failed(AssertionError):
    """`fail` was called, or an expected exception did not come."""


def fail(reason: str = "", **_: Any) -> NoReturn:
    raise Failed(reason)


def skip(reason: str = "", **_: Any) -> NoReturn:
    raise Skipped(reason)


class _Caught:
    value: Any = None
    type: Any = None

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), f"{pattern!r} is not in {str(self.value)!r}"
        return True


class raises(contextlib.AbstractContextManager[_Caught]):
    """A context that expects an exception; called with a function, it calls that at once."""

    def __new__(cls, expected: Any, *call: Any, match: str | None = None, **keywords: Any) -> Any:
        made = super().__new__(cls)
        made.expected = expected
        made.pattern = match
        made.caught = _Caught()
        if not call:
            return made
        with made as caught:
            call[0](*call[1:], **keywords)
        return caught

    def __init__(self, *_: Any, **__: Any) -> None:
        self.expected: Any
        self.pattern: str | None
        self.caught: _Caught

    def __enter__(self) -> _Caught:
        return self.caught

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is None:
            raise Failed(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.caught.value = error
        self.caught.type = kind
        if self.pattern is not None:
            self.caught.match(self.pattern)
        return True


class approx:
    """Equals numbers, and lists, tuples, mappings and arrays of them, within a tolerance."""

    def __init__(
        self,
        expected: Any,
        rel: float | None = None,
        abs: float | None = None,
        nan_ok: bool = False,
    ) -> None:
        self.expected = expected
        self.nan_ok = nan_ok
        # pytest's own defaults
        self.rel = 1e-6 if rel is None and abs is None else (rel or 0.0)
        self.abs = 1e-12 if abs is None else abs

    def __eq__(self, other: object) -> bool:
        return self._near(self.expected, other)

    def _near(self, expected: Any, got: Any) -> bool:
        if hasattr(expected, "tolist"):
            expected = expected.tolist()
        if hasattr(type(got), "tolist"):
            got = got.tolist()
        if isinstance(expected, Mapping):
            return (
                type(got) is dict
                and expected.keys() == got.keys()
                and all(self._near(expected[key], got[key]) for key in expected)
            )
        if isinstance(expected, list | tuple):
            return (
                isinstance(got, list | tuple)
                and len(expected) == len(got)
                and all(self._near(e, g) for e, g in zip(expected, got, strict=True))
            )
        if not isinstance(got, int | float | complex) and not hasattr(got, "as_integer_ratio"):
            return bool(type(expected) is type(got) and expected == got)
        if expected != expected:
            return self.nan_ok and got != got
        if expected == got:
            return True
        margin = max(self.rel * abs(expected), self.abs)
        return bool(margin != float("inf") and abs(expected - got) <= margin)

    __hash__ = None  # type: ignore[assignment]


def fixture(function: Any = None, **options: Any) -> Any:
    if function is None:
        return lambda each: fixture(each, **options)
    function.is_fixture = options
    return function


def param(*values: Any, **_: Any) -> Any:
    return values if len(values) != 1 else values[0]


class _Marks:
    def parametrize(self, names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
        words = (
            [word.strip() for word in names.split(",")] if isinstance(names, str) else list(names)
        )

        def mark(function: Any) -> Any:
            rows = [
                dict(zip(words, each if len(words) > 1 else [each], strict=True)) for each in values
            ]
            function.parameters = [*getattr(function, "parameters", []), rows]
            return function

        return mark

    def __getattr__(self, name: str) -> Any:
        def mark(*arguments: Any, **_: Any) -> Any:
            if len(arguments) == 1 and callable(arguments[0]):
                return arguments[0]
            return lambda function: function

        return mark


mark = _Marks()


class _Capsys:
    """`readouterr().out`: what was printed since the last call."""

    def readouterr(self) -> Any:
        stdout: Any = sys.stdout
        text = stdout.getvalue()
        sys.stdout = io.StringIO()
        return _Outerr(text, "")


class _Outerr(tuple[str, str]):
    def __new__(cls, out: str, err: str) -> _Outerr:
        return super().__new__(cls, (out, err))

    out = property(lambda self: self[0])
    err = property(lambda self: self[1])


def variants(test: Any, owner: type | None, namespace: dict[str, Any]) -> list[Callable[[], Any]]:
    """A function without arguments for each combination of the test's parameters."""
    fixtures = {name: each for name, each in namespace.items() if hasattr(each, "is_fixture")}
    if owner is not None:
        fixtures |= {
            name: each for name, each in vars(owner).items() if hasattr(each, "is_fixture")
        }
    rows = [*getattr(owner, "parameters", []), *getattr(test, "parameters", [])]
    return [
        _bound(test, owner, fixtures, {key: value for row in chosen for key, value in row.items()})
        for chosen in itertools.product(*rows)
    ]


def _bound(
    test: Any, owner: type | None, fixtures: dict[str, Any], given: dict[str, Any]
) -> Callable[[], Any]:
    def run() -> None:
        made = owner() if owner is not None else None
        values = dict(given)
        with contextlib.ExitStack() as stack:

            def value(name: str) -> Any:
                if name not in values:
                    values[name] = _Capsys() if name == "capsys" else enter(fixtures[name])
                return values[name]

            def enter(function: Any) -> Any:
                result = call(function)
                if inspect.isgenerator(result):
                    return stack.enter_context(contextlib.contextmanager(lambda: result)())
                return result

            def call(function: Any) -> Any:
                words = list(inspect.signature(function).parameters)
                own = [made] if made is not None and words[:1] == ["self"] else []
                return function(*own, **{name: value(name) for name in words[len(own) :]})

            if "capsys" in inspect.signature(test).parameters:
                sys.stdout = io.StringIO()
            for each in fixtures:
                if fixtures[each].is_fixture.get("autouse"):
                    value(each)
            if made is not None and hasattr(made, "setup_method"):
                made.setup_method(
                    *([None] * (len(inspect.signature(made.setup_method).parameters) > 0))
                )
            result = call(test)
            if inspect.iscoroutine(result):
                __import__("asyncio").run(result)

    return run
