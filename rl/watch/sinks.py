"""Trackers beside `metrics.jsonl`: W&B, TensorBoard, SwanLab, MLflow.

Each runs in a thread of its own behind a queue, so that none can end or slow a run: a failure is
reported once, and that tracker is not used any more.
"""

from __future__ import annotations

import netrc
import os
import queue
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ..config.load import Config, shown_tree
from ..config.masking import hidden
from .sent import Sent, forget_sent

QUEUED = 1000
"""Calls that may wait for a slow sink; further ones are dropped."""
CLOSING = 30.0
"""Seconds for the queued calls when a run ends."""
Mode = Literal["online", "offline", "disabled"]
AXES: dict[str, tuple[str, ...]] = {
    "train/step": (
        *("actor/*", "critic/*", "training/*", "rollout_corr/*", "reward/*", "distill/*"),
        *("perf/*", "timing_s/*", "histogram/*", "reject/*"),
    ),
    "eval/step": ("val-core/*", "val-aux/*"),
    "sft/step": ("sft/*",),
    "rollout/version": (
        *("sched/*", "response_length/*", "response/*", "prompt_length/*", "num_turns/*"),
        *("observation_length/*", "episode/*", "sync/*"),
    ),
    "system/seconds": ("system/*",),
}
"""W&B's x axis -> the metrics drawn over it. No two patterns may match one name, as `*` and
another would: W&B takes either of them at random."""
INCREMENT = 8
"""Rows of W&B's table of samples, times the increments before, that wait for the next one."""
MOST_ROWS = 10_000
"""Most rows of that table, which is kept in memory."""
MOST_TEXT = 2_000
"""Most characters of a text there."""
WANDB_ID = "wandb_id"
"""A file in the run's directory with the id by which W&B continues the same run."""


class Sink(Protocol):
    """The interface of a tracker. axis: `train`, `eval`, `sft` or `system`, each with steps of its
    own (of `system`: seconds)."""

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs sampled answers, with verdicts and scores."""

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def close(self) -> None: ...


class Background:
    """A sink that is opened and called in a thread of its own, in order."""

    def __init__(
        self,
        name: str,
        opening: Callable[[], Sink],
        tell: Callable[[str], None],
        sent: Sent | None = None,
    ) -> None:
        """sent: the rows of earlier attempts of the same run, which are not sent again."""
        self.name = name
        self._sent = sent
        self._opening = opening
        self._tell = tell
        self._calls: queue.Queue[tuple[str | None, Callable[[Sink], None]] | None]
        self._calls = queue.Queue(QUEUED)
        self._left_out = 0
        self._failed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"{name}-sink")
        self._thread.start()

    def call(self, do: Callable[[Sink], None], key: str | None = None) -> None:
        """Queues a call of `do`; returns at once. key: of a row to be sent only once."""
        if self._failed:
            return
        try:
            self._calls.put_nowait((key, do))
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                self._tell(f"{self.name} is slower than the run: figures are left out there")

    def close(self, seconds: float = CLOSING) -> None:
        """Waits until the queued calls are done, at most so long."""
        try:
            self._calls.put(None, timeout=seconds)
        except queue.Full:
            pass
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._failed:
            self._tell(f"{self.name} did not end within {seconds:g} s and is left behind")

    def _work(self) -> None:
        try:
            sink = self._opening()
            while (call := self._calls.get()) is not None:
                key, do = call
                if self._sent is None or key is None or key not in self._sent:
                    do(sink)
                    self._note(key, rows_waiting=bool(getattr(sink, "waiting", 0)))
            sink.close()
            self._note(None, rows_waiting=False)
        # anything: foreign code, its helper processes and the network must not end the run
        except Exception as error:
            self._failed = True
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._tell(f"{self.name} ended ({line}); the run goes on, metrics.jsonl has it all")

    def _note(self, key: str | None, *, rows_waiting: bool) -> None:
        if self._sent is not None:
            self._sent.add(key, rows_waiting)


class Wandb:
    """One run of Weights & Biases over all attempts of a run. `WANDB_*` variables go before the
    configuration."""

    def __init__(
        self, config: Config, run_dir: Path, mode: Mode, tell: Callable[[str], None]
    ) -> None:
        import wandb

        self._wandb = wandb
        file, tracking = run_dir / WANDB_ID, config.tracking
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        tree = shown_tree(config)
        shown = tree["tracking"]
        # W&B records the command line, in which there may be a key
        sys.argv[1:] = [hidden(word) for word in sys.argv[1:]]
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", tracking.project),
            "name": os.environ.get("WANDB_NAME", run_dir.name),
            "id": os.environ.get("WANDB_RUN_ID", file.read_text().strip()),
            "resume": "allow" if mode == "online" else None,
            "group": shown["group"],
            "tags": shown["tags"] or None,
            "notes": shown["notes"],
            "job_type": shown["job_type"],
            "dir": str(run_dir),
            "config": tree,
            "settings": wandb.Settings(console="off", silent=True, init_timeout=60),
        }
        options = {name: value for name, value in options.items() if value is not None}
        # inherited, it names another process's wandb-core, which may be gone or write nothing
        os.environ.pop("WANDB_SERVICE", None)
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # e.g. no network or a wrong key: then the run is kept here
            if mode != "online":
                raise
            line = " ".join(str(error).split())[:200]
            tell(f"W&B cannot be reached ({line}): kept offline under {run_dir / 'wandb'}")
            options.pop("resume", None)
            self._run = wandb.init(mode="offline", **options)
        for axis in AXES:
            self._run.define_metric(axis)
        for axis, names in AXES.items():
            for name in names:
                self._run.define_metric(name, step_metric=axis)
        self._table: Any = None
        self.waiting = 0
        """Rows of the table that are held back."""
        self._table_step = self._increments = 0

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "system/seconds" if axis == "system" else f"{axis}/step": step})

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds to one growing table, which W&B can filter; `rollouts` has the full texts."""
        if self._table is None:
            self._table = self._wandb.Table(
                columns=list(columns), log_mode="INCREMENTAL", allow_mixed_types=True
            )
        self._table_step = step
        for row in rows[: MOST_ROWS - len(self._table.data)]:
            self._table.add_data(*(_short(cell) for cell in row))
            self.waiting += 1
        # each increment lists all before it, so their number must grow as the root of the rows only
        if self.waiting > INCREMENT * self._increments:
            self._log_table()

    def _log_table(self) -> None:
        if self.waiting:
            self._increments += 1
            self.waiting = 0
            self._run.log({"samples": self._table, "train/step": self._table_step})

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        made = {
            f"histogram/{name}": self._wandb.Histogram(v.tolist()) for name, v in values.items()
        }
        self._run.log({**made, "train/step": step})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def close(self) -> None:
        self._log_table()
        self._run.finish()


def _short(cell: Any) -> Any:
    """The beginning and the end of a long text."""
    if not isinstance(cell, str) or len(cell) <= MOST_TEXT:
        return cell
    return f"{cell[: MOST_TEXT // 2]} [...] {cell[-MOST_TEXT // 2 :]}"


class TensorBoard:
    """Event files under `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = "\n\n---\n\n".join(
            "\n\n".join(f"**{c}**: {v}" for c, v in zip(columns, row, strict=True)) for row in rows
        )
        self._writer.add_text("samples", text, step)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        for name, value in values.items():
            self._writer.add_histogram(f"histogram/{name}", value, step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text("alerts", f"{title}: {text}")

    def close(self) -> None:
        self._writer.close()


class SwanLab:
    """A run of SwanLab, online with its key, else in `run_dir/swanlog`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import swanlab

        self._swanlab: Any = swanlab
        swanlab.init(
            project=config.tracking.project,
            experiment_name=run_dir.name,
            config=shown_tree(config),
            logdir=str(run_dir / "swanlog"),
            mode=os.environ.get(
                "SWANLAB_MODE", "cloud" if "SWANLAB_API_KEY" in os.environ else "local"
            ),
        )

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        texts = ["\n".join(f"{c}: {v}" for c, v in zip(columns, row, strict=True)) for row in rows]
        self._swanlab.log({"samples": [self._swanlab.Text(text) for text in texts]}, step=step)

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """It has none."""

    def alert(self, title: str, text: str) -> None:
        self._swanlab.log({"alerts": self._swanlab.Text(f"{title}: {text}")})

    def close(self) -> None:
        self._swanlab.finish()


class MLflow:
    """A run of MLflow, at `MLFLOW_TRACKING_URI` or in its own default place."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(config.tracking.project)
        mlflow.start_run(run_name=run_dir.name)
        mlflow.log_artifact(str(run_dir / "config.yaml"))

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        data = {c: [row[i] for row in rows] for i, c in enumerate(columns)}
        self._mlflow.log_table(data | {"step": [step] * len(rows)}, "samples.json")

    def histograms(self, step: int, values: Mapping[str, NDArray[Any]]) -> None:
        """It has none."""

    def alert(self, title: str, text: str) -> None:
        self._mlflow.set_tag(f"alert: {title}"[:250], text[:4000])

    def close(self) -> None:
        self._mlflow.end_run()


def open_sinks(config: Config, run_dir: Path, tell: Callable[[str], None]) -> list[Background]:
    """Opens the configured trackers. A missing package is reported like any other failure."""
    sinks = []
    mode = wandb_mode(config.tracking.wandb)
    if mode == "offline" and config.tracking.wandb == "auto":
        tell(f"W&B: no API key, so this run is kept offline under {run_dir / 'wandb'}")
    if mode != "disabled":
        opening = partial(Wandb, config, run_dir, mode, tell)
        sinks.append(Background("W&B", opening, tell, Sent(run_dir, "wandb")))
    others: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(run_dir),
        "swanlab": lambda: SwanLab(config, run_dir),
        "mlflow": lambda: MLflow(config, run_dir),
    }
    for name in config.tracking.also:
        # SwanLab and MLflow start a new run with each attempt, which needs all of its rows
        sent = Sent(run_dir, name) if name == "tensorboard" else None
        sinks.append(Background(name, others[name], tell, sent))
    return sinks


def forget_tracked(run_dir: Path, *, anew: bool) -> None:
    """Forgets what was sent, for an attempt that redoes steps. anew: another run to trackers."""
    forget_sent(run_dir)
    if anew:
        (run_dir / WANDB_ID).unlink(missing_ok=True)


def wandb_mode(wanted: str, environ: Mapping[str, str] = os.environ) -> Mode:
    """The mode that `tracking.wandb` resolves to on this machine; `WANDB_MODE` overrides it."""
    mode = environ.get("WANDB_MODE") or wanted
    if mode == "auto":
        return "online" if has_wandb_key(environ) else "offline"
    if mode == "offline":
        return "offline"
    return "disabled" if mode == "disabled" else "online"


def has_wandb_key(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B has an API key, in the environment or in ~/.netrc."""
    # not by its own check, which may prompt
    if environ.get("WANDB_API_KEY"):
        return True
    base = environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return netrc.netrc().authenticators(urllib.parse.urlparse(base).hostname or "") is not None
    # no file, or one that cannot be read: no key
    except (OSError, netrc.NetrcParseError):
        return False
