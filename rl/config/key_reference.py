"""Every key with its type, its default and its meaning, read from the models themselves."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .cautions import shown
from .overrides import members

_SENTENCE_END = re.compile(r"(?<!e\.g)\.\s+(?=[A-Z`0-9])")
_WORDS: Mapping[Any, str] = {
    str: "text",
    int: "int",
    float: "number",
    bool: "true|false",
    NoneType: "null",
    Any: "anything",
}
NAME = "NAME"
"""Stands for a name of the user's own in a key: `reward.parts.NAME.use`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One key of a file."""

    key: str
    owner: type[BaseModel]
    field: FieldInfo

    @property
    def group(self) -> type[BaseModel] | None:
        """The keys below this one."""
        models = (k for k in self._kinds if isinstance(k, type) and issubclass(k, BaseModel))
        return next(models, None)

    @property
    def _kinds(self) -> list[Any]:
        """The members of the annotation, and of the values of mappings in it."""
        kinds = list(members(self.field.annotation))
        held = [get_args(kind)[1] for kind in kinds if _is_mapping(kind)]
        return [*kinds, *(kind for inner in held for kind in members(inner))]

    @property
    def is_mapping(self) -> bool:
        return any(_is_mapping(kind) for kind in members(self.field.annotation))

    @property
    def type(self) -> str:
        return _either(self.field.annotation) + _bounds(self.field)

    @property
    def default(self) -> str:
        value = self.field.get_default(call_default_factory=True)
        if value is PydanticUndefined:
            return "required"
        if isinstance(value, BaseModel):
            return ""
        if isinstance(value, Mapping):
            return shown({name: _plain(inner) for name, inner in value.items()})
        return shown(value) or '""'

    @property
    def meaning(self) -> str:
        """The docstring below the field, in one line."""
        text = docstrings(self.owner).get(self.key.rpartition(".")[2], "")
        if not text and self.group is not None:
            text = inspect.getdoc(self.group) or ""
        return " ".join(text.split())


def entries(model: type[BaseModel], prefix: str = "") -> Iterator[Entry]:
    """Every key in the order of the models, a group before its keys."""
    for name, field in model.model_fields.items():
        entry = Entry(key=prefix + name, owner=model, field=field)
        yield entry
        if entry.group is not None:
            name = f"{NAME}." if entry.is_mapping else ""
            yield from entries(entry.group, f"{entry.key}.{name}")


def table(model: type[BaseModel], within: str = "") -> list[str]:
    """A line for each key, or for each at or below `within`. Raises ValueError if there is none."""
    shown_entries = [
        e for e in entries(model) if not within or f"{e.key}.".startswith(f"{within}.")
    ]
    if not shown_entries:
        groups = ", ".join(e.key for e in entries(model) if "." not in e.key)
        raise ValueError(f"there is no key {within!r}; the first names are {groups}")
    return [line_of(entry, whole=bool(within)) for entry in shown_entries]


def line_of(entry: Entry, *, whole: bool = False) -> str:
    """`optim.lr  number (> 0, <= 1) = 1e-06  # Learning rate`, with the first sentence or all."""
    head = entry.key
    if entry.group is None or entry.default:
        head += f"  {entry.type} = {entry.default}"
    meaning = entry.meaning if whole else _SENTENCE_END.split(entry.meaning)[0].rstrip(".")
    return f"{head}  # {meaning}"


def described(kind: Any) -> str:
    """A type as a person writes its values."""
    origin = get_origin(kind)
    if origin is Literal:
        return "|".join(shown(word) for word in get_args(kind))
    if _is_mapping(kind):
        return "{name: " + _either(get_args(kind)[1]) + "}"
    if origin is tuple:
        items = ["..." if part is Ellipsis else _either(part) for part in get_args(kind)]
        return f"[{', '.join(items)}]"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{...}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _either(kind: Any) -> str:
    return " or ".join(described(member) for member in members(kind))


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {shown(getattr(rule, name))}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


@cache
def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings below the fields of a model, or of one that it extends, from its source."""
    texts: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            texts |= _of_source(inspect.getsource(owner))
    return texts


def _of_source(source: str) -> dict[str, str]:
    [body] = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(str(below.value.value))
        for field, below in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
