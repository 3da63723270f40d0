"""Columns of a row by their paths, and templates that name them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """The template with columns for `{name}`, with `{{` and `}}` for braces; `\\boxed{}` stays as
    it is. A null, which some tables write as NaN, becomes the empty text."""

    def value(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group()[0]
        cell = column(columns, match.group(1))
        return "" if cell is None or cell != cell else str(cell)

    return _FIELD.sub(value, template)


def fields(template: str) -> list[str]:
    """The columns that a template names."""
    return [name for name in _FIELD.findall(template) if name]


def column(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `reward_model.ground_truth` or `test_list.0`. Raises KeyError,
    with the columns that exist, if there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(missing(path, value if isinstance(value, Mapping) else row))
        value = value[part]
    return value


def missing(name: str, columns: Collection[str]) -> str:
    """`there is no column 'x'; ...` with the columns that exist and the nearest."""
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(columns), n=1)
    return f"there is no column {name!r}, only {', '.join(columns) or 'none at all'}" + (
        f"; did you mean {near[0]}?" if near else ""
    )
