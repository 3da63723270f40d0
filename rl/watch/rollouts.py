"""Sampled answers in full: `<run_dir>/rollouts/STAGE-AXIS-STEP.jsonl.zst`, a line for each answer,
in the form that `emberl audit` reads.

A thread of its own makes the texts and writes them. A file is complete as soon as it has its name,
so a killed run leaves nothing broken; a resumed one first drops what it will do again.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from ...rewards.audit.audit import unpacked
from ..answers import AnswerReader
from ..config.masking import hidden
from ..groups import Group
from .lengths import LENGTHS

ROLLOUTS = "rollouts"
SUFFIX = ".jsonl.zst"
WAITING = 4
"""Files that may wait for the disk; beyond, the run waits for it."""
CLOSING = 60.0
"""Seconds that a run waits for the disk, in a step or at its end."""
LEVEL = 3
"""zstandard's compression level."""
Rows = list[dict[str, Any]]
_NAME = re.compile(r"(?P<stage>\w+)-(train|eval)-(?P<step>\d+)" + re.escape(SUFFIX))


def rows_of(
    groups: Sequence[Group], reader: AnswerReader, trained: Sequence[Group] = ()
) -> Iterator[dict[str, Any]]:
    """A row for each answer: the graders' input, the verdict, and how it was sampled.

    `prompt`, `completion` (of an episode its last turn), `reference`, `source`, `messages` and
    `columns` are the graders'; `advantage` is None where the answer does not train; `versions` are
    pairs of a version and the number of tokens that it sampled; times are seconds since 1970.
    """
    # by identity: a group with advantages is a copy that shares its tuple of completions
    advantages = {id(group.completions): group.advantages for group in trained}
    for group in groups:
        prompt, own = group.prompt, advantages.get(id(group.completions))
        asked, question = reader.asked(prompt), reader.problem(prompt)
        for i, (completion, verdict) in enumerate(
            zip(group.completions, group.verdicts, strict=True)
        ):
            given = reader.marked(asked, prompt, completion)
            yield {
                "id": f"{prompt.id}#{completion.sample}",
                "problem": prompt.id,
                "sample": completion.sample,
                "source": prompt.source,
                "question": question,
                "prompt": given.prompt,
                "messages": list(given.messages),
                "completion": given.completion,
                "reference": prompt.answer,
                "columns": dict(given.columns),
                "status": verdict.status.value,
                "score": verdict.score,
                "parts": dict(verdict.parts),
                "message": hidden(verdict.message),
                "advantage": None if own is None else float(own[i]),
                "tokens": completion.num_sampled,
                "finish_reason": completion.finish_reason,
                "versions": completion.sampled_by_version,
                "started": completion.started,
                "finished": completion.finished,
                "grade_s": verdict.seconds,
            }


class RolloutLog:
    """Writes files in a thread of its own, in the order in which they were given."""

    def __init__(self, run_dir: Path, tell: Callable[[str, str], None]) -> None:
        """tell: is called once with title and text of a failure, after which nothing is written."""
        self.folder = run_dir / ROLLOUTS
        self._tell = tell
        self._queue: queue.Queue[tuple[str, Callable[[], Rows]] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True, name="rollouts")
        self._thread.start()

    def put(self, stage: str, axis: str, step: int, rows: Callable[[], Rows]) -> None:
        """Queues the rows that `rows()` makes, in the other thread. Blocks only if `WAITING` files
        are queued, for at most `CLOSING` seconds, and then drops this one."""
        name = f"{stage}-{axis}-{step:06}{SUFFIX}"
        try:
            self._queue.put((name, rows), timeout=CLOSING)
        except queue.Full:
            self._tell("answers are not kept", f"{self.folder / name}: the disk does not answer")

    def close(self, seconds: float = CLOSING) -> None:
        """Waits until the queued files are written, at most so long."""
        deadline = time.monotonic() + seconds
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._tell("answers are not kept", f"{self.folder} was not written in {seconds:g} s")

    def _work(self) -> None:
        try:
            while (given := self._queue.get()) is not None:
                name, rows = given
                if made := rows():
                    write_rows(self.folder / name, made)
        # e.g. a full disk, or a tokenizer that cannot decode: it must not end the run
        except Exception as error:
            self._tell("answers are not kept", f"{self.folder}: {type(error).__name__}: {error}")
            while self._queue.get() is not None:  # else the next `put` would block the run
                pass


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file atomically."""
    file.parent.mkdir(exist_ok=True)
    hidden = file.with_name(f".{file.name}")
    text = "".join(f"{json.dumps(row, default=str)}\n" for row in rows)
    hidden.write_bytes(zstandard.ZstdCompressor(level=LEVEL).compress(text.encode()))
    os.replace(hidden, file)


def read_rows(run_dir: Path, *, newest: int | None = None) -> Iterator[dict[str, Any]]:
    """All rows of a run in order, each with its `stage`, `axis` and `step`. newest: those of one
    file only, 0 is the newest. Files that cannot be read are left out."""
    files = files_of(run_dir)
    for file in files if newest is None else files[::-1][newest : newest + 1]:
        stage, axis, step = file.name.removesuffix(SUFFIX).rsplit("-", 2)
        try:
            rows = [json.loads(line) for line in unpacked(file.read_bytes()).splitlines()]
        except (OSError, EOFError, ValueError, zstandard.ZstdError):
            continue
        for row in rows:
            yield {"stage": stage, "axis": axis, "step": int(step), **row}


def files_of(run_dir: Path) -> list[Path]:
    """A run's files of rollouts, in the order in which they were written."""
    files = [p for p in (run_dir / ROLLOUTS).glob(f"*{SUFFIX}") if _NAME.fullmatch(p.name)]
    return sorted(files, key=lambda p: (p.stat().st_mtime, p.name))


def trim_steps(run_dir: Path, stage: str, step: int, stages: Sequence[str]) -> None:
    """Deletes the files of steps after the one from which a run resumes."""
    reached = (stages.index(stage), step)
    for file in files_of(run_dir):
        own = _NAME.fullmatch(file.name)
        assert own is not None
        if own["stage"] in stages and (stages.index(own["stage"]), int(own["step"])) > reached:
            file.unlink()
    for file in (run_dir / LENGTHS).glob("step-*.parquet"):
        if "rl" in stages and (stages.index("rl"), int(file.stem.split("-")[1])) > reached:
            file.unlink()
