"""Hashes of files, by which a stored result is known to be of other inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

_CODE = re.compile(r"(?P<file>[^:]+\.py):[A-Za-z_][\w.]*")
"""A user's own function, `./file.py:function`."""


def contents(paths: Iterable[str | Path]) -> dict[str, str]:
    """path -> hash of these files and of all files in these directories; names that do not exist
    here (a Hub id) are left out."""
    files = (file for path in paths for file in _files(Path(path).expanduser()))
    return {str(file): _content(file) for file in files}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def _content(file: Path) -> str:
    """The SHA-256 of a file; for one larger than 1 GiB, such as weights, just its size."""
    size = file.stat().st_size
    if size > 1 << 30:
        return f"{size} bytes"
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def code_files(settings: Any) -> list[str]:
    """The source files of the user's functions that nested settings name, each once."""
    if isinstance(settings, str):
        named = _CODE.fullmatch(settings)
        return [named["file"]] if named else []
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        return list(dict.fromkeys(file for each in settings for file in code_files(each)))
    return []
