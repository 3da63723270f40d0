"""Reading the rows of a data set: a .jsonl, .json or .parquet file, or a Hub data set."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.data import DataConfig

SUFFIXES = (".jsonl", ".json", ".parquet")
GYM = "reasoning_gym:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows, and how to speak of them: `key` is the setting that named them, `where` the file or data set."""

    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    key: str
    where: str


def is_file(source: str) -> bool:
    """Whether `data.source` means a file rather than a data set of the Hub (or a local directory of one)."""
    return Path(source).suffix in SUFFIXES or Path(source).is_file()


def check_source(source: str) -> None:
    """What can be said of `data.source` without reading it; ValueError names what it may be."""
    if is_file(source) or Path(source).is_dir() or _HUB_ID.fullmatch(source):
        return
    near = difflib.get_close_matches(source, ["arithmetic", GYM + "chain_sum"], n=1)
    raise ValueError(
        f"data.source={source!r} is neither arithmetic, a file ({', '.join(SUFFIXES)}), a Hub data set owner/name nor "
        f"{GYM}<task>" + (f"; did you mean {near[0]}?" if near else "")
    )


def read_train(settings: DataConfig) -> Table:
    """The rows of `data.source`; ValueError says what is wrong with the source."""
    check_source(settings.source)
    if is_file(settings.source):
        return read_file(settings.source, "data.source")
    return _read_hub(settings, settings.split, "data.split")


def read_eval(settings: DataConfig) -> Table | None:
    """The held-out rows that `data.eval_path` or `data.eval_split` names; None if they come from the source itself."""
    if settings.eval_path is not None:
        return read_file(settings.eval_path, "data.eval_path")
    if settings.eval_split is None:
        return None
    if is_file(settings.source):
        raise ValueError(
            f"data.eval_split={settings.eval_split!r} needs a Hub data set, but data.source={settings.source!r} is a "
            "file; name a file of held-out rows in data.eval_path, or set data.heldout"
        )
    return _read_hub(settings, settings.eval_split, "data.eval_split")


def read_file(name: str, key: str) -> Table:
    """The rows of a file. ValueError for a missing file, an unknown suffix, broken JSON (with its line), no rows."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{key}={name!r} does not exist{_nearby(path)}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{key}={name!r} must end in {', '.join(SUFFIXES)}; convert it, e.g. with pandas")
    try:
        rows = _READ[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{key}={name!r} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}={name!r}: {error}") from error
    return _table(rows, key, name)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error}); correct or remove it") from error
            if not isinstance(row, dict):
                raise ValueError(f'line {number} must be an object such as {{"prompt": ..., "answer": ...}}')
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno} is not JSON ({error}); if each line is an object of its own, name the file .jsonl"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must be a list of objects, [{...}, {...}]")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet  # here, because it takes a second to load

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"it is no readable Parquet file: {error}") from error
    return rows


_READ = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _read_hub(settings: DataConfig, split: str, key: str) -> Table:
    import datasets  # here, because it takes seconds to load and most runs do without

    where = f"{settings.source} ({split})"
    try:
        rows = datasets.load_dataset(settings.source, settings.subset, split=split)
    except Exception as error:  # the Hub client and the builders have dozens of error types, none of them ours
        raise ValueError(_hub_problem(settings, split, key, error)) from error
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(f"{key}={split!r} gives {type(rows).__name__}; name one split, e.g. train")
    return _table(rows, "data.source", where)


def _hub_problem(settings: DataConfig, split: str, key: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if "split" in reason.lower():
        return f"{key}={split!r} is no split of {settings.source!r}: {reason}"
    if "config name" in reason.lower() or "BuilderConfig" in reason:
        return f"data.subset={settings.subset!r} does not fit {settings.source!r}: {reason}"
    return (
        f"data.source={settings.source!r} cannot be loaded from the Hub ({type(error).__name__}: {reason}); check the "
        "name and the network, or download it and give a file"
    )


def _table(rows: Sequence[Mapping[str, Any]], key: str, where: str) -> Table:
    if len(rows) == 0:
        raise ValueError(f"{key}={where!r} has no rows; give a data set with at least one")
    return Table(rows=rows, columns=tuple(rows[0]), key=key, where=where)


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; nor does its folder {str(folder)!r}"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    near = difflib.get_close_matches(path.name, names, n=1) or names[:5]
    return f"; {str(folder)!r} has {', '.join(near)}" if near else f"; {str(folder.resolve())!r} has no data file"


__all__ = ["GYM", "SUFFIXES", "Table", "check_source", "is_file", "read_eval", "read_file", "read_train"]
