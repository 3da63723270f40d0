"""`profile.steps`: torch's traces of learners and engines for single steps, and one timeline of the
whole run, under `<run_dir>/profile/`; ui.perfetto.dev and chrome://tracing load all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from ...rollout.actors import ActorLostError
from .spans import read_spans, trace_of

FOLDER = "profile"
TIMELINE = "timeline.json"


class Learners(Protocol):
    def trace(self, begin: bool) -> list[bytes]: ...


class Workers(Protocol):
    async def trace(self, begin: bool) -> list[bytes]: ...


@asynccontextmanager
async def traced(
    step: int,
    steps: Sequence[int],
    run_dir: Path,
    learners: Learners,
    workers: Workers,
    alert: Callable[[str, str], None],
) -> AsyncIterator[None]:
    """Traces its block if `step` is in `steps`; a failure is an alert, and the step goes on."""
    if step not in steps:
        yield
        return

    async def both(begin: bool) -> dict[str, list[bytes]]:
        try:
            return {
                "learner": await asyncio.to_thread(learners.trace, begin),
                "rollout": await workers.trace(begin),
            }
        except ActorLostError:
            raise
        except Exception as error:  # e.g. another tool holds the profiler, or a disk there is full
            alert("no trace", f"step {step}: {type(error).__name__}: {error}")
            return {}

    await both(True)
    yield
    for role, traces in (await both(False)).items():
        for number, trace in enumerate(traces):
            if trace:
                file = run_dir / FOLDER / f"{role}-{number}-step-{step:06}.json.gz"
                file.parent.mkdir(exist_ok=True)
                await asyncio.to_thread(file.write_bytes, trace)


def write_timeline(run_dir: Path, file: Path | None = None) -> Path:
    """Writes the run's spans as JSON in Chrome's trace event format; returns the file."""
    file = file or run_dir / FOLDER / TIMELINE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(trace_of(read_spans(run_dir))))
    return file
