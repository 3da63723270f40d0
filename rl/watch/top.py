"""`emberl top`: follows a run from another terminal, by the files in its directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from .console import duration, figures, panel
from .records import Record, read_record

EVERY = 2.0
"""Seconds between two updates."""
ROWS = 40
"""Rows of metrics that are read: enough for the mean time of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The data that is shown of a run."""

    name: str
    state: str
    logged: Sequence[Mapping[str, Any]]
    """The newest rows of `metrics.jsonl`."""
    steps: Mapping[str, int | None]
    """Stage -> its planned steps; None: unknown."""
    warning: str = ""
    age: float | None = None
    """Seconds since the newest row."""


def view_of(record: Record) -> View:
    """The view of a run from its records on this machine."""
    metrics = record.folder / "metrics.jsonl"
    alert = record.alerts[-1] if record.alerts else None
    return View(
        name=str(record.folder),
        state=record.state,
        logged=record.logged[-ROWS:],
        steps={
            "rl": record.config.get("schedule", {}).get("steps"),
            "sft": record.config.get("sft", {}).get("steps"),
        },
        warning="" if alert is None else f"{alert['title']}: {alert['text']}",
        age=time.time() - metrics.stat().st_mtime,
    )


def shown(view: View) -> RenderableType:
    """A view as lines for rich."""
    rows = [row for row in view.logged if row["axis"] == "train"]
    if not rows:
        return Text(f"{view.name}: {view.state}; no step is done yet")
    last = rows[-1]
    stage, step, planned = last["stage"], last["step"], view.steps.get(last["stage"])
    head = f"{view.name}: {view.state}, {stage} {step}" + (f"/{planned}" if planned else "")
    paces = [r["timing_s/step"] for r in rows if r["stage"] == stage and r.get("timing_s/step")]
    if planned and paces and view.state == "running" and step < planned:
        head += f", {duration(sum(paces) / len(paces) * (planned - step))} left"
    said = {}
    looked = [row for row in view.logged if row.get("val-core/accuracy") is not None]
    if looked:
        accuracy = looked[-1]["val-core/accuracy"]
        said["held-out"] = f"accuracy {accuracy:.1%} at {looked[-1]['stage']} {looked[-1]['step']}"
    if view.age is not None and view.state == "running":
        said["last figures"] = f"{duration(view.age)} ago"
    return panel(Text(head), figures(last), said, view.warning)


def watch(
    target: str, address: str | None = None, *, once: bool = False, console: Console | None = None
) -> None:
    """Shows a run until it ends; with `once`, or off a terminal, as it is now. address: that of
    Ray's job server, if `target` is a job. Raises ConfigError if there is no run."""
    console = console or Console()
    once = once or not console.is_terminal
    with _local(target) if address is None else _of_job(target, address, once) as look:
        view = look()
        if once:
            console.print(shown(view))
            return
        with Live(shown(view), console=console, auto_refresh=False) as live:
            while view.state.startswith(("running", "pending")):
                time.sleep(EVERY)
                view = look()
                live.update(shown(view), refresh=True)


@contextmanager
def _local(folder: str) -> Iterator[Callable[[], View]]:
    yield lambda: view_of(read_record(Path(folder)))


@contextmanager
def _of_job(job: str, address: str, once: bool) -> Iterator[Callable[[], View]]:
    """A function that reads the view of a Ray job, by a second job that follows its files."""
    from ..submit import follower

    script = f"tail -n {ROWS} {'' if once else '-F '}metrics.jsonl"
    with follower(job, address, script, wait=once) as (state, lines):

        def look() -> View:
            rows = []
            for line in lines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # Ray's own lines, and one that is not whole yet
                    continue
            kept = [row for row in rows if isinstance(row, dict) and "axis" in row]
            return View(name=job, state=state(), logged=kept[-ROWS:], steps={})

        yield look
