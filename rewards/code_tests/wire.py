"""Values and objects as JSON lines between two sandboxes, that of the model's code and that of a
data set's tests.

Runs inside both: `child.py` loads the compiled text of this file and of `judge.py` or `host.py`, so
it imports only the standard library. `Side` is one end. Immutable values are sent as they are or as
an object with one key that names the type, e.g. `{"tuple": [1, 2]}`. Mutable ones are sent as
`{"at": number}`, an index into the message's table of objects: sharing and cycles survive, and the
answer to a call can say how its arguments have changed.

The messages of the model's side are untrusted: no form makes more than plain values and objects of
listed types.
"""

from __future__ import annotations

import builtins
import collections
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

_LONGEST = 1 << 4096  # longer ints go as hexadecimal, which is linear in both directions
_SUBCLASSED: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    tuple,
    list,
    dict,
    set,
    frozenset,
)
_MAPPINGS: dict[str, Any] = {
    "dict": dict,
    "collections.Counter": collections.Counter,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
}


class Child(Protocol):
    """The functions of `child.py` that this file needs."""

    def send(self, message: dict[str, Any]) -> None: ...
    def read_line(self) -> dict[str, Any]: ...
    def offline_loop(self) -> None: ...


class CannotPass(Exception):
    """The test passes an object that has no form on the wire: a fault of the test, never of the
    model."""


def name_of(kind: type) -> str:
    """`module.name` of a type, or its name alone for a built-in one."""
    module = type.__getattribute__(kind, "__module__")
    name = type.__getattribute__(kind, "__qualname__")
    return str(name) if module == "builtins" else f"{module}.{name}"


class Table:
    """The mutable objects of a message by number, beginning with those of the message that it
    answers."""

    def __init__(self, side: Side, objects: list[Any]) -> None:
        self.side = side
        self.objects = objects
        self.numbers = {id(value): number for number, value in enumerate(objects)}

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_LONGEST < value < _LONGEST else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is tuple or kind is frozenset:
            return {kind.__name__: [self.pack(item) for item in value]}
        if kind in (list, dict, set, bytearray):
            return self.at(value)
        if issubclass(kind, self.side.handles):
            return self.side.pack_other(value)
        name = name_of(kind)
        if name in _PACKED:
            return {name: _PACKED[name](self, value)}
        if name in _MAPPINGS or name == "collections.deque" or kind.__name__ in self.side.shared:
            return self.at(value)
        if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
            return {"numpy.scalar": [value.dtype.str, self.pack(value.item())]}
        if isinstance(value, tuple) and isinstance(fields := getattr(kind, "_fields", None), tuple):
            return {"named": [kind.__name__, list(fields), [self.pack(item) for item in value]]}
        if getattr(builtins, getattr(value, "__name__", ""), None) is value:
            return {"builtin": str(getattr(value, "__name__", ""))}
        if kind.__name__ not in self.side.named:
            for base in _SUBCLASSED:
                if isinstance(value, base):
                    plain = int.__int__(value) if isinstance(value, int) else base(value)
                    if type(plain) is base:
                        return self.pack(plain)
        return self.side.pack_other(value)

    def at(self, value: Any) -> dict[str, int]:
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return {"at": number}

    def bodies(self) -> list[list[Any]]:
        """The contents of each object; objects met meanwhile are added to the table."""
        bodies: list[list[Any]] = []
        while len(bodies) < len(self.objects):
            bodies.append(self._body(self.objects[len(bodies)]))
        return bodies

    def _body(self, value: Any) -> list[Any]:
        name = name_of(type(value))
        if name in _MAPPINGS:
            return [name, [[self.pack(key), self.pack(item)] for key, item in value.items()]]
        if name == "bytearray":
            return [name, value.hex()]
        if name in ("list", "set"):
            return [name, [self.pack(item) for item in value]]
        if name == "collections.deque":
            return [name, [self.pack(item) for item in value], value.maxlen]
        return [
            "object",
            [[key, self.pack(item)] for key, item in _attributes(value)],
            type(value).__name__,
        ]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()


def _array(table: Table, value: Any) -> list[Any]:
    if value.dtype.kind not in "biufcSU":
        raise CannotPass(f"an array of {value.dtype}")
    return [
        value.dtype.str,
        list(value.shape),
        [table.pack(item) for item in value.ravel().tolist()],
    ]


_PACKED: dict[str, Callable[[Table, Any], Any]] = {
    "bytes": lambda table, value: value.hex(),
    "complex": lambda table, value: [table.pack(value.real), table.pack(value.imag)],
    "range": lambda table, value: [
        table.pack(part) for part in (value.start, value.stop, value.step)
    ],
    "slice": lambda table, value: [
        table.pack(part) for part in (value.start, value.stop, value.step)
    ],
    "dict_keys": lambda table, value: [table.pack(item) for item in value],
    "dict_values": lambda table, value: [table.pack(item) for item in value],
    "dict_items": lambda table, value: [table.pack(item) for item in value],
    "fractions.Fraction": lambda table, value: [
        table.pack(value.numerator),
        table.pack(value.denominator),
    ],
    "decimal.Decimal": lambda table, value: str(value),
    "datetime.date": lambda table, value: value.isoformat(),
    "datetime.time": lambda table, value: value.isoformat(),
    "datetime.datetime": lambda table, value: value.isoformat(),
    "datetime.timedelta": lambda table, value: [value.days, value.seconds, value.microseconds],
    "numpy.ndarray": _array,
}


def _imported(name: str, *arguments: Any, method: str = "") -> Any:
    module, _, attribute = name.partition(".")
    made = getattr(__import__(module), attribute)
    return getattr(made, method)(*arguments) if method else made(*arguments)


def _numbers(dtype: str, shape: list[int], items: list[Any]) -> Any:
    if len(dtype) > 8 or dtype[1:2] not in "biufcSU" or math.prod(shape) != len(items):
        raise ValueError("no array of plain numbers")
    return __import__("numpy").array(items, dtype=dtype).reshape(shape)


def _named(name: str, fields: list[str], items: list[Any]) -> Any:
    return collections.namedtuple(name, fields)(*items)


_MADE: dict[str, Callable[..., Any]] = {
    "int": lambda body: int(body, 16),
    "float": float,
    "bytes": bytes.fromhex,
    "tuple": lambda *items: tuple(items),
    "frozenset": lambda *items: frozenset(items),
    "complex": complex,
    "range": range,
    "slice": slice,
    "dict_keys": lambda *items: dict.fromkeys(items).keys(),
    "dict_values": lambda *items: dict(enumerate(items)).values(),
    "dict_items": lambda *items: dict(items).items(),
    "fractions.Fraction": lambda *parts: _imported("fractions.Fraction", *parts),
    "decimal.Decimal": lambda text: _imported("decimal.Decimal", text),
    "datetime.date": lambda text: _imported("datetime.date", text, method="fromisoformat"),
    "datetime.time": lambda text: _imported("datetime.time", text, method="fromisoformat"),
    "datetime.datetime": lambda text: _imported("datetime.datetime", text, method="fromisoformat"),
    "datetime.timedelta": lambda *parts: _imported("datetime.timedelta", *parts),
    "numpy.ndarray": _numbers,
    "numpy.scalar": lambda dtype, item: _numbers(dtype, [], [item])[()],
    "named": _named,
}


class Side:
    """One end of the line. `shared`: classes of both ends, whose instances are sent by value;
    `named`: classes of the model that the test names, whose instances stay at their end."""

    shared: dict[str, type]
    named: set[str]
    handles: tuple[type, ...] = ()
    """Types of stand-ins for objects of the other end; their attributes must not be read here."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.shared = {}
        self.named = set()

    def pack_other(self, value: Any) -> Any:
        raise NotImplementedError

    def unpack_other(self, kind: str, body: Any) -> Any:
        raise NotImplementedError

    def unpack(self, data: Any, objects: list[Any]) -> Any:
        if not isinstance(data, dict):
            if isinstance(data, list):
                raise ValueError("no value")
            return data
        ((kind, body),) = data.items()
        if kind == "at":
            return objects[body]
        if kind not in _MADE:
            return self.unpack_other(kind, body)
        parts = body if isinstance(body, list) else [body]
        return _MADE[kind](*[self._part(part, objects) for part in parts])

    def _part(self, part: Any, objects: list[Any]) -> Any:
        """The value of a part, or a list of values for a list."""
        return (
            [self._part(each, objects) for each in part]
            if isinstance(part, list)
            else self.unpack(part, objects)
        )

    def fill(self, bodies: list[Any], objects: list[Any]) -> None:
        """Sets the contents of `objects` to `bodies` (None: unchanged), after creating those that
        are new."""
        objects += [self._empty(body) for body in bodies[len(objects) :]]
        changed = [
            (body, value) for body, value in zip(bodies, objects, strict=True) if body is not None
        ]
        for hashing in (False, True):  # keys need what they hold first
            for body, value in changed:
                if (body[0] == "set" or body[0] in _MAPPINGS) is hashing:
                    self._refill(body, value, objects)

    def _empty(self, body: list[Any]) -> Any:
        if body[0] == "object":
            kind: Any = self.shared[body[2]]
            return kind.__new__(kind)
        if body[0] == "collections.deque":
            return collections.deque(maxlen=body[2])
        made: dict[str, Any] = {"list": list, "set": set, "bytearray": bytearray} | _MAPPINGS
        return made[body[0]]()

    def _refill(self, body: list[Any], value: Any, objects: list[Any]) -> None:
        name, held = body[0], body[1]
        if name == "object":
            getattr(value, "__dict__", {}).clear()
            for key, item in held:
                object.__setattr__(value, key, self.unpack(item, objects))
        elif name == "bytearray":
            value[:] = bytes.fromhex(held)
        elif name in _MAPPINGS:
            items = [(self.unpack(key, objects), self.unpack(item, objects)) for key, item in held]
            value.clear()
            for key, item in items:
                value[key] = item
        else:
            items = [self.unpack(item, objects) for item in held]
            value.clear()
            value.update(items) if name == "set" else value.extend(items)

    # --- requests and answers

    def request(self, message: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Sends a request, answers the requests of the other end meanwhile, and returns the value
        of its answer or raises its exception."""
        table = Table(self, [])
        message["args"] = [table.pack(each) for each in arguments]
        message["kwargs"] = {key: table.pack(each) for key, each in keywords.items()}
        message["objects"] = table.bodies()
        self.child.send(message)
        while True:
            answer = self.child.read_line()
            if "ok" in answer or "error" in answer:
                break
            self.child.send(self.answer(answer))
        self.fill(answer.get("objects", []), table.objects)
        self.heard(answer)
        if "error" in answer:
            raise self.exception(answer, table.objects)
        return self.unpack(answer["ok"], table.objects)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Performs a request of the other end and returns the answer to it."""
        objects: list[Any] = []
        answer: dict[str, Any]
        try:
            self.fill(request["objects"], objects)
            arguments = [self.unpack(each, objects) for each in request["args"]]
            keywords = {key: self.unpack(each, objects) for key, each in request["kwargs"].items()}
            table = Table(self, objects)
            known = len(objects)
            try:
                answer = {"ok": table.pack(self.perform(request, arguments, keywords))}
            # whatever the model's code raises, SystemExit included, is its result
            except BaseException as error:
                answer = self.describe(error, table)
            bodies: list[Any] = table.bodies()
        except BaseException as error:  # a value without a form, or nested beyond all reason
            return self.describe(error, None)
        bodies[:known] = [
            None if new == old else new
            for new, old in zip(bodies, request["objects"], strict=False)
        ]
        answer["objects"] = bodies
        return answer

    def perform(
        self, request: dict[str, Any], arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        raise NotImplementedError

    def heard(self, answer: dict[str, Any]) -> None:
        """Receives the further contents of an answer."""

    def describe(self, error: BaseException, table: Table | None) -> dict[str, Any]:
        """An exception as an answer. Its name, text and attributes may be the model's code, so each
        may raise."""
        answer: dict[str, Any] = {"error": "Exception", "text": "", "kinds": [], "held": []}
        try:
            kinds = type(error).__mro__
            answer["error"], answer["kinds"] = kinds[0].__name__, [name_of(kind) for kind in kinds]
            answer["text"] = str(error)[:300] + ""
            if table is not None:
                answer["held"] = [["args", table.pack(error.args)]]
                answer["held"] += [[key, table.pack(item)] for key, item in error.__dict__.items()]
        except BaseException:  # the exception's own code raised
            pass
        return answer

    def exception(self, answer: dict[str, Any], objects: list[Any]) -> BaseException:
        """The exception that an answer describes, of a built-in type or of one of the test's."""
        kind = self.exception_type([str(name) for name in answer["kinds"]])
        error = kind.__new__(kind)
        error.args = (str(answer["text"]),)
        for key, item in answer["held"]:
            try:
                setattr(error, key, self.unpack(item, objects))
            # a read-only attribute of a built-in exception
            except (AttributeError, TypeError, ValueError, KeyError):
                continue
        error.__dict__["_of_the_model"] = str(answer["text"])
        return error

    def exception_type(self, kinds: list[str]) -> type[BaseException]:
        """The first known type among the names of the types of an exception, from its own
        upwards."""
        for name in kinds:
            module, _, attribute = name.rpartition(".")
            known = getattr(sys.modules.get(module) if module else builtins, attribute, None)
            if isinstance(known, type) and issubclass(known, BaseException):
                return known
        return Exception
