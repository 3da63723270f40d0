"""The directory of a run: its choice for a new or a resumed run, and the lock by which one run
alone writes there.

<run_dir>/config.yaml  metrics.jsonl  samples.md  learning_curve.png  model/  checkpoints/
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .checkpoints import CHECKPOINTS, latest_checkpoint, remove_halves
from .config.load import Config, ConfigError

METRICS = "metrics.jsonl"
SAMPLES = "samples.md"
STOP = "stop"
"""A file that asks the run of this directory to save after its step and to end."""
LOCK = ".lock"
RESULT = "result.json"
"""The result line of the last attempt that ended normally."""
SUMMARY = "summary.json"
"""The summary of a recipe, in its directory from the beginning."""

Resume = Literal["never", "must", "auto"]
"""Whether a start resumes from a checkpoint; `auto`: if there is one."""


RECORDS = ("alerts.jsonl", "system.jsonl", "spans.jsonl")
"""Files besides `METRICS` with timestamped lines of all attempts."""
ANSWERS = ("rollouts", "lengths.parquet")
"""Folders with one file for each step."""


def open_run_dir(
    config: Config, resume: Resume, tell: Callable[[str], None] = lambda _: None
) -> tuple[Path, Path | None]:
    """The run's directory, and the checkpoint to resume from (None: a new run). Raises
    `ConfigError` if it cannot be written, holds another run, or has no checkpoint though it must.

    A new run never writes into an old one: without `run_dir` it takes the next free of
    `runs/<name>`, `runs/<name>-2`, ..., and a resumed run the newest of these that has a
    checkpoint. tell: called with a line for each checkpoint that is skipped.
    """
    try:
        if config.run_dir:
            folder, checkpoint = _named(Path(config.run_dir), resume, tell)
        else:
            folder, checkpoint = _numbered(config.output, resume, tell)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir or config.output} cannot be written ({error.strerror}); set"
            " run_dir to a directory that can"
        ) from error
    return folder, checkpoint


def forget_earlier(
    run_dir: Path, *, anew: bool, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Removes leftovers of earlier attempts: a request to stop, half-written checkpoints (`tell`
    names them), the result and, if `anew`, the metrics of a start without a checkpoint. To be
    called within `alone_in`, as they may belong to a running run."""
    asked_to_stop(run_dir)
    remove_halves(run_dir, tell)
    (run_dir / RESULT).unlink(missing_ok=True)
    if anew:
        forget_figures(run_dir)


def forget_figures(run_dir: Path) -> None:
    """Removes the metrics and answers of a start without a checkpoint."""
    for name in (METRICS, SAMPLES, *RECORDS):
        (run_dir / name).unlink(missing_ok=True)
    for name in ANSWERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _named(folder: Path, resume: Resume, tell: Callable[[str], None]) -> tuple[Path, Path | None]:
    checkpoint = None if resume == "never" else latest_checkpoint(folder, tell)
    if resume == "must" and checkpoint is None:
        raise ConfigError(
            f"--resume found no checkpoint under {folder / CHECKPOINTS}; leave the flag out, or"
            " write --resume auto, to start anew"
        )
    if resume == "never":
        if latest_checkpoint(folder) is not None:
            raise ConfigError(
                f"run_dir={folder} already holds a run; pass --resume to go on with it, or another"
                " run_dir"
            )
        if (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
            raise ConfigError(
                f"run_dir={folder} already holds a run, which ended before its first checkpoint;"
                " write --resume auto to start it anew, or give another run_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, checkpoint


def _numbered(base: Path, resume: Resume, tell: Callable[[str], None]) -> tuple[Path, Path | None]:
    numbers = {_number(path, base): path for path in base.parent.glob(f"{base.name}*")}
    taken = sorted(number for number in numbers if number is not None)
    if resume != "never":
        for number in reversed(taken):
            checkpoint = latest_checkpoint(numbers[number], tell)
            if checkpoint is not None:
                return numbers[number], checkpoint
    if resume == "must":
        raise ConfigError(
            f"--resume found no run named {base} with a checkpoint; leave the flag out, or write"
            " --resume auto, to start anew, or set run_dir"
        )
    number = taken[-1] + 1 if taken else 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder, None
        except FileExistsError:  # another start took it just now
            number += 1


def _number(path: Path, base: Path) -> int | None:
    if path.name == base.name:
        return 1
    suffix = path.name.removeprefix(f"{base.name}-")
    return int(suffix) if suffix != path.name and suffix.isdigit() else None


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """A context that holds the directory's lock. Raises `ConfigError` if another run has it."""
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"run_dir={run_dir} is written by another run, {file.read().strip()}; wait for it,"
                " end it (emberl stop), or set another run_dir"
            ) from error
        except OSError:  # a file system without locks: run without one
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def asked_to_stop(run_dir: Path) -> bool:
    """Whether the file `STOP` is in the directory, or in that of the recipe whose stage this is;
    removes it."""
    for folder in (run_dir, *([run_dir.parent] if is_stage(run_dir) else [])):
        try:
            (folder / STOP).unlink()
        except FileNotFoundError:
            continue
        return True
    return False


def is_stage(run_dir: Path) -> bool:
    """Whether this is the directory of a recipe's stage."""
    return (run_dir.parent / SUMMARY).exists()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file; a last line that a full disk or a crash cut off is left out.
    Raises ConfigError for any other line that is not JSON."""
    lines = file.read_text().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(
                    f"{file}:{number} is not JSON ({error}); remove the line"
                ) from error
    return rows


def trim_metrics(
    run_dir: Path, stage: str, step: int, stages: Sequence[str], *, evaluates: bool = False
) -> None:
    """Removes the rows of steps that a resumed run will repeat; evaluates: also the evaluation of
    `step`."""
    file = run_dir / METRICS
    if not file.exists():
        return
    rows = read_metrics(file)

    def stays(row: Mapping[str, Any]) -> bool:
        done = _done(row["stage"], row["step"], stage, step, stages)
        return done > 0 or (done == 0 and not (evaluates and row["axis"] == "eval"))

    kept = [row for row in rows if stays(row)]
    new = file.with_suffix(".new")
    new.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    new.replace(file)


def _done(own: str, own_step: int, stage: str, step: int, stages: Sequence[str]) -> int:
    """1 if step `own_step` of stage `own` is before `step` of `stage`, 0 if it is that one, -1 if
    after it. Steps of a stage that is no longer in `stages` count as before."""
    if own not in stages:
        return 1
    at, reached = (stages.index(own), own_step), (stages.index(stage), step)
    return (at < reached) - (at > reached)


def trim_samples(
    run_dir: Path, stage: str, step: int, stages: Sequence[str], *, evaluates: bool = False
) -> None:
    """Removes from `samples.md` the evaluations that a resumed run will repeat, as
    `trim_metrics`."""
    file = run_dir / SAMPLES
    if not file.exists():
        return
    # newline: a carriage return within an answer begins no line
    with file.open(newline="") as opened:
        before, *sections = re.split(r"(?=^\n### \w+ step \d+$)", opened.read(), flags=re.MULTILINE)
    kept = [before]
    for section in sections:
        _, name, _, number = section.split("\n", 2)[1].split()
        done = _done(name, int(number), stage, step, stages)
        if done > 0 or (done == 0 and not evaluates):
            kept.append(section)
    new = file.with_suffix(".new")
    with new.open("w", newline="") as opened:
        opened.write("".join(kept))
    new.replace(file)
