"""Code of a locked-down child: runs the model's program, its calls one at a time, or a data set's
test code.

Standard library only; `zygote.py` loads this file as text. The model's program can replace
everything here, so the parent trusts nothing of it: a reply is a value that the program chose.

The channel (file descriptor 3) carries lines of JSON. The parent sends one request, then for
functions `{"eval": source}` for each call, answered by `{"ok": value}` or `{"error": type name,
"text": ...}`. Values are lists and scalars as themselves, else objects with one key that names the
type, e.g. `{"tuple": [1, 2]}`.
"""

from __future__ import annotations

import _thread
import builtins
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

CHANNEL = 3
_JSON_DIGITS = 1 << 4096  # longer ints go as hexadecimal, which is linear in both directions

# `encode` makes no circles
_parse, _dump = (json.JSONDecoder().raw_decode, json.JSONEncoder(check_circular=False).encode)

_received = bytearray()
_unsent = bytearray()


class ChannelClosed(BaseException):
    """The parent has closed the channel."""


def read_line(
    read: Callable[..., bytes] = os.read, parse: Callable[..., Any] = _parse
) -> dict[str, Any]:
    """Returns the next message. Raises ChannelClosed."""
    while (end := _received.find(b"\n")) < 0:
        if not (chunk := read(CHANNEL, 1 << 13)):
            raise ChannelClosed
        _received.extend(chunk)
    message: dict[str, Any] = parse(_received[:end].decode())[0]
    del _received[: end + 1]
    return message


def send(
    message: dict[str, Any],
    held: bool = False,
    dumps: Callable[..., str] = _dump,
    write: Callable[..., int] = os.write,
) -> None:
    """Sends a message; `held`: along with the next one, which saves a switch between the
    processes."""
    _unsent.extend(dumps(message).encode())
    _unsent.extend(b"\n")
    while _unsent and not held:
        del _unsent[: write(CHANNEL, _unsent)]


def encode(value: Any) -> Any:
    """A value as plain JSON: a subclass as its base, an object that is no plain value as `{"other":
    type name}`."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_JSON_DIGITS < value < _JSON_DIGITS else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is set or kind is frozenset:
        return {"set": [encode(item) for item in value]}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind is bytes or kind is bytearray:
        return {"bytes": value.hex()}
    return _encode_other(value)


def _encode_other(value: Any) -> Any:
    """Encodes values that equal plain ones: fractions, decimals, numpy's numbers, keys of a
    dict."""
    module, name = type(value).__module__, type(value).__name__
    if module in ("fractions", "decimal") and name in ("Fraction", "Decimal") and value == value:
        above, below = value.as_integer_ratio()
        return {"ratio": [encode(above), encode(below)]}
    if module == "numpy" and not hasattr(value, "__len__") and hasattr(value, "dtype"):
        return encode(value.item())
    if name == "dict_keys" and module == "builtins":
        return {"set": [encode(item) for item in value]}
    return _encode_subclass(value)


def _encode_subclass(value: Any) -> Any:
    bases: tuple[type, ...] = (int, float, str, list, tuple, dict, set, frozenset, complex, bytes)
    for base in bases:
        if isinstance(value, base):
            plain = int.__int__(value) if isinstance(value, int) else base(value)
            if type(plain) is base:
                return encode(plain)
    return {"other": type(value).__name__}


def source_of(value: Any) -> str:
    """An expression whose value is the plain value. Raises TypeError for other values."""
    kind = type(value)
    if kind is int:
        return repr(value) if -_JSON_DIGITS < value < _JSON_DIGITS else f"({hex(value)})"
    if value is None or kind in (bool, str, bytes):
        return repr(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f"float({repr(value)!r})"
    if kind is list:
        return f"[{', '.join(map(source_of, value))}]"
    if kind is tuple:
        return f"({''.join(source_of(item) + ', ' for item in value)})"
    if kind is dict:
        items = (f"{source_of(key)}: {source_of(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if kind is set or kind is frozenset:
        return f"{kind.__name__}([{', '.join(map(source_of, value))}])"
    if kind is complex:
        return f"complex({source_of(value.real)}, {source_of(value.imag)})"
    raise TypeError(
        f"a test passes a {kind.__name__} to the tested function; only plain values can be passed"
    )


def _module(name: str) -> dict[str, Any]:
    """The namespace of a fresh module; dataclasses, pickle and typing look up a class by its
    module."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


# What contest programs use without importing it: their data sets' harnesses make the imports.
_USUAL = {
    "collections": "deque defaultdict Counter OrderedDict namedtuple ChainMap",
    "heapq": "heappush heappop heapify heapreplace heappushpop nlargest nsmallest merge",
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "math": (
        "gcd lcm sqrt isqrt ceil floor log log2 log10 inf pi comb perm factorial hypot prod sin cos"
        " atan2 exp"
    ),
    "itertools": (
        "accumulate chain combinations combinations_with_replacement count cycle groupby islice"
        " permutations product repeat starmap takewhile zip_longest pairwise"
    ),
    "functools": "cache lru_cache reduce cmp_to_key partial wraps total_ordering",
    "copy": "deepcopy",
    "operator": "itemgetter attrgetter add mul xor or_ and_",
    "string": "ascii_lowercase ascii_uppercase ascii_letters digits punctuation",
    "random": "randint shuffle choice",
    "datetime": "datetime timedelta date",
    "typing": (
        "List Dict Set Tuple Optional Union Any Callable Iterable Iterator Deque DefaultDict"
        " Generator Sequence Mapping TypeVar Generic NamedTuple FrozenSet Type"
    ),
    "dataclasses": "dataclass field",
    "enum": "Enum",
    "fractions": "Fraction",
    "decimal": "Decimal getcontext",
    "io": "StringIO BytesIO",
    "statistics": "mean median",
}
_MODULES = (
    "bisect collections copy datetime functools heapq io itertools json math operator os random re "
    "string sys time"
)
_HOME = {name: module for module, names in _USUAL.items() for name in names.split()}
_HOME |= dict.fromkeys(_MODULES.split(), "")


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            names |= _names(constant)
    return names


def _compiled(text: str, name: str, namespace: dict[str, Any], usual: bool) -> types.CodeType:
    """Compiles code; `usual`: makes those of the usual imports whose names occur in it."""
    code = compile(text, name, "exec", dont_inherit=True)
    if "asyncio" in text:
        _offline_loop()
    if usual:
        for word in _names(code) & _HOME.keys():
            if word not in namespace:
                module = _HOME[word] or word
                loaded = __import__(module)
                namespace[word] = getattr(loaded, word) if _HOME[word] else loaded
        sys.setrecursionlimit(50_000)
    return code


def _offline_loop() -> None:
    """Sets an event loop for coroutines that wait for each other and for time: the sandbox has no
    other device, and no socket for the wake-up of asyncio's own loop."""
    import asyncio
    import time

    class Loop(asyncio.BaseEventLoop):
        def __init__(self) -> None:
            super().__init__()
            self._selector = self

        def select(self, timeout: float | None) -> list[Any]:
            time.sleep(0.005 if timeout is None else timeout)  # None: until another thread calls
            return []

        def _process_events(self, events: list[Any]) -> None:
            pass

        def _write_to_self(self) -> None:
            pass

    class Policy(asyncio.DefaultEventLoopPolicy):
        _loop_factory = Loop

    asyncio.set_event_loop_policy(Policy())


def failure(error: BaseException) -> dict[str, str]:
    """An exception's name and text. Both may be the model's code, so each may raise in turn."""
    try:
        name = type.__getattribute__(type(error), "__name__")
        text = str(error)[:300]
    except BaseException:  # the exception's own __str__ raised
        name, text = "Exception", ""
    return {"error": str(name)[:100], "text": text if type(text) is str else ""}


def load_solution(request: dict[str, Any]) -> dict[str, Any] | None:
    """Runs the model's code and the test's set-up in the module `solution`. Returns what it raised,
    or None."""
    describe, namespace = failure, _module("solution")
    try:
        for part in request["code"]:
            exec(_compiled(part, "<solution>", namespace, request.get("usual", False)), namespace)
    # whatever the model's code raises, SystemExit included, is its result
    except BaseException as error:
        return describe(error)
    return None


def serve_calls(request: dict[str, Any]) -> None:
    """Runs the model's code, then answers calls until the parent closes the channel."""
    # bound before the model's code runs, which may replace any name of this file
    reply, pack, describe, next_call = send, encode, failure, read_line
    result: dict[str, Any] = load_solution(request) or {"ok": None}
    namespace = sys.modules["solution"].__dict__
    reply(result, held="ok" in result and b"\n" in _received)  # the first call may be here already
    while True:
        call = next_call()["eval"]
        try:
            result = {"ok": pack(eval(call, namespace))}
        except BaseException as error:  # as above
            result = describe(error)
        try:
            reply(result)
        except (ValueError, MemoryError, RecursionError, TypeError) as error:
            reply(describe(error))
        if "error" in result and result["error"] == "SystemExit":
            return


def run_library(request: dict[str, Any]) -> None:
    """Runs the parent's code, `[[name, marshalled code], ...]`, and `main` of its last part."""
    import binascii
    import marshal

    _module("library")["__path__"] = []
    for name, code in request["library"]:
        names = _module(f"library.{name}")
        names["__package__"] = "library"
        exec(marshal.loads(binascii.a2b_base64(code)), names)
    own = {"send": send, "read_line": read_line, "failure": failure, "module": _module}
    own |= {"load_solution": load_solution, "offline_loop": _offline_loop}
    if "asyncio" in str(request.get("test", "")):
        _offline_loop()
    names["main"](request, types.SimpleNamespace(**own))


_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_STANDARD |= {
    f"{folder}/{number}": number for folder in ("/dev/fd", "/proc/self/fd") for number in range(3)
}


def _open_by_name() -> None:
    """Makes `open("/dev/stdin")`, `os.open` and the like work: there are no such files here."""
    import io

    plain: Callable[..., Any] = io.open
    plain_descriptor: Callable[..., int] = os.open

    def number_of(file: Any) -> int | None:
        return _STANDARD.get(os.fsdecode(file)) if type(file) is not int else None

    def open(file: Any, *arguments: Any, **keywords: Any) -> Any:
        number = number_of(file)
        if number is None:
            return plain(file, *arguments, **keywords)
        return plain(number, *arguments, **({"closefd": False} | keywords))

    def open_descriptor(path: Any, *arguments: Any, **keywords: Any) -> int:
        number = number_of(path)
        return plain_descriptor(path, *arguments, **keywords) if number is None else os.dup(number)

    builtins.open = io.open = open
    os.open = open_descriptor


def run_program(request: dict[str, Any]) -> NoReturn:
    """Runs the model's code as a script on descriptors 0, 1 and 2, with a script's exit codes."""
    os.close(CHANNEL)
    leave, code = os._exit, 0
    namespace = _module("__main__")
    text = request["code"][0]
    if "/dev/" in text or "/proc/" in text:
        _open_by_name()
    try:
        exec(_compiled(text, "<program>", namespace, request.get("usual", False)), namespace)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    # what a script raises is its own; the interpreter would print it and exit with 1
    except BaseException:
        import traceback

        traceback.print_exc(limit=-5)
        code = 1
    try:
        if (threading := sys.modules.get("threading")) is not None:
            threading._shutdown()  # the interpreter waits for threads as well
        if (atexit := sys.modules.get("atexit")) is not None:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
    except BaseException:  # a replaced or broken stdout is the program's own fault
        code = code or 1
    leave(code & 0xFF)


def _leave(code: Any = None) -> NoReturn:
    """`exit()` and `quit()`, which `site` would define."""
    raise SystemExit(code)


def _stack_size(size: int = 0, _set: Callable[..., int] = _thread.stack_size) -> int:
    """Sets the stack size of threads, to at most a quarter of the memory: programs ask for as much
    as they may have in all."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0] // 4
    if not size:
        return _set()
    # 0 would be the default
    return _set(max(min(size, most) & ~0xFFFF, min(size, 0x10000)) if most > 0 else size)


builtins.exit = builtins.quit = _leave  # type: ignore[assignment]
if hasattr(sys, "set_int_max_str_digits"):  # the run's own time is limited, and so is its memory
    sys.set_int_max_str_digits(0)
_thread.stack_size = _stack_size
if "threading" in sys.modules:
    sys.modules["threading"].stack_size = _stack_size  # type: ignore[attr-defined]


TASKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "calls": serve_calls,
    "program": run_program,
    "library": run_library,
}


def main() -> NoReturn:
    leave = os._exit
    try:
        request = read_line()
        TASKS[request["task"]](request)
    except ChannelClosed:
        pass
    leave(0)
