"""Reading the rows of a data set: files, or a data set of the Hub."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.data import DataConfig
from .files import SUFFIXES, Piece, Row, find_files, format_of, nearby, pieces
from .hub import look_up

GYM = "reasoning_gym:"
HEAD = 2048
"""Rows by which a table is judged before all of it is read."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows with the same columns, not read yet, and their names for messages."""

    key: str
    """The setting that named them."""
    where: str
    """The file, files or data set."""
    name: str
    """A short name for the prompts' source, e.g. `train` of `train.jsonl`."""
    files: tuple[Path, ...]
    """The files that the rows are read from; of the Hub, those of its cache."""
    pieces: Callable[[], Iterator[tuple[str, Piece]]]
    """Yields the rows in order, in pieces, each with the name of its file."""
    rows: int | None = None
    """How many there are; None if that is not known without reading them."""

    def head(self, rows: int = HEAD) -> list[Row]:
        """The first rows. Raises ValueError if there is none."""
        head: list[Row] = []
        for _, piece in self.pieces():
            head += piece_rows(
                piece if isinstance(piece, list) else piece.slice(0, rows - len(head))
            )
            if len(head) >= rows:
                break
        if not head:
            raise ValueError(
                f"{self.key}={self.where!r} has no rows; give a data set with at least one"
            )
        return head[:rows]


def piece_rows(piece: Piece, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a piece. columns: only these (but all of rows that are dicts already)."""
    if isinstance(piece, list):
        return piece
    if columns is not None:
        piece = piece.select([name for name in columns if name in piece.schema.names])
    rows: list[Row] = piece.to_pylist()
    return rows


def check_source(settings: DataConfig) -> None:
    """Checks that `data.source` names something, without reading it. Raises ValueError with the
    kinds of names that it may be otherwise."""
    for name in settings.sources:
        files = find_files(name, "data.source", settings.split, settings.subset)
        if files is not None or (_HUB_ID.fullmatch(name) and not _is_file_name(name)):
            continue
        if _is_file_name(name) or ("/" in name and not _HUB_ID.fullmatch(name) and " " not in name):
            raise ValueError(
                f"data.source={name!r} does not exist{nearby(Path(name).expanduser())}"
            )
        near = difflib.get_close_matches(name, ["arithmetic", GYM + "chain_sum"], n=1)
        raise ValueError(
            f"data.source={name!r} is neither arithmetic, a file ({', '.join(SUFFIXES)}), a folder"
            f" of files, a Hub data set owner/name nor {GYM}<task>"
            + (f"; did you mean {near[0]}?" if near else "")
        )


def train_tables(settings: DataConfig, *, hub: bool = True) -> list[Table]:
    """The tables of `data.source`. hub: include data sets of the Hub, which may be downloaded."""
    check_source(settings)
    tables: list[Table] = []
    for name in settings.sources:
        files = find_files(name, "data.source", settings.split, settings.subset)
        if files is not None:
            tables += file_tables(files, "data.source", name)
        elif hub:
            tables.append(_hub_table(settings, name, settings.split, "data.split"))
    return tables


def eval_tables(settings: DataConfig, *, hub: bool = True) -> list[Table] | None:
    """The tables that `data.eval_path` or `data.eval_split` names; None if held-out rows come from
    the source itself."""
    if settings.eval_path is not None:
        paths = (settings.eval_path,) if isinstance(settings.eval_path, str) else settings.eval_path
        return [table for path in paths for table in _eval_files(path)]
    if settings.eval_split is None:
        return None
    tables: list[Table] = []
    for name in settings.sources:
        if Path(name).expanduser().is_dir():
            files = find_files(name, "data.eval_split", settings.eval_split, settings.subset)
            tables += file_tables(files or [], "data.eval_split", name)
        elif find_files(name, "data.source") is not None or _is_file_name(name):
            raise ValueError(
                f"data.eval_split={settings.eval_split!r} needs a Hub data set or a folder, but"
                f" data.source={name!r} is a file; name a file of held-out rows in data.eval_path,"
                " or set data.heldout"
            )
        elif hub:
            tables.append(_hub_table(settings, name, settings.eval_split, "data.eval_split"))
    return tables


def _eval_files(path: str) -> list[Table]:
    files = next(
        (tables for split in ("test", "train") if (tables := _try(path, split)) is not None), None
    )
    if files is None:
        raise ValueError(f"data.eval_path={path!r} does not exist{nearby(Path(path).expanduser())}")
    return file_tables(files, "data.eval_path", path)


def _try(path: str, split: str) -> list[Path] | None:
    try:
        return find_files(path, "data.eval_path", split)
    except ValueError:
        if split == "train":
            raise
        return None


def file_tables(files: Sequence[Path], key: str, where: str) -> list[Table]:
    """A table for each set of files with the same columns: shards are one table, a file of
    mathematics and one of code are two."""
    groups: list[tuple[frozenset[str], list[Path]]] = []
    for file in files:
        columns = frozenset(_columns(file, key))
        known = next((group for names, group in groups if names == columns), None)
        if known is None:
            groups.append((columns, [file]))
        else:
            known.append(file)
    tables = []
    for _, group in groups:
        shown = (
            where
            if len(groups) == 1
            else str(group[0]) + (f" and {len(group) - 1} more" if group[1:] else "")
        )
        folder = len(groups) == 1 and (Path(where).expanduser().is_dir() or len(group) > 1)
        name = Path(where).name if folder else group[0].name
        counts = [_row_count(file) for file in group]
        tables.append(
            Table(
                key=key,
                where=shown,
                name=re.sub(r"(\.[A-Za-z]+)+$", "", name) or name,
                files=tuple(group),
                pieces=lambda group=group: _file_pieces(group, key),  # type: ignore[misc]
                rows=(
                    sum(count for count in counts if count is not None)
                    if None not in counts
                    else None
                ),
            )
        )
    if not any(_columns(file, key) for file in files):
        raise ValueError(f"{key}={where!r} has no rows; give a data set with at least one")
    return tables


def _file_pieces(files: Sequence[Path], key: str) -> Iterator[tuple[str, Piece]]:
    for file in files:
        try:
            for piece in pieces(file):
                yield str(file), piece
        except ValueError as error:
            raise ValueError(f"{key}={str(file)!r}: {error}") from error


def _columns(file: Path, key: str) -> list[str]:
    """The names of the first row's columns; [] for a file without rows."""
    first = next((piece for _, piece in _file_pieces([file], key)), None)
    if first is None:
        return []
    return (
        list(first[0])
        if isinstance(first, list)
        else list(first.schema.names)
        if first.num_rows
        else []
    )


def _row_count(file: Path) -> int | None:
    if format_of(file) != ".parquet":
        return None
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


def _hub_table(settings: DataConfig, name: str, split: str, key: str) -> Table:
    import datasets  # here: it takes seconds to load, and most runs do without

    look_up()
    try:
        rows = datasets.load_dataset(name, settings.subset, split=split, revision=settings.revision)
    # the Hub client and the builders have dozens of error types, none of them ours
    except Exception as error:
        raise ValueError(_hub_problem(settings, name, split, key, error)) from error
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(f"{key}={split!r} gives {type(rows).__name__}; name one split, e.g. train")
    where = f"{name} ({split})"
    if len(rows) == 0:
        raise ValueError(f"data.source={where!r} has no rows; give a data set with at least one")

    def read() -> Iterator[tuple[str, Piece]]:
        # memory-mapped: read as it is asked for
        for table in rows.with_format("arrow").iter(batch_size=8192):
            yield from ((where, batch) for batch in table.to_batches())

    files = tuple(Path(file["filename"]) for file in rows.cache_files)
    short = name.rstrip("/").rsplit("/", 1)[-1]
    return Table(
        key="data.source", where=where, name=short, files=files, pieces=read, rows=len(rows)
    )


def _hub_problem(settings: DataConfig, name: str, split: str, key: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if settings.revision is not None and "revision" in reason.lower():
        return f"data.revision={settings.revision!r} is none of {name!r}: {reason}"
    if "split" in reason.lower():
        return f"{key}={split!r} is no split of {name!r}: {reason}"
    if "config name" in reason.lower() or "BuilderConfig" in reason:
        return f"data.subset={settings.subset!r} does not fit {name!r}: {reason}"
    return (
        f"data.source={name!r} cannot be loaded from the Hub ({type(error).__name__}: {reason});"
        " check the name and the network, or download it and give a file"
    )


def _is_file_name(name: str) -> bool:
    return bool(format_of(Path(name))) or name.startswith(("~", "./", "../", "/"))


def as_json(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON; values without a JSON type (dates, decimals) become text."""
    return json.dumps(row, default=_worded).encode()


def _worded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
