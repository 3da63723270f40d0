"""Messages about a configuration that is not valid: the key, the value and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .foreign import our_name
from .key_reference import entries
from .overrides import kinds_at, members

_FIXES = {
    "string_type": "a text goes here; put it in quotes",
    "string_too_short": "it must not be empty",
    "string_pattern_mismatch": "it names a directory: no slash in it, no dot or space first",
    "tuple_type": "a list goes here, e.g. [a,b]",
    "dict_type": "a mapping goes here, e.g. {{a: 1}}",
    "mapping_type": "a mapping goes here, e.g. {{a: 1}}",
    "model_type": "a group goes here; set one of its keys, {keys}",
    "model_attributes_type": "a group goes here; set one of its keys, {keys}",
}
"""Our message in place of pydantic's, by the type of the error."""
MOST_SHOWN = 120
"""Characters of a value."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All problems in one line, each with its key, its value and what would be right."""
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        path = _path(item["loc"], model)
        key = ".".join(path)
        nested = isinstance(item["input"], Mapping) and len(item["input"]) > 0
        if item["type"] in ("missing", "too_long") and (count := _count(path, model)):
            key = key.rstrip(".0123456789")
            lines = [_wrong(key, list(item["input"]), f"a list of {count} values goes here")]
        elif item["type"] == "missing":
            lines = [f"{key} is required but missing; add it to the file or pass {key}=..."]
        elif item["type"] == "extra_forbidden" or (nested and not _holds_keys(path, model)):
            lines = list(_unknown(path, item["input"], model))
        else:
            lines = [_wrong(key, item["input"], _message(item, path, model))]
        problems.setdefault(key, []).extend(lines)
    return "; ".join(line for lines in problems.values() for line in _alternatives(lines))


def _path(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The parts of the key, without those that pydantic adds to name a member of a union."""
    path: list[str] = []
    for part in map(str, location):
        kinds = [kind for annotation in kinds_at(model, path) for kind in members(annotation)]
        names_a_member = path and any(map(_is_leaf, kinds)) and not kinds_at(model, [*path, part])
        if not names_a_member or part.isdigit():
            path.append(part)
    return path


def _count(path: list[str], model: type[BaseModel]) -> int:
    """The length of the fixed-length list at, or around, this path; 0 if there is none."""
    around = path[:-1] if path[-1].isdigit() else path
    kinds = [kind for annotation in kinds_at(model, around) for kind in members(annotation)]
    lists = [get_args(kind) for kind in kinds if get_origin(kind) is tuple]
    return max((len(parts) for parts in lists if Ellipsis not in parts), default=0)


def _holds_keys(path: list[str], model: type[BaseModel]) -> bool:
    """Whether there may be keys below this one."""
    return any(kinds_at(model, [*path, name]) for name in ("any", *_names(path, model)))


def _names(path: list[str], model: type[BaseModel]) -> list[str]:
    """The keys of the group at this path."""
    return [
        name
        for annotation in (kinds_at(model, path) if path else [model])
        for kind in members(annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for name in kind.model_fields
    ]


def _is_leaf(kind: Any) -> bool:
    return not (isinstance(kind, type) and issubclass(kind, BaseModel)) and kind is not type(None)


def _wrong(key: str, value: Any, message: str) -> str:
    if not key:
        return message
    shown = repr(value)
    if len(shown) > MOST_SHOWN:
        shown = f"{shown[:MOST_SHOWN]}..."
    if message.startswith(f"{key}.") or message.startswith(f"{key}="):
        return message
    return f"{key}: {message}" if isinstance(value, Mapping) else f"{key}={shown}: {message}"


def _message(item: Any, path: list[str], model: type[BaseModel]) -> str:
    if item["type"] == "string_type" and item["input"] is None:
        return "a text goes here, and null is none; write 'null' in quotes if that is the text"
    if fix := _FIXES.get(item["type"]):
        below = [".".join([*path, name]) for name in _names(path, model)[:4]]
        return fix.format(keys=", ".join(below))
    message: str = item["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _alternatives(lines: list[str]) -> list[str]:
    """The messages of a union's members about one value joined by `or`; else `lines`."""
    split = [line.partition(": ") for line in lines]
    if (
        len(lines) > 1
        and len({head for head, _, _ in split}) == 1
        and all(tail for _, _, tail in split)
    ):
        return [f"{split[0][0]}: {', or '.join(tail for _, _, tail in split)}"]
    return lines


def _unknown(path: list[str], value: Any, model: type[BaseModel]) -> Iterator[str]:
    """A line for each key at or below `path` that a peer has; if there is none, one for `path`."""
    below = list(_leaves(path, value))
    answers = {key: our_name(key) for key in below if not _near_own(key, model)}
    foreign = {key: ours for key, ours in answers.items() if ours is not None}
    for key, ours in foreign.items():
        fix = ours.removeprefix("- ")
        said = f"emberl calls it {ours}" if fix == ours else fix
        yield f"unknown key {key}: {said}"
    if not foreign and kinds_at(model, path):
        key = ".".join(path)
        yield f"unknown key {below[0]}; {key} has no keys below it, give {key} itself a value"
    elif not foreign:
        yield f"unknown key {'.'.join(path)}; {_nearest(path, model)}"


def _leaves(path: list[str], value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves([*path, str(name)], inner)
    else:
        yield ".".join(path)


def _near_own(key: str, model: type[BaseModel]) -> bool:
    """Whether it is a misspelt key of ours rather than a peer's."""
    group, _, last = key.rpartition(".")
    siblings = _names(group.split(".") if group else [], model)
    return bool(difflib.get_close_matches(last, siblings, n=1, cutoff=0.8))


def _nearest(path: list[str], model: type[BaseModel]) -> str:
    """A suggestion for an unknown key: a sibling of nearly that name, a key of that name in another
    group, or the names of all siblings."""
    *group, last = path
    prefix = "".join(f"{part}." for part in group)
    siblings = _names(group, model)
    if near := difflib.get_close_matches(last, siblings, n=1, cutoff=0.5):
        return f"did you mean {prefix}{near[0]}?"
    known = {entry.key.rpartition(".")[2]: entry.key for entry in reversed(list(entries(model)))}
    if elsewhere := difflib.get_close_matches(last, known, n=1, cutoff=0.8):
        return f"did you mean {known[elsewhere[0]]}?"
    return f"{prefix.rstrip('.') or 'the top level'} has {', '.join(siblings)}"
