"""The records of a run: `metrics.jsonl`, the console, trackers such as Weights & Biases, sampled
answers, spans, the learning curve."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from rich.console import Console

from ..answers import AnswerReader
from ..config.load import Config, to_yaml
from ..config.masking import hidden
from ..groups import Group
from ..run_directory import METRICS, SAMPLES
from .console import StageConsole, make_console, say
from .curve import plot_curve
from .records import ALERTS, SYSTEM
from .rollouts import RolloutLog, Rows, rows_of
from .sent import TABLE
from .sinks import open_sinks
from .spans import SPANS, Spans

Axis = Literal["train", "eval"]
HALF_CELL = 400
"""Characters at each end of a sampled answer that `samples.md` shows."""
COLUMNS = (
    *("stage", "axis", "step", "source", "question", "completion", "reference", "status", "score"),
    *("tokens", "advantage"),
)
"""Columns of the trackers' table of samples, before one for each part of the reward."""


class Tracker:
    """Writes all records of one attempt of a run; every row has its stage and step."""

    def __init__(self, config: Config, run_dir: Path, console: Console) -> None:
        self.config = config
        self.run_dir = run_dir
        self.console = console
        (run_dir / "config.yaml").write_text(to_yaml(config))
        self._file = (run_dir / METRICS).open("a")
        self._sinks = open_sinks(config, run_dir, self.note)
        self._rows: Counter[str] = Counter()
        self._on_console: StageConsole | None = None
        self._stage = ""
        self._rollouts = RolloutLog(run_dir, self.alert)
        self.spans = Spans(run_dir / SPANS if config.tracking.spans else None)

    def begin(self, stage: str, step: int, steps: int) -> None:
        """Begins a stage: a new progress bar, or plain lines off a terminal."""
        self.end()
        self._stage = stage
        self._steps = steps
        self._on_console = StageConsole(self.console, stage, step, steps)

    def end(self) -> None:
        if self._on_console is not None:
            self._on_console.close()
            self._on_console = None

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        axis: Axis = "train",
        show: Mapping[str, str] | None = None,
    ) -> None:
        """Logs one row. show: the few figures for the console."""
        # JSON has no NaN and no infinities
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"stage": self._stage, "step": step, "axis": axis, **finite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self.spans.flush()
        sft = self._stage == "sft"
        prefixed = {n if n.startswith("sft/") else f"sft/{n}": v for n, v in metrics.items()}
        of_axis = prefixed if sft else dict(metrics)
        key = self._key("row", self._stage, axis, step)
        for sink in self._sinks:
            sink.call(lambda it: it.log("sft" if sft else axis, step, of_axis), key)
        if self._on_console is not None:
            tell = self._on_console.step if axis == "train" else self._on_console.looked
            tell(step, show or {})

    def _key(self, kind: str, stage: str, axis: Axis, step: int) -> str:
        """The key by which a row of an earlier attempt is known; equal rows are numbered."""
        key = f"{kind} {stage} {axis} {step}"
        self._rows[key] += 1
        return f"{key} {self._rows[key]}"

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows that the run does something else than steps, e.g. `saving`; also a span."""
        with self.spans.span("loop", what.split()[0]):
            if self._on_console is None:
                yield
                return
            with self._on_console.doing(what):
                yield

    def keep(
        self,
        axis: Axis,
        step: int,
        groups: Sequence[Group],
        reader: AnswerReader,
        trained: Sequence[Group] = (),
    ) -> None:
        """Queues answers for `rollouts` and the trackers; does not wait for the disk."""
        how, few = self.config.tracking.rollouts, self.config.tracking.samples
        if how == "none" and not few:
            return
        chosen = groups if how == "all" else few_of(groups, few, whole=axis == "train")
        stage = self._stage

        def rows() -> Rows:
            made = list(rows_of(chosen, reader, trained))
            self._show(stage, axis, step, made[:few])
            return made if how != "none" else []

        if chosen:
            self._rollouts.put(stage, axis, step, rows)

    def _show(self, stage: str, axis: Axis, step: int, rows: Rows) -> None:
        parts = list(self.config.reward.parts)
        columns = [*COLUMNS, *(f"part/{name}" for name in parts)]
        where = {"stage": stage, "axis": axis, "step": step}
        table = [
            [(where | row).get(name) for name in COLUMNS] + [row["parts"].get(p) for p in parts]
            for row in rows
        ]
        if table:
            key = self._key(TABLE, stage, axis, step)
            for sink in self._sinks:
                sink.call(lambda it: it.table(step, columns, table), key)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Logs the distributions of a step's values, by name."""
        key = self._key("histograms", self._stage, "train", step)
        for sink in self._sinks:
            sink.call(lambda it: it.histograms(step, values), key)

    def system(self, seconds: float, metrics: Mapping[str, float]) -> None:
        """Logs the load of the run's machines, `seconds` after its start."""
        with (self.run_dir / SYSTEM).open("a") as file:
            file.write(json.dumps({"time": time.time(), **metrics}) + "\n")
        for sink in self._sinks:
            sink.call(lambda it: it.log("system", int(seconds), metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Appends sampled answers to `samples.md` as a table."""
        if not rows:
            return
        columns: list[Any] = list(rows[0])
        table = [
            f"\n### {self._stage} step {step}\n",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
        ]
        table += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
        with (self.run_dir / SAMPLES).open("a") as file:
            file.write("\n".join(table) + "\n")

    def curve(self) -> Path | None:
        """Draws the learning curve from everything logged so far."""
        return plot_curve(
            self.run_dir / METRICS, self.run_dir / "learning_curve.png", self.config.name
        )

    def note(self, text: str) -> None:
        """Prints one line on the console."""
        say(self.console, text)

    def alert(self, title: str, text: str) -> None:
        """Prints a warning, appends it to `alerts.jsonl`, and alerts the trackers."""
        text = hidden(text)
        say(self.console, f"warning: {title}: {text}")
        if self._on_console is not None:
            self._on_console.warned(f"{title}: {text}")
        try:
            with (self.run_dir / ALERTS).open("a") as file:
                file.write(json.dumps({"time": time.time(), "title": title, "text": text}) + "\n")
        except OSError:  # the alert may be about a full disk
            pass
        for sink in self._sinks:
            sink.call(lambda it: it.alert(title, text))

    def close(self) -> None:
        self.end()
        self._rollouts.close()
        self.spans.flush()
        self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def few_of(groups: Sequence[Group], answers: int, *, whole: bool) -> list[Group]:
    """The first groups that hold about so many answers: whole ones, or the first answer of each."""
    if not whole:
        return [
            replace(g, completions=g.completions[:1], verdicts=g.verdicts[:1], advantages=None)
            for g in groups[:answers]
        ]
    size = max(1, len(groups[0].completions)) if groups else 1
    return list(groups[: math.ceil(answers / size)])


def sample_rows(
    groups: Sequence[Group], texts: Sequence[str], prompts: Sequence[str]
) -> list[dict[str, str]]:
    """A row for each group's first completion, with its score and the parts of that."""
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


def _cell(text: str) -> str:
    """A cell of Markdown: of a long text the beginning and the end, where the answer is."""
    if len(text) > 2 * HALF_CELL:
        text = f"{text[:HALF_CELL]} [...] {text[-HALF_CELL:]}"
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


__all__ = ["Axis", "Tracker", "few_of", "make_console", "sample_rows"]
