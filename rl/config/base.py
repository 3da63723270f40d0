"""The base of every group of keys: frozen, closed, and strict about YAML's booleans. Loads no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LONGEST = 31_536_000.0
"""Seconds of a year: no wait may be longer, so that every wait has a deadline."""
MOST_STEPS, MOST_ANSWERS, MOST_TOKENS = 100_000_000, 10_000_000, 10_000_000
"""Sizes beyond reason: a typed zero too many, not an experiment."""


class Settings(BaseModel):
    """A frozen group of keys; a key that it does not know is an error, and so are infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_stray_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 reads on, off, yes and no as booleans, and Python counts with these:
        `group_size: yes` would be 1."""
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {"on", "off"} <= _words(kind):
            return "on" if value else "off"
        if (
            not _takes(kind, bool)
            and not _takes(kind, BaseModel)
            and (booleans := _booleans(value))
        ):
            word = "yes and on as true" if booleans[0] else "no and off as false"
            number = _takes(kind, int) or _takes(kind, float)
            fix = "write a number" if number else "put the word in quotes"
            raise ValueError(f"a boolean does not go here (YAML reads {word}); {fix}")
        return value


def _words(kind: Any) -> set[Any]:
    """The words of a Literal, also inside a Union."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return set().union(*(_words(part) for part in get_args(kind)))


def _takes(kind: Any, wanted: type) -> bool:
    """Whether an annotation admits `wanted` or a subclass of it; `Any` admits everything."""
    if kind is Any or (isinstance(kind, type) and issubclass(kind, wanted)):
        return True
    return any(_takes(part, wanted) for part in get_args(kind))


def _booleans(value: Any) -> list[bool]:
    """The booleans in a value, in a list, or among the values of a mapping."""
    if isinstance(value, bool):
        return [value]
    if isinstance(value, list | tuple):
        return [boolean for part in value for boolean in _booleans(part)]
    if isinstance(value, Mapping):
        return [part for part in value.values() if isinstance(part, bool)]
    return []
