"""Where a run's figures go: `metrics.jsonl`, the console, Weights & Biases, a table of sampled
answers, the learning curve."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..config.load import Config, to_yaml
from ..groups import Group
from ..run_directory import METRICS
from .curve import plot_curve
from .sinks import open_sinks

Axis = Literal["train", "eval"]
LINE_SECONDS = 60.0
"""Off a terminal a line is printed at least so often, at the end of a step."""
WIDTH = 200
"""Columns off a terminal, of which a log has as many as it likes."""
HALF_CELL = 400
"""Characters at each end of a sampled answer that `samples.md` shows."""


class Tracker:
    """Opened once per attempt of a run; every row names its stage and step."""

    def __init__(self, config: Config, run_dir: Path, console: Console) -> None:
        self.config, self.run_dir, self.console = config, run_dir, console
        (run_dir / "config.yaml").write_text(to_yaml(config))
        self._file = (run_dir / METRICS).open("a")
        self._sinks = open_sinks(config, run_dir, self.note)
        self._bar: Progress | None = None

    def begin(self, stage: str, step: int, steps: int) -> None:
        """A new progress bar (plain lines where the output is not a terminal)."""
        self.end()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._bar.start()
            self._bar.add_task(stage, total=steps, completed=step, figures="")
        self._stage, self._steps = stage, steps
        self._first_step, self._last_line = step, -1
        self._begun = self._line_time = time.monotonic()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        axis: Axis = "train",
        show: Mapping[str, str] | None = None,
    ) -> None:
        """One row; `show` are the few figures that a person watches."""
        # JSON has no inf
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"stage": self._stage, "step": step, "axis": axis, **finite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        sft = self._stage == "sft"
        prefixed = {n if n.startswith("sft/") else f"sft/{n}": v for n, v in metrics.items()}
        of_axis = prefixed if sft else dict(metrics)
        for sink in self._sinks:
            sink.call(lambda it: it.log("sft" if sft else axis, step, of_axis))
        figures = "  ".join(f"{name} {value}" for name, value in (show or {}).items())
        if self._bar is not None and axis == "train":
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif axis == "eval" or self._due(step):
            self._last_line = step if axis == "train" else self._last_line
            self._line_time = time.monotonic()
            told = f"{self._stage} {step:5}/{self._steps}  {figures}"
            if axis == "train":
                told += self._remaining(step)
            self.console.print(f"{time.strftime('%H:%M:%S')}  {told}", highlight=False)

    def _due(self, step: int) -> bool:
        """Whether a step is worth a line: the first, the last, every tenth part and every
        minute."""
        return (
            self._last_line < 0
            or step - self._last_line >= max(1, self._steps // 10)
            or step == self._steps
            or time.monotonic() - self._line_time >= LINE_SECONDS
        )

    def _remaining(self, step: int) -> str:
        """Seconds a step so far, and the time to the end by them; nothing at the end."""
        done, left = step - self._first_step, self._steps - step
        if done <= 0 or left <= 0:
            return ""
        each = (time.monotonic() - self._begun) / done
        return f"  {each:.3g} s/step  {_duration(each * left)} left"

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Appends sampled answers, as read by a person, to `samples.md`."""
        if not rows:
            return
        columns: list[Any] = list(rows[0])
        table = [
            f"\n### {self._stage} step {step}\n",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
        ]
        table += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
        with (self.run_dir / "samples.md").open("a") as file:
            file.write("\n".join(table) + "\n")
        for sink in self._sinks:
            sink.call(
                lambda it: it.table(step, columns, [[row[c] for c in columns] for row in rows])
            )

    def curve(self) -> Path | None:
        """Draws the learning curve from everything logged so far."""
        return plot_curve(
            self.run_dir / METRICS, self.run_dir / "learning_curve.png", self.config.name
        )

    def note(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, highlight=False, markup=False)

    def alert(self, title: str, text: str) -> None:
        """One line of warning, and an alert where the trackers have such."""
        self.console.print(f"warning: {title}: {text}", highlight=False, markup=False)
        for sink in self._sinks:
            sink.call(lambda it: it.alert(title, text))

    def close(self) -> None:
        self.end()
        self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def sample_rows(
    groups: Sequence[Group], texts: Sequence[str], prompts: Sequence[str]
) -> list[dict[str, str]]:
    """One line for each group's first completion, with its score and what it is made of."""
    rows = []
    for group, text, prompt in zip(groups, texts, prompts, strict=True):
        verdict = group.verdicts[0]
        rows.append(
            {
                "problem": prompt,
                "answer": text,
                "reference": group.prompt.answer,
                "verdict": verdict.status.value,
                "score": "" if verdict.score is None else f"{verdict.score:.4g}",
                "parts": ", ".join(f"{name} {value:.4g}" for name, value in verdict.parts.items()),
            }
        )
    return rows


def make_console() -> Console:
    """The console for people is stderr: stdout is kept for the one JSON line."""
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        soft_wrap=True,
        force_terminal=None if terminal else False,
        width=None if terminal else WIDTH,
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cell(text: str) -> str:
    """The beginning and the end of a long text: the answer stands at the end."""
    if len(text) > 2 * HALF_CELL:
        text = f"{text[:HALF_CELL]} [...] {text[-HALF_CELL:]}"
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
