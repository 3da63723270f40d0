"""Data files: the files that a name stands for, and their rows in pieces, whatever the format.

Formats: Parquet, Arrow (as `save_to_disk` writes it), JSON, JSON lines, CSV and TSV, the texts also
behind .gz, .bz2, .xz or .zst. A file is never held in memory as a whole unless it is one JSON
value.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_PIECE = 8192  # rows
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
    "eval": ("eval", "evaluation"),
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""One half of a surrogate pair as JSON escapes it."""
_HALF = re.compile("[\ud800-\udfff]")
_DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")

Row = dict[str, Any]
Piece = Any
"""A `pyarrow.RecordBatch`, or a list of rows."""


def format_of(path: Path) -> str:
    """The suffix before that of a compression, e.g. `.jsonl` of `train.jsonl.gz`; of a file without
    any suffix the one its content fits; "" if unknown."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    suffix = Path(name).suffix
    if suffix in SUFFIXES:
        return ".jsonl" if suffix == ".ndjson" else suffix
    if suffix == "" and path.is_file():
        with _opened(path) as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head[:4] == b"PAR1":
            return ".parquet"
        if head[:1] in (b"[", b"{"):
            return ".json"
    return ""


def find_files(
    name: str, key: str, split: str = "train", subset: str | None = None
) -> list[Path] | None:
    """The files that a name stands for: one file, a glob, a folder of shards or one that
    `save_to_disk` wrote; `~` is the home. None if nothing has that name.

    split, subset: select a folder's files by their names. Raises ValueError for a pattern, split or
    folder without files, and for a file of no known format.
    """
    path = Path(name).expanduser()
    if not path.exists() and glob.has_magic(name):
        matching = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
        files = [
            file
            for each in matching
            for file in ([each] if each.is_file() else _of_folder(each, key, split, None))
        ]
        if not files:
            raise ValueError(f"{key}={name!r} matches no file{nearby(path)}")
    elif path.is_dir():
        files = _of_folder(path, key, split, subset)
    elif path.is_file():
        files = [path]
    else:
        return None
    for file in files:
        if not format_of(file):
            raise ValueError(
                f"{key}={str(file)!r} is of no known format; it must end in {', '.join(SUFFIXES)},"
                f" perhaps with {', '.join(_PACKED)} behind; convert it, e.g. with pandas"
            )
    return files


def _of_folder(folder: Path, key: str, split: str, subset: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise ValueError(_no_split(key, split, folder, splits))
        folder = folder / split
    if (folder / "state.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        return [folder / file["filename"] for file in state["_data_files"]]
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix in SUFFIXES
        and file.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if subset is not None:
        chosen = [
            file for file in files if subset.lower() in _words(file.relative_to(folder), whole=True)
        ]
        if files and not chosen:
            raise ValueError(
                f"data.subset={subset!r}: no file of {str(folder)!r} has that name in its path"
            )
        files = chosen
    if not files:
        raise ValueError(
            f"{key}={str(folder)!r} is a folder without a data file ({', '.join(SUFFIXES)})"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = _words(file.relative_to(folder))
        named = next((name for name, others in _SPLITS.items() if words & set(others)), "")
        by_split.setdefault(named, []).append(file)
    if set(by_split) == {""}:
        return files
    own = [file for file in files if split.lower() in _words(file.relative_to(folder))]
    wanted = by_split.get(split) or own or (by_split.get("") if split == "train" else None)
    if not wanted:
        raise ValueError(_no_split(key, split, folder, sorted(name for name in by_split if name)))
    return wanted


def _no_split(key: str, split: str, folder: Path, known: Sequence[str]) -> str:
    option = key if key.endswith("split") else "data.split"
    return (
        f"{option}={split!r} is no split of {str(folder)!r}, which has {', '.join(known)}; name one"
    )


def _words(path: Path, *, whole: bool = False) -> set[str]:
    parts = [part.lower() for part in path.parts]
    words = {word for part in parts for word in re.split(r"[^a-z0-9]+", part)}
    return words | {part.split(".")[0] for part in parts} if whole else words


def pieces(path: Path, rows: int = _PIECE) -> Iterator[Piece]:
    """The rows of a file in order. Raises ValueError, with the line where it is known, if its
    content is not valid."""
    try:
        yield from _READ[format_of(path)](path, rows)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"it cannot be read: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import zstandard

        packed: IO[bytes] = zstandard.open(path, "rb")
        return packed
    opens: Mapping[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    file: IO[bytes] = opens[suffix](path) if suffix in opens else path.open("rb")
    return file


def _parquet(path: Path, rows: int) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=rows, use_threads=False)
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no readable Parquet file: {error}") from error


def _arrow(path: Path, rows: int) -> Iterator[Piece]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                batches = iter(pyarrow.ipc.open_stream(file))
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                yield from (batch.slice(at, rows) for at in range(0, batch.num_rows, rows))
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no readable Arrow file: {error}") from error


def _csv(path: Path, rows: int) -> Iterator[Piece]:
    """Rows of a CSV or TSV file. Every value stays a text; an empty one is None."""
    with _opened(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        csv.field_size_limit(1 << 30)  # Python's own limit is 131,072, which tests can exceed
        reader = csv.DictReader(
            text, delimiter="\t" if format_of(path) == ".tsv" else ",", restkey="", strict=True
        )
        try:
            for batch in _batched(reader, rows):
                for row in batch:
                    if "" in row and isinstance(row[""], list):
                        raise ValueError(
                            f"line {reader.line_num} has more values than the header has names"
                        )
                yield [{key: value or None for key, value in row.items()} for row in batch]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is no CSV ({error})") from error


def _json(path: Path, rows: int) -> Iterator[Piece]:
    """Rows of a file with one JSON value or one in each line, whatever the suffix says."""
    with _opened(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        head = list(itertools.islice((line for line in text if line.strip()), 2))
    if not head:
        return
    with _opened(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        if len(head) == 2 and _parses(head[0]):
            yield from _batched(_lines(text), rows)
            return
        try:
            value = _parsed(text.read())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {error.lineno} is not JSON ({error}); correct or remove it"
            ) from error
    yield from _batched((_row(each, i) for i, each in enumerate(_listed(value), 1)), rows)


def _lines(text: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                value = _parsed(line)
            except ValueError as error:
                raise ValueError(
                    f"line {number} is not JSON ({error}); correct or remove it"
                ) from error
            yield _row(value, number)


def _parsed(text: str) -> Any:
    """The value of a JSON text. Half a surrogate pair, which JSON can hold but no tokenizer or file
    takes, becomes U+FFFD."""
    value = json.loads(text)
    return _with_characters(value) if _SURROGATE.search(text) else value


def _with_characters(value: Any) -> Any:
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_with_characters(each) for each in value]
    if isinstance(value, dict):
        return {_with_characters(key): _with_characters(each) for key, each in value.items()}
    return value


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except ValueError:
        return False


def _listed(value: Any) -> Sequence[Any]:
    """The rows of one JSON value: a list, `{"data": [...]}`, rows by their ids, or a single row."""
    if isinstance(value, list):
        return [value] if value and all(_is_turn(each) for each in value) else value
    if not isinstance(value, dict):
        return [value]
    lists = [
        each
        for each in value.values()
        if isinstance(each, list) and each and isinstance(each[0], dict)
    ]
    if len(lists) == 1 and not {"role", "from"} & set(lists[0][0]):
        return lists[0]
    if len(value) > 1 and all(isinstance(each, dict) for each in value.values()):
        first = next(iter(value.values()))
        if all(set(each) == set(first) for each in value.values()):
            return list(value.values())
    return [value]


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & set(value)) and len(value) <= 3


def _row(value: Any, number: int) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return {"conversations": value}  # a conversation is the row, as in Open-Reasoner-Zero
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return {"prompt": value[0], "answer": value[1]}
    raise ValueError(
        f'line {number} must be an object such as {{"prompt": ..., "answer": ...}}, got'
        f" {value!r:.60}"
    )


def _batched(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


_READ: Mapping[str, Callable[[Path, int], Iterator[Piece]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".jsonl": _json,
}


def nearby(path: Path) -> str:
    """The files that are there instead of a missing one, for an error."""
    folder = path.parent
    if not folder.is_dir():
        return f"; nor does its folder {str(folder)!r}"
    names = sorted(each.name for each in folder.iterdir() if each.is_file() and format_of(each))
    near = difflib.get_close_matches(path.name, names, n=1) or names[:5]
    return (
        f"; {str(folder)!r} has {', '.join(near)}"
        if near
        else f"; {str(folder.resolve())!r} has no data file"
    )
