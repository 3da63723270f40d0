"""Trackers that fail, hang or die: the run goes on and says so once."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rl.config.load import load_config
from emberl.rl.watch import sinks, upload
from emberl.rl.watch.sent import Sent
from emberl.rl.watch.sinks import Background, MLflow, SwanLab, forget_tracked, open_sinks
from emberl.rl.watch.tracking import Tracker, make_console

CONFIG = SimpleNamespace(
    tracking=SimpleNamespace(wandb="disabled", project="p", also=()),
    model_dump=lambda mode: {"seed": 0},
)


QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


class Kept:
    """A sink that remembers, and raises at the step that it is told."""

    def __init__(self, bad: int = -1) -> None:
        self.bad, self.had, self.closed, self.waiting = bad, [], False, 0

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.bad:
            raise ConnectionResetError("Connection lost")
        self.had.append((axis, step, dict(metrics)))

    def table(self, step: int, columns: Any, rows: Any) -> None:
        self.had.append(("table", step, {}))

    def close(self) -> None:
        self.closed = True


def log(sink: Background, steps: range) -> None:
    for step in steps:
        sink.call(lambda it, step=step: it.log("train", step, {"x": step / 2}))  # type: ignore[misc]


def test_calls_come_in_order_and_the_end_waits_for_them() -> None:
    kept, told = Kept(), []
    sink = Background("W&B", lambda: kept, told.append)  # type: ignore[arg-type,return-value]
    log(sink, range(3))
    sink.close()
    assert kept.had == [("train", step, {"x": step / 2}) for step in range(3)]
    assert kept.closed and told == []


def test_a_failure_is_said_once_and_ends_that_tracker_alone() -> None:
    kept, told = Kept(bad=1), []
    sink = Background("W&B", lambda: kept, told.append)  # type: ignore[arg-type,return-value]
    log(sink, range(5))
    sink.close()
    [line] = told
    assert [step for _, step, _ in kept.had] == [0]
    assert line.startswith("W&B ended (ConnectionResetError: Connection lost); the run goes on")


def test_one_that_cannot_be_opened_says_why() -> None:
    told: list[str] = []

    def opening() -> Any:
        raise ImportError("No module named 'swanlab'")

    sink = Background("swanlab", opening, told.append)
    sink.close()
    assert "No module named 'swanlab'" in told[0] and len(told) == 1


def test_a_step_that_is_done_again_is_sent_once(tmp_path: Path) -> None:
    """Two attempts, of which the first is killed: what its tracker had is not sent again, what
    still waited there is; with other settings, everything."""
    config = load_config(QUICKSTART, ["tracking.wandb=disabled"])

    def attempt(steps: range, *, waiting: int) -> list[tuple[str, int, dict[str, float]]]:
        kept = Kept()
        kept.waiting = waiting
        sink = Background("W&B", lambda: kept, lambda _: None, Sent(tmp_path, "wandb"))  # type: ignore[arg-type,return-value]
        tracker = Tracker(config, tmp_path, make_console())
        tracker._sinks, tracker._stage = [sink], "rl"
        for step in steps:
            tracker.log(step, {"x": 1.0})
            tracker.log(step, {"loss": 1.0}, "eval")
            tracker.log(step, {"accuracy": 1.0}, "eval")  # two rows of one step
            tracker._show("rl", "eval", step, [{"parts": {}}])
        while sink._calls.qsize():
            time.sleep(0.01)
        time.sleep(0.1)
        return kept.had

    of_step = [("train", 1), ("eval", 1), ("eval", 1), ("table", 1)]
    assert [had[:2] for had in attempt(range(1, 3), waiting=0)][:4] == of_step
    assert [(a, n) for a, n, _ in attempt(range(2, 4), waiting=1)] == [(a, 3) for a, _ in of_step]
    assert attempt(range(3, 4), waiting=0) == [("table", 3, {})], "it was never sent on"
    assert attempt(range(3, 4), waiting=0) == []
    forget_tracked(tmp_path, anew=False)
    assert len(attempt(range(3, 4), waiting=0)) == 4


def test_one_that_hangs_holds_up_neither_the_steps_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sinks, "QUEUED", 3)
    hung, told = threading.Event(), []

    def opening() -> Any:
        hung.wait(60)
        return Kept()

    sink = Background("W&B", opening, told.append)
    start = time.monotonic()
    log(sink, range(50))
    sink.close(0.2)
    hung.set()
    assert time.monotonic() - start < 10
    assert [line.split(" ", 1)[1] for line in told] == [
        "is slower than the run: figures are left out there",
        "did not end within 0.2 s and is left behind",
    ]


def test_others_by_their_own_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def module(name: str) -> ModuleType:
        made: Any = ModuleType(name)
        made.__getattr__ = lambda called: lambda *a, **k: calls.append((called, a, k))
        monkeypatch.setitem(sys.modules, name, made)
        return made

    module("mlflow")
    module("swanlab").Text = lambda text: f"T:{text}"  # type: ignore[attr-defined]
    for sink in (MLflow(CONFIG, tmp_path), SwanLab(CONFIG, tmp_path)):  # type: ignore[arg-type]
        sink.log("train", 3, {"a": 1.0})
        sink.table(4, ["q", "a"], [["1+1", "2"], ["2+2", "4"]])
        sink.close()
    by_name = {name: (a, k) for name, a, k in calls}
    assert by_name["log_metrics"] == (({"a": 1.0},), {"step": 3})
    rows = {"q": ["1+1", "2+2"], "a": ["2", "4"], "step": [4, 4]}
    assert by_name["log_table"] == ((rows, "samples.json"), {})
    assert by_name["init"][1]["experiment_name"] == tmp_path.name
    assert ("log", ({"samples": ["T:q: 1+1\na: 2", "T:q: 2+2\na: 4"]},), {"step": 4}) in calls
    assert [name for name, *_ in calls if name in ("end_run", "finish")] == ["end_run", "finish"]


def test_what_the_configuration_names_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    monkeypatch.delenv("WANDB_MODE", raising=False)
    told: list[str] = []
    named = SimpleNamespace(wandb="disabled", project="p", also=("mlflow",))
    [sink] = open_sinks(SimpleNamespace(tracking=named), tmp_path, told.append)  # type: ignore[arg-type]
    sink.close()
    assert "mlflow ended (ModuleNotFoundError" in told[0]


KILLED = """
import sys, time, psutil
from pathlib import Path
from emberl.rl.config.load import load_config
from emberl.rl.watch.tracking import Tracker, make_console
config = load_config(sys.argv[1], ["tracking.wandb=offline"])
folder = Path(sys.argv[2])
tracker = Tracker(config, folder, make_console())
tracker.begin("rl", 0, 50)
tracker.log(1, {"critic/score/mean": 0.5})
def core():
    return [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
deadline = time.monotonic() + 60
while not (core() and list(folder.glob("wandb/offline-run-*/*.wandb"))):
    assert time.monotonic() < deadline
    time.sleep(0.1)
time.sleep(1)
for process in core():
    process.kill()
for step in range(2, 51):
    tracker.log(step, {"critic/score/mean": 0.5})
    time.sleep(0.05)
tracker.close()
print("went on")
"""


@pytest.mark.slow
def test_a_killed_wandb_core_ends_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(QUICKSTART), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0 and "went on" in ran.stdout, ran.stderr[-3000:]
    assert ran.stderr.count("W&B ended (") == 1, ran.stderr[-3000:]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    assert time.monotonic() - start < 150
    assert (tmp_path / "wandb_id").read_text().strip()


def records(folder: Path, sitting: int = 0) -> list[Any]:
    """What a sitting of a run kept offline, as W&B will send it."""
    from wandb.proto import wandb_internal_pb2

    file = sorted(folder.glob("wandb/offline-run-*/*.wandb"))[sitting]
    data, at = file.read_bytes(), 7  # LevelDB's log format after a header
    found, parts = [], b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if LOG_BLOCK - at % LOG_BLOCK < 7:
            at += LOG_BLOCK - at % LOG_BLOCK
        if kind in (1, 4):  # whole, or the last of several
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


LOG_BLOCK = 32768


@pytest.mark.slow
def test_what_wandb_itself_keeps_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, offline: axes, a table that grows, histograms, alerts."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["emberl", "train", "x.api_key=sk-proj-abc123def456ghi789"])
    config = load_config(
        QUICKSTART,
        [
            *("tracking.project=p", "tracking.group=g", "tracking.tags=[a,b]", "tracking.notes=n"),
            *("tracking.job_type=train", "reward.parts.answer.options.token=s3cr3t-s3cr3t"),
        ],
    )
    sink = sinks.Wandb(config, tmp_path, "offline", lambda _: None)
    for step in (1, 2, 3):
        sink.log("train", step, {"critic/score/mean": step / 2, "rollout/version": step - 1})
        sink.table(step, ["step", "part/x"], [[step, 0.5], [step, None]])
        sink.histograms(step, {"score/s": np.array([0.0, 1.0, 1.0])})
    sink.log("system", 15, {"system/0/cpu": 0.5})
    sink.alert("no update", "why")
    sink.close()
    found = whole(tmp_path)
    [run] = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert run.run_id == (tmp_path / "wandb_id").read_text()
    assert (run.project, run.run_group, run.job_type) == ("p", "g", "train")
    assert (run.display_name, list(run.tags), run.notes) == (tmp_path.name, ["a", "b"], "n")
    kept = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert kept["optim"]["lr"] == config.optim.lr
    assert kept["reward"]["parts"]["answer"]["options"] == {"token": "***"}
    given = [
        list(r.environment.args) for r in found if r.WhichOneof("record_type") == "environment"
    ]
    assert ["train", "x.api_key=***"] in given
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        assert not any(s in file.read_bytes() for s in (b"s3cr3t-s3cr3t", b"sk-proj-abc"))
    axes = {
        r.metric.name or r.metric.glob_name: r.metric.step_metric
        for r in found
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["actor/*"] == "train/step" and axes["sched/*"] == "rollout/version"
    assert axes["val-core/*"] == "eval/step" and axes["system/*"] == "system/seconds"
    rows = [
        {
            (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert {"critic/score/mean": 1.0, "rollout/version": 1, "train/step": 2} in logged
    assert {"system/0/cpu": 0.5, "system/seconds": 15} in logged
    tables = [row for row in logged if "samples.nrows" in row]
    assert [row["samples.log_mode"] for row in tables] == ["INCREMENTAL"] * 2
    assert [row["train/step"] for row in tables] == [1, 3], "the end has what waited"
    assert [len(row["samples.previous_increments_paths"]) for row in tables] == [0, 1]
    spread = next(row for row in logged if "histogram/score/s.values" in row)
    assert sum(spread["histogram/score/s.values"]) == 3
    assert [r.alert.title for r in found if r.WhichOneof("record_type") == "alert"] == ["no update"]
    # a resumed run is the same one
    time.sleep(1.1)  # W&B names a sitting's folder by the second
    sink = sinks.Wandb(config, tmp_path, "offline", lambda _: None)
    sink.log("sft", 4, {"sft/loss": 1.0})
    sink.close()
    later = whole(tmp_path, 1)
    [again] = [r.run for r in later if r.WhichOneof("record_type") == "run"]
    assert again.run_id == run.run_id and again.project == "p"


def whole(folder: Path, sitting: int = 0) -> list[Any]:
    """`records` of a sitting that has ended: W&B's own process writes them."""
    deadline = time.monotonic() + 60
    while True:
        if len(list(folder.glob("wandb/offline-run-*/*.wandb"))) > sitting:
            found = records(folder, sitting)
            if any(r.WhichOneof("record_type") == "exit" for r in found):
                return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_later_sitting_is_uploaded_behind_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb sync` begins at the first row again where it is not told that a run is resumed."""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("offline-run-1-x", "offline-run-2-x"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    ran: list[tuple[str, str | None]] = []

    def run(command: list[str], env: Mapping[str, str], **_: Any) -> Any:
        folder = Path(command[4])
        (folder / "run-x.wandb.synced").touch()
        ran.append((folder.name, env.get("WANDB_RESUME")))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(upload.subprocess, "run", run)
    assert upload.sync(tmp_path, lambda _: None) == 0
    assert ran == [("offline-run-1-x", "allow"), ("offline-run-2-x", "allow")]
