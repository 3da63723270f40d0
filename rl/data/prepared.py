"""A table's distinct problems: read in pieces, rows of the same prompt and answer folded into one,
stored column by column.

The result for a large table is cached in `$XDG_CACHE_HOME/emberl/data` (or `~/.cache`), under a
hash of the files' content and of the settings, and opened as a memory map: a table may be larger
than the memory. Files there may be deleted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.data import DataConfig
from .mapping import BadRow, Mapped, Mapper
from .rows import Table, as_json, piece_rows

CACHED_BYTES = 16 << 20
"""Tables of fewer bytes are not cached: reading them takes a second or two at most."""
_VERSION = 1
"""Version of the cached format and of the layouts' mapping: count up when either changes."""
_JSON, _NUMBER, _KEY, _SIZE, _TURNS = (
    f"emberl {what}" for what in ("json", "number", "key", "size", "turns")
)
_OWN = (_NUMBER, _KEY, _SIZE, _TURNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The outcome of reading a table's rows."""

    read: int
    folded: int
    """Rows with the prompt and answer of an earlier one."""
    bad: int
    example: str = ""
    """The first bad row and its fault."""


class Rows(Sequence[Mapping[str, Any]]):
    """Rows stored in Arrow's columns, or as JSON if they came from a text file; each becomes a dict
    when it is asked for."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._json = _JSON in table.column_names

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return next(iter(self._rows(self._table.slice(index, 1))))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=512):
            yield from self._rows(batch)

    def _rows(self, part: Any) -> Iterator[Mapping[str, Any]]:
        rows = part.to_pylist()
        if self._json:
            return (json.loads(row[_JSON]) for row in rows)
        return (json.loads(as_json(row)) if _has_objects(row) else row for row in rows)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """The problems of one table: aligned arrays and rows."""

    rows: Rows
    numbers: NDArray[np.int64]
    """[N] the row's place in its table, from 0."""
    keys: NDArray[np.void]
    """[N] 16 bytes, a hash of the prompt's text: the same in every data set that has the
    problem."""
    sizes: NDArray[np.int32]
    """[N] bytes of the prompt, in UTF-8, without a template."""
    turns: NDArray[np.int16]
    """[N] messages."""
    counts: Counts


def prepare(table: Table, mapper: Mapper, settings: DataConfig) -> Prepared:
    """Reads a table once, or takes it from the cache. Raises ValueError for the first bad row if
    `data.drop` is none, and if most rows are bad."""
    import pyarrow

    cached = _cache_file(table, settings)
    if cached is not None:
        prepared = _load(cached)
        if prepared is None and _save(_Fold(table, mapper, settings), cached):
            prepared = _load(cached)
        if prepared is not None:
            return prepared
    fold = _Fold(table, mapper, settings)
    parts = list(fold.parts())
    counts = fold.counts()
    return _prepared(pyarrow.concat_tables(parts, promote_options="permissive"), counts)


class _Fold:
    """One pass over a table: its distinct problems in parts, and the counts of its rows."""

    def __init__(self, table: Table, mapper: Mapper, settings: DataConfig) -> None:
        self._table = table
        self._mapper = mapper
        self._drop = settings.drop == "bad"
        self._needed = sorted(mapper.needed)
        self._seen: set[bytes] = set()
        self._read = self._folded = self._bad = 0
        self._example = ""

    def parts(self) -> Iterator[Any]:
        """Arrow tables of the rows that are new problems, with a column for each of `_OWN`."""
        start, current = 0, ""
        for where, piece in self._table.pieces():
            if where != current:
                start, current = self._read, where
            chosen: list[int] = []
            figures: list[tuple[int, bytes, int, int]] = []
            for at, row in enumerate(piece_rows(piece, self._needed)):
                number = self._read + at
                try:
                    of_row = self._figures(row)
                except BadRow as error:
                    self._note_bad(
                        f"{self._table.key}={where!r}, row {number + 1 - start}: {error}"
                    )
                    continue
                if of_row is not None:
                    chosen.append(at)
                    figures.append((number, *of_row))
            self._read += len(piece)
            if chosen:
                yield _with_figures(_taken(piece, chosen), figures)

    def _figures(self, row: Mapping[str, Any]) -> tuple[bytes, int, int] | None:
        """A row's key, size and turns; None if an earlier row has the same prompt and answer."""
        mapped = self._mapper(row)
        key, text = key_of(mapped)
        whole = blake2b(key + mapped.answer.encode(errors="surrogatepass"), digest_size=16).digest()
        if whole in self._seen:
            self._folded += 1
            return None
        self._seen.add(whole)
        # they go into an int16 column
        turns = 1 if isinstance(mapped.content, str) else min(len(mapped.content), 32_000)
        return key, len(text), turns

    def _note_bad(self, example: str) -> None:
        self._bad += 1
        self._example = self._example or example
        if not self._drop:
            raise ValueError(f"{example}; mend or remove the row, or set data.drop=bad")

    def counts(self) -> Counts:
        """The counts, once all parts were read. Raises ValueError if there are no rows, or most of
        them are bad."""
        if self._read == 0:
            raise ValueError(
                f"{self._table.key}={self._table.where!r} has no rows; give a data set with at"
                " least one"
            )
        if 2 * self._bad > self._read:
            raise ValueError(
                f"{self._bad} of {self._read} rows have no prompt or no answer; is it the right"
                f" layout? {self._example}"
            )
        return Counts(read=self._read, folded=self._folded, bad=self._bad, example=self._example)


def key_of(mapped: Mapped) -> tuple[bytes, bytes]:
    """The 16-byte hash of a prompt's text, without blanks around its messages, and that text."""
    text = mapped.text.encode(errors="surrogatepass")
    parts = [part.strip() for part in text.split(b"\0")]
    return blake2b(b"\0".join(parts), digest_size=16).digest(), text


def _taken(piece: Any, chosen: Sequence[int]) -> Any:
    import pyarrow

    if not isinstance(piece, list):
        return pyarrow.Table.from_batches([piece]).take(
            _array(pyarrow.int64(), np.array(chosen, np.int64))
        )
    lines = [as_json(piece[at]) for at in chosen]
    ends = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    buffers = [None, pyarrow.py_buffer(ends.tobytes()), pyarrow.py_buffer(b"".join(lines))]
    return pyarrow.Table.from_arrays(
        [pyarrow.Array.from_buffers(pyarrow.large_binary(), len(lines), buffers)], [_JSON]
    )


def _with_figures(rows: Any, of_rows: Sequence[tuple[int, bytes, int, int]]) -> Any:
    import pyarrow

    numbers, keys, sizes, turns = zip(*of_rows, strict=True)
    figures = (
        _array(pyarrow.int64(), np.array(numbers, np.int64)),
        _array(pyarrow.binary(16), np.frombuffer(b"".join(keys), "V16")),
        _array(pyarrow.int32(), np.array(sizes, np.int32)),
        _array(pyarrow.int16(), np.array(turns, np.int16)),
    )
    for name, figure in zip(_OWN, figures, strict=True):
        rows = rows.append_column(name, figure)
    return rows


def _array(kind: Any, values: NDArray[Any]) -> Any:
    """An Arrow array without nulls of a numpy array's bytes."""
    import pyarrow

    # from buffers: `pyarrow.array` would import pandas, for seconds

    return pyarrow.Array.from_buffers(
        kind, len(values), [None, pyarrow.py_buffer(values.tobytes())]
    )


def _prepared(table: Any, counts: Counts) -> Prepared:
    arrays = [table.column(name).combine_chunks() for name in _OWN]
    keys = np.frombuffer(b"".join(arrays[1].to_pylist()), "V16")
    return Prepared(
        rows=Rows(table.drop_columns(list(_OWN))),
        numbers=arrays[0].to_numpy(zero_copy_only=False),
        keys=keys,
        sizes=arrays[2].to_numpy(zero_copy_only=False),
        turns=arrays[3].to_numpy(zero_copy_only=False),
        counts=counts,
    )


def cache_folder() -> Path:
    """The directory of the cached tables."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "emberl" / "data"


def _cache_file(table: Table, settings: DataConfig) -> Path | None:
    """The cache's file for a table; None for small tables, and for those not read from files."""
    if not table.files or sum(file.stat().st_size for file in table.files) < CACHED_BYTES:
        return None
    import xxhash

    names = (
        "layout",
        "prompt_column",
        "answer_column",
        "tests_column",
        "answer_pattern",
        "prompt_template",
        "drop",
    )
    parts = [str(_VERSION), table.where, *(repr(getattr(settings, name)) for name in names)]
    digest = xxhash.xxh3_128("\0".join(parts).encode())
    for path in table.files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return cache_folder() / f"{digest.hexdigest()}.arrow"


def _save(fold: _Fold, path: Path) -> bool:
    """Writes the parts as they come, so that they need not fit into memory; atomically, also if
    another process writes the same. False if the folder cannot be written to, or if the parts have
    types that cannot be cast to one schema."""
    import pyarrow

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as folder:
            file = Path(folder) / path.name
            _write(fold, file)
            notes = file.with_suffix(".json")
            notes.write_text(json.dumps(asdict(fold.counts())))
            # the counts last: `_load` reads them first, so rows without counts do not exist yet
            os.replace(file, path)
            os.replace(notes, path.with_suffix(".json"))
    except (OSError, pyarrow.ArrowException):
        return False
    return True


def _write(fold: _Fold, file: Path) -> None:
    import pyarrow

    parts = fold.parts()
    first = next(parts, None)
    if first is None:
        fold.counts()
        raise AssertionError("rows without a problem are an error")
    with pyarrow.ipc.new_file(str(file), first.schema) as writer:
        writer.write_table(first)
        for part in parts:
            writer.write_table(part.cast(first.schema))


def _load(path: Path) -> Prepared | None:
    """The cached table; None if there is no such file, or if it cannot be read."""
    import pyarrow

    try:
        counts = Counts(**json.loads(path.with_suffix(".json").read_text()))
        return _prepared(pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all(), counts)
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
        return None


def _has_objects(value: Any) -> bool:
    """Whether it contains a value that JSON has no type for, such as a date."""
    if isinstance(value, Mapping):
        return any(_has_objects(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_objects(each) for each in value)
    return not (value is None or isinstance(value, str | int | float))
