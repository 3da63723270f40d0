"""The layout of a table: its settings first, then the list of known layouts, then its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..config.data import DataConfig
from .columns import missing
from .layouts import Layout, Row, by_name, columns_text, lookup
from .recognition import recognise


def table_layout(settings: DataConfig, head: Sequence[Row], table: str) -> Layout:
    """The paths of prompt, answer and tests in a table's rows: as the settings name them, else by
    `data.layout`, or recognised from the first rows `head`.

    table: its name for messages, e.g. `data.source='train.jsonl'`. Raises ValueError if no column
    is known to be the prompt or the answer.
    """
    try:
        recognised = (
            recognise(head) if settings.layout == "auto" else by_name(settings.layout, head)
        )
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from None
    known = recognised is not None
    layout = recognised or Layout(name="auto")
    if settings.tests_column is not None:
        layout = replace(
            layout, tests=(settings.tests_column,) if settings.tests_column else (), answer=()
        )
    if settings.answer_column is not None:
        layout = replace(
            layout,
            answer=(settings.answer_column,) if settings.answer_column else (),
            options="",
        )
    if settings.prompt_column is not None:
        layout = replace(
            layout, prompt=settings.prompt_column, template="", options="", name=layout.name
        )
    has = columns_text(head)
    if not (layout.prompt or layout.template or settings.prompt_template):
        raise ValueError(
            f"{table}: no column is known to be the prompt, there is only"
            f" {has}; set data.prompt_column, or data.prompt_template to make it of several"
        )
    if not layout.answer and not layout.tests and settings.answer_column != "":
        what = (
            "no column is known to be the answer"
            if known
            else "no column is known to be prompt or answer"
        )
        raise ValueError(
            f"{table}: {what}, there is only {has}; set data.answer_column"
            " (or data.tests_column for programs), or data.answer_column='\"\"' for a reward"
            " that needs no reference"
        )
    return layout


def require_column(key: str, path: str, head: Sequence[Row], where: str) -> None:
    """Raises ValueError, with the columns that exist, if no row has the column that `data.{key}`
    names."""
    if all(lookup(row, path) is None and path not in row for row in head):
        shown, holder = path, head[0]
        if "." in path:
            inner = lookup(holder, path.rpartition(".")[0])
            holder = inner if isinstance(inner, Mapping) else holder
        raise ValueError(f"data.{key}={path!r}: in {where!r} {missing(shown, list(holder))}")
