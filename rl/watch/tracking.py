"""Where a run's figures go: `metrics.jsonl`, the console, Weights & Biases, a table of sampled
answers, the learning curve."""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..checkpoints import METRICS
from ..config.load import Config, to_yaml
from ..groups import Group
from .curve import plot_curve

Axis = Literal["train", "eval"]
HALF_CELL = 400
"""Characters at each end of a sampled answer that `samples.md` shows."""


class Tracker:
    """Opened once per attempt of a run; every row names its stage and step."""

    def __init__(self, config: Config, run_dir: Path, console: Console) -> None:
        self.config, self.run_dir, self.console = config, run_dir, console
        (run_dir / "config.yaml").write_text(to_yaml(config))
        self._file = (run_dir / METRICS).open("a")
        self._wandb = _open_wandb(config, run_dir, console)
        self._bar: Progress | None = None
        self._last_line = -1

    def begin(self, stage: str, step: int, steps: int) -> None:
        """A new progress bar (plain lines where the output is not a terminal)."""
        self.end()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._bar.start()
            self._bar.add_task(stage, total=steps, completed=step, figures="")
        self._stage, self._steps, self._last_line = stage, steps, -1

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
        if self._wandb is not None:
            axes = {axis} if self._stage != "sft" else {"sft", axis} - {"train"}
            steps = {f"{name}/step": step for name in axes}
            self._wandb.log({**metrics, **steps, "stage": self._stage})
        figures = "  ".join(f"{name} {value}" for name, value in (show or {}).items())
        if self._bar is not None and axis == "train":
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif (
            axis == "eval"
            or step - self._last_line >= max(1, self._steps // 10)
            or step == self._steps
        ):
            self._last_line = step if axis == "train" else self._last_line
            self.console.print(f"{self._stage} {step:5}/{self._steps}  {figures}", highlight=False)

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
        if self._wandb is not None:
            import wandb

            self._wandb.log(
                {
                    "samples": wandb.Table(
                        columns=columns, data=[[row[c] for c in columns] for row in rows]
                    ),
                    "eval/step": step,
                }
            )

    def curve(self) -> Path | None:
        """Draws the learning curve from everything logged so far."""
        return plot_curve(
            self.run_dir / METRICS, self.run_dir / "learning_curve.png", self.config.name
        )

    def note(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, highlight=False)

    def alert(self, title: str, text: str) -> None:
        """One line of warning, and an alert of W&B."""
        self.console.print(f"warning: {title}: {text}", highlight=False, markup=False)
        if self._wandb is not None:
            self._wandb.alert(title=title, text=text, level="WARN")

    def close(self) -> None:
        self.end()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


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
    return Console(
        stderr=True, soft_wrap=True, force_terminal=None if sys.stderr.isatty() else False
    )


def _cell(text: str) -> str:
    """The beginning and the end of a long text: the answer stands at the end."""
    if len(text) > 2 * HALF_CELL:
        text = f"{text[:HALF_CELL]} [...] {text[-HALF_CELL:]}"
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _open_wandb(config: Config, run_dir: Path, console: Console) -> Any:
    mode = os.environ.get("WANDB_MODE") or config.tracking.wandb
    if mode == "disabled":
        return None
    if mode == "auto":
        mode = "online" if _has_wandb_key() else "offline"
        if mode == "offline":
            console.print(
                f"W&B: no API key, so this run is kept offline under {run_dir / 'wandb'}",
                highlight=False,
            )
    import wandb

    run = wandb.init(
        project=config.tracking.project,
        name=run_dir.name,
        group=config.tracking.group,
        dir=str(run_dir),
        mode="online" if mode == "online" else "offline",
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=60),
    )
    run.define_metric("train/step")
    run.define_metric("eval/step")
    run.define_metric("*", step_metric="train/step")
    run.define_metric("sft/*", step_metric="sft/step")
    run.define_metric("val-core/*", step_metric="eval/step")
    run.define_metric("val-aux/*", step_metric="eval/step")
    return run


def _has_wandb_key() -> bool:
    """Whether W&B would not have to ask; its own check may prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = (
        urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        or ""
    )
    try:
        return netrc.netrc().authenticators(host) is not None
    # no file, or not one we can read: then there is no key
    except (OSError, netrc.NetrcParseError):
        return False
