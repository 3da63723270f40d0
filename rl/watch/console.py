"""The console output of a run: on a terminal a live panel, elsewhere lines with the time, at least
one a minute as long as steps end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..config.masking import hidden

LINE_SECONDS = 60.0
"""Off a terminal a line is printed at least so often, at the end of a step."""
WIDTH = 200
"""Columns off a terminal, where lines may be long."""
ACROSS = 4
"""Figures side by side on a terminal."""
FIGURES = {
    "reward": ("critic/score/mean", ".3f"),
    "accuracy": ("training/accuracy", ".1%"),
    "length": ("response_length/mean", ",.0f"),
    "entropy": ("actor/entropy_per_token", ".3f"),
    "tokens/s": ("perf/sampled_tokens_per_second", ",.0f"),
    "rollouts idle": ("sched/rollout_idle", ".0%"),
    "learners idle": ("sched/learner_idle", ".0%"),
    "version": ("rollout/version", ".0f"),
    "staleness": ("sched/staleness/mean", ".2f"),
    "s/step": ("timing_s/step", ".3g"),
    "verifier errors": ("training/verifier_errors", ".0f"),
    "loss": ("sft/loss", ".3f"),
}
"""Name on the console -> the metric and its format."""
ON_A_LINE = ("reward", "accuracy", "length", "entropy", "tokens/s", "loss")
"""Those of them on a line off a terminal."""


def figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """The `FIGURES` of a step as text; those that it has."""
    shown = {
        name: format(metrics[metric], how)
        for name, (metric, how) in FIGURES.items()
        if metrics.get(metric) is not None
    }
    if shown.get("verifier errors") == "0":
        del shown["verifier errors"]
    return shown


class StageConsole:
    """One stage of a run on the console."""

    def __init__(self, console: Console, stage: str, step: int, steps: int) -> None:
        self._console = console
        self._stage = stage
        self._steps = steps
        self._first_step = step
        self._last_line = -1
        self._begun = self._line_time = time.monotonic()
        self._shown: dict[str, str] = {}
        self._held_out = self._doing = self._warning = ""
        self._live: Live | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._bar.add_task(stage, total=steps, completed=step)
            self._live = Live(self._panel(), console=console, refresh_per_second=2)
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            self._live = None

    def step(self, step: int, shown: Mapping[str, str]) -> None:
        """A step is done. shown: figures by the names that a person reads."""
        self._shown = dict(shown)
        if self._live is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
            self._live.update(self._panel())
        elif self._due(step):
            few = {name: value for name, value in shown.items() if name in ON_A_LINE}
            self._last_line = step
            self._line_time = time.monotonic()
            self._line(step, few or shown, self._remaining(step))

    def looked(self, step: int, shown: Mapping[str, str]) -> None:
        """An evaluation is done."""
        self._held_out = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._line_time = time.monotonic()
        if not self._shown:  # before the first step: its time is not the steps'
            self._begun = self._line_time
        self._line(step, shown)
        self._refresh()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what the run does instead of steps, e.g. `saving`."""
        self._doing = what
        self._refresh()
        if self._live is None:
            say(self._console, f"{time.strftime('%H:%M:%S')}  {what}")
        try:
            yield
        finally:
            self._doing = ""
            self._refresh()

    def warned(self, text: str) -> None:
        self._warning = text
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())

    def _line(self, step: int, shown: Mapping[str, str], end: str = "") -> None:
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        told = f"{self._stage} {step:5}/{self._steps}  {text}{end}"
        say(self._console, f"{time.strftime('%H:%M:%S')}  {told}")

    def _panel(self) -> RenderableType:
        return panel(
            self._bar, self._shown, {"evaluated": self._held_out, "now": self._doing}, self._warning
        )

    def _due(self, step: int) -> bool:
        """Whether a step gets a line: the first, the last, every tenth part, every minute."""
        return (
            self._last_line < 0
            or step - self._last_line >= max(1, self._steps // 10)
            or step == self._steps
            or time.monotonic() - self._line_time >= LINE_SECONDS
        )

    def _remaining(self, step: int) -> str:
        """`  SECONDS s/step  TIME left` by the mean of the steps so far; "" if unknown or done."""
        done, left = step - self._first_step, self._steps - step
        if done <= 0 or left <= 0:
            return ""
        each = (time.monotonic() - self._begun) / done
        return f"  {each:.3g} s/step  {duration(each * left)} left"


def panel(
    head: RenderableType, shown: Mapping[str, str], said: Mapping[str, str], warning: str
) -> RenderableType:
    """A head, figures in columns, then a line for each text and the warning; nothing is markup."""
    table = Table.grid(padding=(0, 3))
    cells = [Text.assemble((f"{name} ", "dim"), value) for name, value in shown.items()]
    for at in range(0, len(cells), ACROSS):
        table.add_row(*cells[at : at + ACROSS])
    lines = [Text.assemble((f"{name} ", "dim"), text) for name, text in said.items() if text]
    if warning:
        lines.append(Text(plain(f"warning: {warning}"), style="yellow"))
    return Group(head, table, *lines)


def plain(text: str) -> str:
    """Foreign text with U+FFFD for control characters and those that change the direction."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def say(console: Console, text: str) -> None:
    """Prints a line, with secrets masked and without control characters."""
    console.print(plain(hidden(text)), highlight=False, markup=False)


def make_console() -> Console:
    """The console for people, on stderr: stdout is kept for the one JSON line."""
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        soft_wrap=True,
        force_terminal=None if terminal else False,
        width=None if terminal else WIDTH,
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
