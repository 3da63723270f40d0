"""The judge: runs a data set's test code in a sandbox of its own, where the model's functions and objects are remote ones.

The test compares plain values here, out of the model's reach. A `Remote` does what an object does, by asking for it, with
these exceptions, since the other end may be hostile and must not be asked about an answer that it is then told:
- it equals no plain value and is not ordered against one; remote objects are compared with each other by their own `==`;
- operators with a plain value work for instances of classes that the test itself names, and only yield objects;
- yes-or-no questions of plain values (`startswith`, `issubset`) are not put to it.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .wire import CannotPass, Child, Side

_QUESTIONS = {"startswith", "endswith", "issubset", "issuperset", "isdisjoint", "equals", "count", "index", "find"}
_KINDS: dict[str, type] = {
    "function": types.FunctionType,
    "method": types.MethodType,
    "generator": types.GeneratorType,
    "builtin_function_or_method": types.BuiltinFunctionType,
    "type": type,
    **{kind.__name__: kind for kind in (map, filter, zip, enumerate, reversed)},
}
_ARITHMETIC = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
]


class Judge(Side):
    def __init__(self, child: Child, named: set[str]) -> None:
        super().__init__(child)
        self.named = named
        self.handles = (_Remote, _Name)
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
        if isinstance(value, _Name):
            return {"name": value.source}
        if issubclass(type(value), _Remote):
            return {"mine": object.__getattribute__(value, "_number")}
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
        if module in sys.stdlib_module_names and getattr(sys.modules.get(module), name, None) is value:
            return {"std": [module, name]}
        if isinstance(value, Iterator):
            return {"stream": self._kept(lambda: next(value))}
        if callable(value) and not isinstance(value, type):
            return {"callback": [self._kept(value), str(name or "callback"), str(value.__doc__ or "")]}
        raise CannotPass(f"the test passes a {type(value).__name__} to the model's code, which has no form there")

    def _kept(self, function: Callable[..., Any]) -> int:
        self.callbacks.append(function)
        return len(self.callbacks) - 1

    def perform(self, request: dict[str, Any], arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """All that the model's side may ask for: functions that the test passed to it."""
        return self.callbacks[int(request["do"])](*arguments, **keywords)

    # --- what comes in

    def unpack_other(self, kind: str, body: Any) -> Any:
        if kind == "builtin":
            found = getattr(builtins, body)
            if isinstance(found, type):
                return found
        if kind != "ref":
            raise ValueError("no value")
        number, able, name, what, kinds = body
        if number not in self.remotes:
            self.remotes[number] = self._remote(int(number), str(able), str(name), str(what), kinds)
        return self.remotes[number]

    def _remote(self, number: int, able: str, name: str, what: str, kinds: list[str]) -> Any:
        if "BaseException" in kinds:
            return self.exception_type(kinds)
        remote = _remote_type(able)(self, number, name in self.named, _KINDS.get(what))
        return _await(remote) if "a" in able else remote

    def exception_type(self, kinds: list[str]) -> type[BaseException]:
        """Also the model's own exceptions, as far as the test names them."""
        above = next((i for i, name in enumerate(kinds) if name.partition(".")[0] != "solution"), len(kinds))
        found = super().exception_type(kinds[above:])
        for name in reversed(kinds[:above]):
            short = name.rpartition(".")[2]
            if short not in self.types:
                self.types[short] = type(short, (found,), {"__str__": _own_text})
            found = self.types[short]
        return found

    def heard(self, answer: dict[str, Any]) -> None:
        if self.capture is not None:
            self.capture(str(answer.get("printed", "")))


def _own_text(error: BaseException) -> str:
    return str(error.__dict__.get("_of_the_model", Exception.__str__(error)))


class _Name:
    """Stands for a name of the model's until it is looked up."""

    def __init__(self, source: str) -> None:
        self.source = source


async def _await(remote: Any) -> Any:
    return object.__getattribute__(remote, "_judge").do("await", remote)


class _Remote:
    """An object of the model's; see the file's first lines for what it refuses."""

    __slots__ = ("_judge", "_kind", "_named", "_number", "_tainted")

    def __init__(self, judge: Judge, number: int, named: bool, kind: type | None) -> None:
        own = {"_judge": judge, "_number": number, "_named": named, "_kind": kind, "_tainted": False}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _do(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        return object.__getattribute__(self, "_judge").do(operation, self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS and not self._named:
            raise AttributeError(f"the model's object has no {name!r} that a test may ask")
        return self._do("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", name, value)

    def __delattr__(self, name: str) -> None:
        self._do("del", name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        kind = object.__getattribute__(self, "_kind")
        return type(self) if kind is None else kind

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self._do("get", "__doc__")

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        return isinstance(type(other), type) and _is_remote(other) and bool(self._do("equal", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._do("hash"))

    def __contains__(self, item: Any) -> bool:
        if self._named or _is_remote(item):
            return bool(self._do("contains", item))
        return any(item == each for each in iter(self))

    def __instancecheck__(self, value: Any) -> bool:
        return _is_remote(value) and bool(self._judge.do("isinstance", value, self))

    def __subclasscheck__(self, value: Any) -> bool:
        return _is_remote(value) and bool(self._judge.do("issubclass", value, self))

    def __enter__(self) -> Any:
        return self._judge.do("call", self._do("get", "__enter__"))

    def __exit__(self, *error: Any) -> bool:
        return bool(self._judge.do("call", self._do("get", "__exit__"), None, None, None))

    def __format__(self, spec: str) -> str:
        return str(self._do("format", spec))


def _is_remote(value: Any) -> bool:
    return issubclass(type(value), _Remote)


def _asking(name: str) -> Callable[..., Any]:
    """An operator without a second operand."""

    def ask(self: Any, *arguments: Any) -> Any:
        if self._tainted:
            raise TypeError("the model's object was given a plain value of the test's and is asked for one")
        return self._do(name, *arguments)

    return ask


def _ordering(name: str) -> Callable[..., Any]:
    return lambda self, other: bool(self._do(name, other)) if _is_remote(other) else NotImplemented


def _combining(name: str, swapped: bool) -> Callable[..., Any]:
    def combine(self: Any, other: Any) -> Any:
        if not _is_remote(other) and not self._named:
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        made = self._judge.do(name, *pair)
        if not _is_remote(other):
            if not _is_remote(made):
                raise TypeError("an operator between the model's object and a plain value yields a plain value")
            object.__setattr__(made, "_tainted", True)
        return made

    return combine


def _call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    return self._do("call", *arguments, **keywords)


def _iterate(self: Any) -> Any:
    return self._do("iter")


async def _next_later(self: Any) -> Any:
    return self._do("await", self._do("get", "__anext__")())


for _name in ("str", "repr", "bool", "abs", "round", "int", "float", "complex", "neg", "pos", "invert", "reversed"):
    setattr(_Remote, f"__{_name}__", _asking(_name))
for _name in ("getitem", "setitem", "delitem"):
    setattr(_Remote, f"__{_name}__", (lambda name: lambda self, *parts: self._do(name, *parts))(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(_Remote, f"__{_name}__", _ordering(_name))
for _name in _ARITHMETIC:
    _word = f"{_name}_" if _name in ("and", "or") else _name
    setattr(_Remote, f"__{_name}__", _combining(_word, False))
    setattr(_Remote, f"__r{_name}__", _combining(_word, True))

_ABLE: dict[str, tuple[str, Callable[..., Any]]] = {
    "c": ("__call__", _call),
    "i": ("__iter__", _iterate),
    "n": ("__next__", lambda self: self._do("next")),
    "l": ("__len__", lambda self: self._do("len")),
    "x": ("__index__", _asking("index")),
}
_made: dict[str, type] = {}


def _remote_type(able: str) -> type:
    """The class of remote objects with just these abilities, so that `callable` and `Iterator` tell the truth."""
    if able not in _made:
        _made[able] = type("Remote", (_Remote,), {"__slots__": (), **dict(_ABLE[c] for c in able if c in _ABLE)})
    return _made[able]


# --- running the test


def main(request: dict[str, Any], child: types.SimpleNamespace) -> NoReturn:
    """Runs the test and sends the verdict: `{"verdict": {"passed", "total", "failed", "asked"}}` or `{"broken": ...}`."""
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
            with contextlib.suppress(Exception):  # what the model does not have is missed when it is used
                model[alias] = namespace[alias] = judge.request({"do": "value"}, _Name(source))
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
    child.send({"verdict": {"passed": passed, "total": total, "failed": failed, "asked": judge.asked}})
    os._exit(0)


def _print(text: str) -> None:
    sys.stdout.write(text)  # wherever the test has turned it


def _run(request: dict[str, Any], namespace: dict[str, Any]) -> tuple[int, int, dict[str, str]]:
    """How many tests passed, of how many, and how the last one failed."""
    stdout = sys.stdout
    failed = _outcome(lambda: exec(compile(request["test"], "<test>", "exec", dont_inherit=True), namespace))
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
    """What went wrong, or nothing. A test may leave by `sys.exit(0)`; the model's code may not end it."""
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
    """The module's tests as pytest finds them: functions, methods of Test classes, and unittest's cases."""
    found: list[Callable[[], Any]] = []
    unittest, pytest = sys.modules.get("unittest"), sys.modules.get("pytest")
    for name, value in list(namespace.items()):
        if isinstance(value, type) and unittest and issubclass(value, unittest.TestCase):
            if value is not unittest.TestCase:
                found += [_unittest(each) for each in unittest.TestLoader().loadTestsFromTestCase(value)]
        elif isinstance(value, type) and name.startswith("Test"):
            found += [
                variant
                for method in vars(value)
                if method.startswith("test")
                for variant in _variants(pytest, vars(value)[method], value, namespace)
            ]
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            found += _variants(pytest, value, None, namespace)
    return found


def _variants(pytest: Any, test: Any, owner: type | None, namespace: dict[str, Any]) -> list[Callable[[], Any]]:
    if isinstance(test, staticmethod):
        test, owner = test.__func__, None
    if pytest is not None:
        found: list[Callable[[], Any]] = pytest.variants(test, owner, namespace)
        return found
    if owner is None:
        return [test]

    def run() -> None:
        made = owner()
        for name in ("setup_method", "setUp"):
            if hasattr(made, name):
                getattr(made, name)(
                    *([None] if name == "setup_method" and made.setup_method.__code__.co_argcount > 1 else [])
                )
        test(made)

    return [run]


def _unittest(case: Any) -> Callable[[], Any]:
    def run() -> None:
        result = case.run()
        for _, text in [*result.failures, *result.errors]:
            raise AssertionError(text.strip().rpartition("\n")[2])

    return run
