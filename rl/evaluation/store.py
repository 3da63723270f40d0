"""The folder of an evaluation: its settings, every sample with its verdict, and what was made of
them.

    settings.json  samples/part-000000.parquet ...  result.json  report.html  *.png

The answers to a problem, at all thinking budgets, are written together in one file that appears
whole or not at all. So a killed evaluation has lost what it was about to write, and nothing is
written twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from ...rewards.verdict import Status
from ..config.load import ConfigError
from .measures import Outcome

SETTINGS, RESULT, SAMPLES = "settings.json", "result.json", "samples"
_ROWS, _SECONDS = 256, 10.0
"""Rows of a file at most, but for its last problem, and how old they may get before it is
written."""

SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("problem", pa.string()),  # its id
        ("budget", pa.int32()),  # tokens of thoughts at most; null: without a budget
        ("sample", pa.int32()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("tokens", pa.int32()),  # sampled ones
        ("forced_tokens", pa.int32()),  # that ended the thoughts
        ("thought_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("status", pa.string()),
        ("score", pa.float64()),
        ("parts", pa.string()),  # JSON
        ("message", pa.string()),
        ("answer", pa.string()),  # as the verifier reads it
        ("vote", pa.int32()),  # which answer it is; 0: the right one
        ("grade_s", pa.float64()),
    ]
)
_FIGURES = (
    *("set", "problem", "budget", "sample", "source", "kind", "tokens", "thought_tokens"),
    *("finish_reason", "status", "score", "vote"),
)
Cell = tuple[str, int | None]
"""A set, and a thinking budget."""


def is_evaluation(folder: Path) -> bool:
    """Whether this is an evaluation's folder; a run's checkpoints have settings of that name,
    too."""
    return (folder / SETTINGS).is_file() and (folder / SAMPLES).is_dir()


class Store:
    """One evaluation's folder, open for writing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[Mapping[str, Any]] = []
        self._since = time.monotonic()
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        for left in (folder / SAMPLES).glob(".*.parquet"):
            left.unlink()  # of a kill in the middle of a write
        names = [int(p.stem.split("-")[1]) for p in (folder / SAMPLES).glob("part-*.parquet")]
        self._next = max(names, default=-1) + 1

    def done(self) -> set[tuple[str, str]]:
        """(set, problem) of all that is written."""
        table = read(self.folder, ("set", "problem"))
        return set(zip(table["set"].to_pylist(), table["problem"].to_pylist(), strict=True))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """All rows of one problem."""
        self._rows += rows
        if len(self._rows) >= _ROWS or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            path = self.folder / SAMPLES / f"part-{self._next:06}.parquet"
            hidden = path.with_name(f".{path.name}")
            parquet.write_table(_table(self._rows), hidden)
            os.replace(hidden, path)
            self._rows = []
            self._next += 1
        self._since = time.monotonic()


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=SCHEMA)
    except UnicodeEncodeError:  # half a surrogate pair, of a data set or a verifier's message
        return pa.Table.from_pylist(
            [{key: _whole(value) for key, value in row.items()} for row in rows], schema=SCHEMA
        )


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def read(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All samples of an evaluation."""
    files = sorted((folder / SAMPLES).glob("part-*.parquet"))
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    tables = [parquet.read_table(file, columns=list(schema.names)) for file in files]
    return pa.concat_tables([schema.empty_table(), *tables])


def outcomes_of(folder: Path) -> dict[Cell, list[Outcome]]:
    """How the answers came out, by set and budget, in the order of the problems' ids. An error
    where a sample is missing or there twice."""
    cells: dict[Cell, dict[str, list[dict[str, Any]]]] = {}
    for row in read(folder, _FIGURES).to_pylist():
        problems = cells.setdefault((row["set"], row["budget"]), {})
        problems.setdefault(row["problem"], []).append(row)
    by_cell: dict[Cell, list[Outcome]] = {}
    for cell, problems in sorted(cells.items(), key=lambda c: (c[0][0], c[0][1] or 1 << 40)):
        by_cell[cell] = [_outcome(name, rows) for name, rows in sorted(problems.items())]
    return by_cell


def _outcome(problem: str, rows: list[dict[str, Any]]) -> Outcome:
    rows = sorted(rows, key=lambda row: int(row["sample"]))
    numbers = [row["sample"] for row in rows]
    assert numbers == list(range(len(rows))), f"{problem} has the samples {numbers}"
    return Outcome(
        problem=problem,
        source=rows[0]["source"],
        statuses=tuple(Status(row["status"]) for row in rows),
        scores=tuple(row["score"] for row in rows),
        votes=tuple(row["vote"] for row in rows),
        tokens=tuple(row["tokens"] for row in rows),
        thoughts=tuple(row["thought_tokens"] for row in rows),
        cut=tuple(row["finish_reason"] == "length" for row in rows),
        kind=rows[0]["kind"],
    )


def open_folder(out: Path | None, label: str, settings: Mapping[str, Any]) -> Path:
    """The folder of an evaluation with these settings: that of an earlier one goes on. Without
    `out` it is the first of evals/LABEL, evals/LABEL-2, ... that has the same settings or is free.
    `ConfigError` where `out` is another evaluation's."""
    if out is not None:
        differing = _differing(out, settings)
        if differing:
            raise ConfigError(
                f"--out {out} holds an evaluation with other settings ({'; '.join(differing[:4])});"
                " give another folder"
            )
        folder = out
    else:
        base = Path("evals") / (label or "model")
        folder, number = base, 1
        while _differing(folder, settings):
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{SETTINGS}"
        new.write_text(json.dumps(settings, indent=1))
        new.replace(folder / SETTINGS)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); set --out") from error
    return folder


def _differing(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The settings of the evaluation in a folder that are others; none where there is none."""
    file = folder / SETTINGS
    if not file.is_file():
        return ["it is no evaluation"] if folder.is_dir() and any(folder.iterdir()) else []
    before = json.loads(file.read_text())
    return [
        f"{key}: {json.dumps(before.get(key))[:100]}, now {json.dumps(settings.get(key))[:100]}"
        for key in sorted(before.keys() | settings.keys())
        # what an older emberl did not write down cannot be compared
        if before.get(key) != settings.get(key) and (key in before or key != "files")
    ]
