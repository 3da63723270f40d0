"""The model's end of the line to a judge: holds the model's functions and objects, and performs the
operations that the test asks for.

Runs inside the sandbox beside the model's code (see `wire.py`), so that the judge trusts nothing of
it.
"""

from __future__ import annotations

import builtins
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from .wire import Child, Side, name_of


def _equals_anything(value: Any) -> bool:
    """Whether the value has an `__eq__` that is always true, so that a comparison with it proves
    nothing."""
    try:
        return value.__eq__(object()) is True
    except Exception:  # it looks into what it is compared with
        return False


_SPECIAL: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "value": lambda value: value,
    "get": getattr,
    "set": setattr,
    "del": delattr,
    "equal": lambda left, right: bool(left == right) and not _equals_anything(left),
    "contains": operator.contains,
}
_BUILT_IN = (
    "len iter next str repr format hash bool abs round int float complex isinstance issubclass "
    "divmod reversed dir"
)
_ABILITIES = {"c": "call", "i": "iter", "n": "next", "l": "len", "x": "index", "a": "await"}


async def _awaiting(coroutine: Any) -> Any:
    return await coroutine


class Host(Side):
    def __init__(self, child: Child, namespace: dict[str, Any], request: dict[str, Any]) -> None:
        super().__init__(child)
        self.namespace = namespace
        self.named = set(request["named"])
        self.shared = {name: namespace[name] for name in request["shared"] if name in namespace}
        self.held: list[Any] = []
        self.places: dict[int, int] = {}
        self.operations = _SPECIAL | {name: getattr(builtins, name) for name in _BUILT_IN.split()}
        self.operations["await"] = self._await
        self.printed = _Printed() if request["printing"] else None
        if self.printed is not None:
            sys.stdout = self.printed

    def pack_other(self, value: Any) -> Any:
        """A reference to the object: its number, the operations that it supports, the short and the
        full name of its class, and the names of its bases if it is a class itself."""
        place = self.places.setdefault(id(value), len(self.held))
        if place == len(self.held):
            self.held.append(value)
        kind = type(value)
        able = "".join(
            letter for letter, name in _ABILITIES.items() if hasattr(kind, f"__{name}__")
        )
        kinds = [name_of(each) for each in value.__mro__] if isinstance(value, type) else []
        return {"ref": [place, able, kind.__name__, name_of(kind), kinds]}

    def unpack_other(self, kind: str, body: Any) -> Any:
        if kind == "mine":
            return self.held[body]
        if kind == "name":
            return eval(body, self.namespace)
        if kind == "callback":
            return self._callback(*body)
        if kind == "stream":
            return self._stream(body)
        module = "builtins" if kind == "builtin" else body[0]
        return getattr(__import__(module, fromlist=["x"]), body if kind == "builtin" else body[1])

    def _callback(self, number: int, name: str, text: str) -> Callable[..., Any]:
        """A local function that calls the function `number` of the test."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            return self.request({"do": number}, *arguments, **keywords)

        call.__name__ = call.__qualname__ = name
        call.__doc__ = text or None
        return call

    def _stream(self, number: int) -> Iterator[Any]:
        """An iterator over the items of an iterator of the test."""
        while True:
            try:
                item = self.request({"do": number})
            except StopIteration:
                return
            yield item

    def _await(self, coroutine: Any) -> Any:
        self.child.offline_loop()
        return __import__("asyncio").run(_awaiting(coroutine))

    def perform(
        self, request: dict[str, Any], arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        name = request["do"]
        operation = self.operations.get(name) or getattr(operator, name)
        return operation(*arguments, **keywords)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = super().answer(request)
        if self.printed is not None:
            answer["printed"] = self.printed.take()
        return answer


class _Printed:
    """A stdout whose text is sent to the judge with the next answer."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def write(self, text: str) -> int:
        self._parts.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def take(self) -> str:
        text = "".join(self._parts)
        self._parts.clear()
        return text


def main(request: dict[str, Any], child: types.SimpleNamespace) -> None:
    """Loads the model's code, reports the result, then answers until the judge closes the line."""
    failure = child.load_solution(request)
    child.send(failure or {"ok": None})
    namespace = sys.modules["solution"].__dict__
    for part in request["extras"]:  # classes of the test's that are of use here
        try:
            exec(compile(part, "<test>", "exec", dont_inherit=True), namespace)
        except Exception:  # one that needs more of the test than is here
            continue
    host = Host(child, namespace, request)
    send, read_line, answer = child.send, child.read_line, host.answer
    while True:
        message = answer(read_line())
        try:
            send(message)
        # nested more deeply than JSON goes
        except (ValueError, MemoryError, RecursionError, TypeError) as error:
            send(host.describe(error, None))
