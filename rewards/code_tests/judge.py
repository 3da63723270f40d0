"""The judge: runs a data set's test code in its own sandbox, where the model's functions and
objects are remote (`remote_objects.py`). The test compares plain values here, out of the model's
reach."""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .remote_objects import Name, Remote, awaiting, is_remote, remote_type
from .wire import CannotPass, Child, Side

_KINDS: dict[str, type] = {
    "function": types.FunctionType,
    "method": types.MethodType,
    "generator": types.GeneratorType,
    "builtin_function_or_method": types.BuiltinFunctionType,
    "type": type,
    **{kind.__name__: kind for kind in (map, filter, zip, enumerate, reversed)},
}


class Judge(Side):
    def __init__(self, child: Child, named: set[str]) -> None:
        super().__init__(child)
        self.named = named
        self.handles = (Remote, Name)
        self.remotes: dict[int, Any] = {}
        self.types: dict[str, type] = {}
        self.callbacks: list[Callable[..., Any]] = []
        self.asked = 0
        self.cannot_pass = ""
        self.capture: Callable[[str], Any] | None = None

    def do(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        self.asked += 1
        try:
            return self.request({"do": operation}, *arguments, **keywords)
        except CannotPass as error:
            self.cannot_pass = str(error)
            raise

    # --- what goes out

    def pack_other(self, value: Any) -> Any:
        if isinstance(value, Name):
            return {"name": value.source}
        if is_remote(value):
            return {"mine": object.__getattribute__(value, "_number")}
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
        if (
            module in sys.stdlib_module_names
            and getattr(sys.modules.get(module), name, None) is value
        ):
            return {"std": [module, name]}
        if isinstance(value, Iterator):
            return {"stream": self._kept(lambda: next(value))}
        if callable(value) and not isinstance(value, type):
            return {
                "callback": [self._kept(value), str(name or "callback"), str(value.__doc__ or "")]
            }
        raise CannotPass(
            f"the test passes a {type(value).__name__} to the model's code, which has no form there"
        )

    def _kept(self, function: Callable[..., Any]) -> int:
        self.callbacks.append(function)
        return len(self.callbacks) - 1

    def perform(
        self, request: dict[str, Any], arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        """Calls a function that the test passed to the model's code, the only request that its side
        may make."""
        return self.callbacks[int(request["do"])](*arguments, **keywords)

    # --- what comes in

    def unpack_other(self, kind: str, body: Any) -> Any:
        if kind == "builtin":
            named = getattr(builtins, body)
            if isinstance(named, type):
                return named
        if kind != "ref":
            raise ValueError("no value")
        number, able, name, what, kinds = body
        if number not in self.remotes:
            self.remotes[number] = self._remote(int(number), str(able), str(name), str(what), kinds)
        return self.remotes[number]

    def _remote(self, number: int, able: str, name: str, what: str, kinds: list[str]) -> Any:
        if "BaseException" in kinds:
            return self.exception_type(kinds)
        remote = remote_type(able)(self, number, name in self.named, _KINDS.get(what))
        return awaiting(remote) if "a" in able else remote

    def exception_type(self, kinds: list[str]) -> type[BaseException]:
        """The type of an exception. For one of the model's own classes it is a type of that name,
        derived from the nearest known one."""
        above = next(
            (i for i, name in enumerate(kinds) if name.partition(".")[0] != "solution"), len(kinds)
        )
        known = super().exception_type(kinds[above:])
        for name in reversed(kinds[:above]):
            short = name.rpartition(".")[2]
            if short not in self.types:
                self.types[short] = type(short, (known,), {"__str__": _own_text})
            known = self.types[short]
        return known

    def heard(self, answer: dict[str, Any]) -> None:
        if self.capture is not None:
            self.capture(str(answer.get("printed", "")))


def _own_text(error: BaseException) -> str:
    return str(error.__dict__.get("_of_the_model", Exception.__str__(error)))


# --- running the test


def main(request: dict[str, Any], child: types.SimpleNamespace) -> NoReturn:
    """Runs the test and sends `{"verdict": {"passed", "total", "failed", "asked"}}`, or `{"broken":
    ...}` if the test itself is at fault."""
    judge = Judge(child, set(request["named"]))
    namespace = child.module("judge")
    try:
        for name, text in request["stubs"].items():
            exec(compile(text, f"<{name}>", "exec"), child.module(name))
        for part in request["setup"]:
            exec(compile(part, "<setup>", "exec", dont_inherit=True), namespace)
        judge.shared = {name: namespace[name] for name in request["shared"] if name in namespace}
        model = child.module("solution")
        for alias, source in request["names"].items():
            # a name that the model's code lacks fails where the test uses it
            with contextlib.suppress(Exception):
                model[alias] = namespace[alias] = judge.request({"do": "value"}, Name(source))
        for name in request["modules"]:
            sys.modules[name] = sys.modules["solution"]
        if request["printing"]:
            judge.capture = _print
    except Exception as error:
        child.send({"broken": child.failure(error)})
        os._exit(0)
    judge.asked = 0
    passed, total, failed = _run(request, namespace)
    if judge.cannot_pass:
        child.send({"broken": {"error": "CannotPass", "text": judge.cannot_pass}})
        os._exit(0)
    child.send(
        {"verdict": {"passed": passed, "total": total, "failed": failed, "asked": judge.asked}}
    )
    os._exit(0)


def _print(text: str) -> None:
    sys.stdout.write(text)  # wherever the test has turned it


def _run(request: dict[str, Any], namespace: dict[str, Any]) -> tuple[int, int, dict[str, str]]:
    """Returns the number of passed tests, the number of all, and the failure of the last failed
    one."""
    stdout = sys.stdout
    failed = _outcome(
        lambda: exec(compile(request["test"], "<test>", "exec", dont_inherit=True), namespace)
    )
    if failed or not request["collect"]:
        return int(not failed), 1, failed
    tests = _collected(namespace)
    passed = 0
    for test in tests:
        sys.stdout = stdout
        if error := _outcome(test):
            failed = error
            if not request["partial"]:
                break
        else:
            passed += 1
    return passed, len(tests) or 1, failed


def _outcome(action: Callable[[], Any]) -> dict[str, str]:
    """The `error` and `text` of the action's failure; empty if it passed. A test may pass by
    `sys.exit(0)`; if the model's code exits, it fails."""
    try:
        action()
    except SystemExit as error:
        if not error.code and not hasattr(error, "_of_the_model"):
            return {}
        return {"error": "SystemExit", "text": ""}
    except BaseException as error:  # an assertion, or whatever the test does with a wrong value
        if type(error).__name__ == "Skipped":
            return {}
        text = error.__dict__.get("_of_the_model", "") or str(error)
        return {"error": type(error).__name__, "text": text[:300]}
    return {}


def _collected(namespace: dict[str, Any]) -> list[Callable[[], Any]]:
    """The module's tests as pytest collects them: functions, methods of Test classes, and unittest
    cases."""
    tests: list[Callable[[], Any]] = []
    unittest, pytest = sys.modules.get("unittest"), sys.modules.get("pytest")
    for name, value in list(namespace.items()):
        if isinstance(value, type) and unittest and issubclass(value, unittest.TestCase):
            if value is not unittest.TestCase:
                tests += [
                    _unittest(each) for each in unittest.TestLoader().loadTestsFromTestCase(value)
                ]
        elif isinstance(value, type) and name.startswith("Test"):
            tests += [
                variant
                for method in vars(value)
                if method.startswith("test")
                for variant in _variants(pytest, vars(value)[method], value, namespace)
            ]
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            tests += _variants(pytest, value, None, namespace)
    return tests


def _variants(
    pytest: Any, test: Any, owner: type | None, namespace: dict[str, Any]
) -> list[Callable[[], Any]]:
    if isinstance(test, staticmethod):
        test, owner = test.__func__, None
    if pytest is not None:
        variants: list[Callable[[], Any]] = pytest.variants(test, owner, namespace)
        return variants
    if owner is None:
        return [test]

    def run() -> None:
        made = owner()
        for name in ("setup_method", "setUp"):
            if hasattr(made, name):
                getattr(made, name)(
                    *(
                        [None]
                        if name == "setup_method" and made.setup_method.__code__.co_argcount > 1
                        else []
                    )
                )
        test(made)

    return [run]


def _unittest(case: Any) -> Callable[[], Any]:
    def run() -> None:
        result = case.run()
        for _, text in [*result.failures, *result.errors]:
            raise AssertionError(text.strip().rpartition("\n")[2])

    return run
