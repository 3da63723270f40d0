"""What a person sees of a run: lines off a terminal, a panel on one, and the same from another
terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from emberl.rl import submit
from emberl.rl.config.load import ConfigError
from emberl.rl.run_directory import alone_in
from emberl.rl.watch import console as shown_by
from emberl.rl.watch import top
from emberl.rl.watch.console import StageConsole, figures
from emberl.rl.watch.records import read_record
from emberl.rl.watch.top import watch
from rich.console import Console

METRICS = {
    "critic/score/mean": 0.5,
    "training/accuracy": 0.25,
    "response_length/mean": 1234.4,
    "sched/rollout_idle": 0.125,
    "rollout/version": 7.0,
    "training/verifier_errors": 0.0,
    "timing_s/step": 4.0,
}


def test_figures_are_written_for_people() -> None:
    found = figures(METRICS)
    assert found == {
        "reward": "0.500",
        "accuracy": "25.0%",
        "length": "1,234",
        "rollouts idle": "12%",
        "version": "7",
        "s/step": "4",
    }
    assert figures({"training/verifier_errors": 2.0}) == {"verifier errors": "2"}
    assert figures({"critic/score/mean": None}) == {}  # type: ignore[dict-item]


def test_off_a_terminal_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, text = 0.0, io.StringIO()
    monkeypatch.setattr(shown_by.time, "monotonic", lambda: now)
    stage = StageConsole(Console(file=text, width=200), "rl", 0, 1000)
    for step in range(1, 8):
        now += 25
        stage.step(step, figures(METRICS))
    with stage.doing("saving rl-000007"):
        pass
    stage.close()
    lines = [line.split("  ", 1)[1] for line in text.getvalue().splitlines()]
    assert [line.split()[1] for line in lines[:-1]] == ["1/1000", "4/1000", "7/1000"]
    assert lines[1].split("/1000  ")[1] == (
        "reward 0.500  accuracy 25.0%  length 1,234  25 s/step  6.9 h left"
    )
    assert lines[-1] == "saving rl-000007"


def test_on_a_terminal_a_panel_with_all_of_it() -> None:
    text = io.StringIO()
    screen = Console(file=text, force_terminal=True, width=100, height=30)
    stage = StageConsole(screen, "rl", 0, 10)
    stage.step(3, figures(METRICS))
    stage.looked(3, {"held-out accuracy": "40.0%"})
    stage.warned("no update: [bold]no markup[/bold]")
    with stage.doing("saving"):
        stage.close()
    last = text.getvalue()
    for part in ("3/10", "rollouts idle", "12%", "held-out accuracy 40.0%", "saving"):
        assert part in last
    assert "[bold]no markup[/bold]" in last


def make_run(folder: Path) -> Path:
    rows = [
        {"stage": "rl", "axis": "train", "step": 3, **METRICS},
        {"stage": "rl", "axis": "eval", "step": 3, "val-core/accuracy": 0.4},
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text("name: t\nschedule: {steps: 10}\n")
    (folder / "alerts.jsonl").write_text(
        json.dumps({"time": 1.0, "title": "no update", "text": "[bold]x[/bold]\x1b[31m"}) + "\n{"
    )
    return folder


def test_a_run_from_another_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def look() -> str:
        text = io.StringIO()
        watch(str(run), once=True, console=Console(file=text, width=250))
        return text.getvalue()

    assert "run: ended without a result, rl 3/10" in look()
    with alone_in(run):
        assert read_record(run).running, "its lock is held, and was not taken"
        seen = look()
        with pytest.raises(ConfigError, match="written by another run"), alone_in(run):
            pass
    assert "run: running, rl 3/10, 28 s left" in seen
    assert "accuracy 40.0% at rl 3" in seen and "no update: [bold]x[/bold]" in seen
    assert "\x1b" not in seen, "a terminal is not steered by what an alarm quotes"
    (run / ".lock").write_text("process 7 on another")
    assert "run: running, or ended without a result, on another, rl 3/10" in look()
    (run / "result.json").write_text('{"status": "ok"}')
    assert "run: ok, rl 3/10" in look()
    with pytest.raises(ConfigError, match="give one of its stages: run"):
        read_record(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing has no metrics\.jsonl"):
        watch(str(tmp_path / "nothing"), once=True)


class Jobs:
    """Ray's client of jobs: one that runs for three looks, and the small one that reads its
    files."""

    def __init__(self) -> None:
        self.looks, self.asked, self.stopped = 0, "", ""

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(metadata={"run_dir": "/shared/my run"})

    def submit_job(self, entrypoint: str) -> str:
        self.asked = entrypoint
        return "other"

    def get_job_status(self, job: str) -> SimpleNamespace:
        self.looks += job == "job"
        ended = job == "other" or self.looks > 3
        return SimpleNamespace(value="SUCCEEDED" if ended else "RUNNING")

    def get_job_logs(self, job: str) -> str:
        row = {"stage": "rl", "axis": "train", "step": self.looks, **METRICS}
        return f'Running entrypoint for job {job}\n"no row"\n{json.dumps(row)}\n{{"stage": "r'

    def stop_job(self, job: str) -> None:
        self.stopped = job


@pytest.mark.parametrize("terminal", [False, True])
def test_a_job_by_a_small_one_beside_it(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    jobs = Jobs()
    monkeypatch.setattr(submit, "_client", lambda address: jobs)
    monkeypatch.setattr(top, "EVERY", 0.01)
    text = io.StringIO()
    screen = Console(file=text, width=100, force_terminal=terminal, height=20)
    watch("job", "http://head:8265", console=screen)
    follows = "-F " if terminal else ""
    assert jobs.asked == f"cd '/shared/my run' && tail -n 40 {follows}metrics.jsonl"
    assert jobs.stopped == ("other" if terminal else "")
    assert "job: running, rl 1" in text.getvalue() or "job: running, rl 0" in text.getvalue()
    assert ("job: succeeded, rl" in text.getvalue()) == terminal, "it looks until the job ends"
