"""What runs inside a locked-down child: the model's program, its calls one at a time, or a data set's test code.

Standard library only; `zygote.py` loads this file by path. Everything the model's program can reach here it can also
replace, so nothing here is trusted by the parent: a reply is a value that the model's program chose, and no more.

Lines of JSON on the channel (file descriptor 3). The parent sends one request, then for functions `{"eval": source}` one
call at a time; each is answered by `{"ok": value}` or `{"error": type name, "text": ...}`. Values are plain JSON: lists
and scalars as themselves, everything else as an object with one key that names the type, e.g. `{"tuple": [1, 2]}`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

CHANNEL = 3
_JSON_DIGITS = 1 << 4096  # longer ints go as hexadecimal, which is linear in both directions

_parse, _dump = (
    json.JSONDecoder().raw_decode,
    json.JSONEncoder(check_circular=False).encode,
)  # `encode` makes no circles

_received = bytearray()
_unsent = bytearray()


class ChannelClosed(BaseException):
    """The parent has heard enough."""


def read_line(read: Callable[..., bytes] = os.read, parse: Callable[..., Any] = _parse) -> dict[str, Any]:
    """The next message. Raises ChannelClosed."""
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
    """`held`: goes along with the next one, which saves the processes a turn."""
    _unsent.extend(dumps(message).encode())
    _unsent.extend(b"\n")
    while _unsent and not held:
        del _unsent[: write(CHANNEL, _unsent)]


def encode(value: Any) -> Any:
    """A value as plain JSON. Subclasses are sent as their base; what is no plain value as `{"other": type name}`."""
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
    """An expression that makes the plain value again. Raises TypeError for anything else."""
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return repr(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f"float({repr(value)!r})"
    if kind is list:
        return f"[{', '.join(map(source_of, value))}]"
    if kind is tuple:
        return f"({''.join(source_of(item) + ', ' for item in value)})"
    if kind is dict:
        return f"{{{', '.join(f'{source_of(key)}: {source_of(item)}' for key, item in value.items())}}}"
    if kind is set or kind is frozenset:
        return f"{kind.__name__}([{', '.join(map(source_of, value))}])"
    if kind is complex:
        return f"complex({source_of(value.real)}, {source_of(value.imag)})"
    raise TypeError(f"a test passes a {kind.__name__} to the tested function; only plain values can be passed")


def decode(data: Any) -> Any:
    """The plain value behind `encode`'s form (in a judge, of data that the parent has checked)."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in body}
    if kind == "tuple":
        return tuple(decode(item) for item in body)
    if kind == "set":
        return {decode(item) for item in body}
    if kind == "int":
        return int(body, 16)
    if kind == "float":
        return float(body)
    if kind == "complex":
        return complex(decode(body[0]), decode(body[1]))
    if kind == "bytes":
        return bytes.fromhex(body)
    raise ValueError(f"no plain value: {kind}")


def _module(name: str) -> dict[str, Any]:
    """A fresh module to run code in: dataclasses, pickle and typing look a class's module up by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def failure(error: BaseException) -> dict[str, str]:
    """An exception's name and text; both may be the model's own code, so each may fail in its turn."""
    try:
        name = type.__getattribute__(type(error), "__name__")
        text = str(error)[:300]
    except BaseException:  # the exception's own __str__ raised
        name, text = "Exception", ""
    return {"error": str(name)[:100], "text": text if type(text) is str else ""}


def serve_calls(request: dict[str, Any]) -> None:
    """Runs the model's code and the test's set-up, then answers calls until the parent closes the channel."""
    reply, pack, describe, next_call = send, encode, failure, read_line
    namespace = _module("solution")
    try:
        for part in request["code"]:
            exec(compile(part, "<solution>", "exec"), namespace)
        result: dict[str, Any] = {"ok": None}
    except BaseException as error:  # whatever the model's code raises, SystemExit included, is its result
        result = describe(error)
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


def run_program(request: dict[str, Any]) -> NoReturn:
    """Runs the model's code as a script on file descriptors 0, 1 and 2, with a script's exit codes."""
    os.close(CHANNEL)
    leave, code = os._exit, 0
    namespace = _module("__main__")
    try:
        exec(compile(request["code"][0], "<program>", "exec"), namespace)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # what a script raises is its own; the interpreter would print it and exit with 1
        import traceback

        traceback.print_exc(limit=-5)
        code = 1
    try:
        if (threading := sys.modules.get("threading")) is not None:
            threading._shutdown()  # the interpreter waits for threads as well
        sys.stdout.flush()
    except BaseException:  # a replaced or broken stdout is the program's own fault
        code = code or 1
    leave(code & 0xFF)


class CandidateError(Exception):
    """The tested function raised, or returned no plain value."""


def judge(request: dict[str, Any]) -> NoReturn:
    """Runs a data set's own test code; calls of the tested functions go out to the process that holds the model's."""
    namespace = _module("judge")

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            words = [source_of(item) for item in args] + [f"{k}={source_of(v)}" for k, v in kwargs.items()]
            send({"eval": f"{name}({', '.join(words)})"})
            answer = read_line()
            if "ok" not in answer:
                raise CandidateError(answer.get("error", ""))
            return decode(answer["ok"])

        return call

    try:
        for part in request["setup"]:
            exec(compile(part, "<setup>", "exec"), namespace)
        for alias, name in request["names"].items():
            namespace[alias] = stand_in(name)
    except Exception as error:
        send({"broken": failure(error)})
        os._exit(0)
    try:
        exec(compile(request["test"], "<test>", "exec"), namespace)
        send({"passed": True})
    except (NameError, ImportError, SyntaxError) as error:  # no value of the model's can cause these
        send({"broken": failure(error)})
    except TypeError as error:  # an argument that cannot be passed is the test's fault, other TypeErrors the value's
        send({"broken" if "only plain values" in str(error) else "failed": failure(error)})
    except Exception as error:  # an assertion, or whatever the test does with a wrong value
        send({"failed": failure(error)})
    os._exit(0)


TASKS: dict[str, Callable[[dict[str, Any]], None]] = {"calls": serve_calls, "program": run_program, "judge": judge}


def main() -> NoReturn:
    leave = os._exit
    try:
        request = read_line()
        TASKS[request["task"]](request)
    except ChannelClosed:
        pass
    leave(0)
