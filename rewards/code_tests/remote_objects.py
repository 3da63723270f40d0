"""Remote objects: the stand-ins for the model's functions and objects in the judge's sandbox.

A `Remote` forwards every operation to the model's object. The other end may be hostile, and a
question that contains the expected answer would give it away, so there are exceptions:
- it equals no plain value and is not ordered against one; remote objects are compared with each
  other by their own `==`;
- operators with a plain value work only for instances of classes that the test names, and yield
  only objects;
- questions about plain values (`startswith`, `issubset`) are not forwarded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_QUESTIONS = "startswith endswith issubset issuperset isdisjoint equals count index find"
_UNARY = "str repr bool abs round int float complex neg pos invert reversed"
_BINARY = "add sub mul truediv floordiv mod pow matmul lshift rshift and or xor"


class Name:
    """Stands for a name of the model's code until it is looked up."""

    def __init__(self, source: str) -> None:
        self.source = source


async def awaiting(remote: Any) -> Any:
    return object.__getattribute__(remote, "_judge").do("await", remote)


class Remote:
    """A stand-in for an object of the model's; the module docstring lists what it refuses."""

    __slots__ = ("_judge", "_kind", "_named", "_number", "_tainted")

    def __init__(self, judge: Any, number: int, named: bool, kind: type | None) -> None:
        own = {
            "_judge": judge,
            "_number": number,
            "_named": named,
            "_kind": kind,
            "_tainted": False,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _do(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        return object.__getattribute__(self, "_judge").do(operation, self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS.split() and not self._named:
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
        return isinstance(type(other), type) and is_remote(other) and bool(self._do("equal", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._do("hash"))

    def __contains__(self, item: Any) -> bool:
        if self._named or is_remote(item):
            return bool(self._do("contains", item))
        return any(item == each for each in iter(self))

    def __instancecheck__(self, value: Any) -> bool:
        return is_remote(value) and bool(self._judge.do("isinstance", value, self))

    def __subclasscheck__(self, value: Any) -> bool:
        return is_remote(value) and bool(self._judge.do("issubclass", value, self))

    def __enter__(self) -> Any:
        return self._judge.do("call", self._do("get", "__enter__"))

    def __exit__(self, *error: Any) -> bool:
        return bool(self._judge.do("call", self._do("get", "__exit__"), None, None, None))

    def __format__(self, spec: str) -> str:
        return str(self._do("format", spec))


def is_remote(value: Any) -> bool:
    return issubclass(type(value), Remote)


def _asking(name: str) -> Callable[..., Any]:
    """The method of an operator without a second operand."""

    def ask(self: Any, *arguments: Any) -> Any:
        if self._tainted:
            raise TypeError(
                "the model's object was given a plain value of the test's and is asked for one"
            )
        return self._do(name, *arguments)

    return ask


def _ordering(name: str) -> Callable[..., Any]:
    return lambda self, other: bool(self._do(name, other)) if is_remote(other) else NotImplemented


def _combining(name: str, swapped: bool) -> Callable[..., Any]:
    def combine(self: Any, other: Any) -> Any:
        if not is_remote(other) and not self._named:
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        made = self._judge.do(name, *pair)
        if not is_remote(other):
            if not is_remote(made):
                raise TypeError(
                    "an operator between the model's object and a plain value yields a plain value"
                )
            # the other end may have kept the test's value in it, to give it back as a plain answer
            object.__setattr__(made, "_tainted", True)
        return made

    return combine


def _call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    return self._do("call", *arguments, **keywords)


def _iterate(self: Any) -> Any:
    return self._do("iter")


for _name in _UNARY.split():
    setattr(Remote, f"__{_name}__", _asking(_name))
for _name in ("getitem", "setitem", "delitem"):
    setattr(
        Remote, f"__{_name}__", (lambda name: lambda self, *parts: self._do(name, *parts))(_name)
    )
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _ordering(_name))
for _name in _BINARY.split():
    _word = f"{_name}_" if _name in ("and", "or") else _name
    setattr(Remote, f"__{_name}__", _combining(_word, False))
    setattr(Remote, f"__r{_name}__", _combining(_word, True))

_ABLE: dict[str, tuple[str, Callable[..., Any]]] = {
    "c": ("__call__", _call),
    "i": ("__iter__", _iterate),
    "n": ("__next__", lambda self: self._do("next")),
    "l": ("__len__", lambda self: self._do("len")),
    "x": ("__index__", _asking("index")),
}
_made: dict[str, type] = {}


def remote_type(able: str) -> type:
    """The class of remote objects with just these abilities, so that `callable` and `isinstance(x,
    Iterator)` answer correctly."""
    if able not in _made:
        _made[able] = type(
            "Remote", (Remote,), {"__slots__": (), **dict(_ABLE[c] for c in able if c in _ABLE)}
        )
    return _made[able]
