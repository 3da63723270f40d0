"""The folder of an evaluation: its settings, every sample with its verdict, and the results.

    settings.json  samples/part-000000.parquet ...  result.json  report.html  *.png

The answers to a problem, at all thinking budgets, are written together in one file that appears
atomically. So a killed evaluation loses only the rows that it was about to write, and no row is
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
"""A file is written once it has so many rows, or once this much time has passed since the last."""

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
    """Whether this is an evaluation's folder; the settings alone do not tell, since a run's
    checkpoints have a file of that name too."""
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
        """(set, problem) of every problem whose rows are written."""
        table = read(self.folder, ("set", "problem"))
        return set(zip(table["set"].to_pylist(), table["problem"].to_pylist(), strict=True))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes all rows of one problem; writes a file when it is due."""
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
    except UnicodeEncodeError:  # half a surrogate pair, from a data set or a verifier's message
        return pa.Table.from_pylist(
            [{key: _whole(value) for key, value in row.items()} for row in rows], schema=SCHEMA
        )


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def read(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All samples of an evaluation as an Arrow table."""
    files = sorted((folder / SAMPLES).glob("part-*.parquet"))
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    tables = [parquet.read_table(file, columns=list(schema.names)) for file in files]
    return pa.concat_tables([schema.empty_table(), *tables])


def outcomes_of(folder: Path) -> dict[Cell, list[Outcome]]:
    """The outcomes by set and budget, in the order of the problems' ids. Raises AssertionError if a
    sample is missing or stored twice."""
    cells: dict[Cell, dict[str, list[dict[str, Any]]]] = {}
    for row in read(folder, _FIGURES).to_pylist():
        problems = cells.setdefault((row["set"], row["budget"]), {})
        problems.setdefault(row["problem"], []).append(row)
    by_cell: dict[Cell, list[Outcome]] = {}
    # without a budget comes last
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
    """The folder of an evaluation with these settings, which resumes an earlier one. Without `out`
    it is the first of evals/LABEL, evals/LABEL-2, ... that has the same settings or is free. Raises
    ConfigError if `out` belongs to another evaluation."""
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
    """A line for each setting in which the evaluation in a folder differs; none if the folder is
    free."""
    file = folder / SETTINGS
    if not file.is_file():
        return ["it is no evaluation"] if folder.is_dir() and any(folder.iterdir()) else []
    before = json.loads(file.read_text())
    return [
        f"{key}: {json.dumps(before.get(key))[:100]}, now {json.dumps(settings.get(key))[:100]}"
        for key in sorted(before.keys() | settings.keys())
        # older versions did not write `files`, so it cannot be compared with theirs
        if before.get(key) != settings.get(key) and (key in before or key != "files")
    ]
