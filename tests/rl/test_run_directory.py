"""Run directories: which one a start takes, who may write there, what a crash left in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emberl.rl import checkpoints, run_directory
from emberl.rl.config.load import Config, ConfigError, resolve
from emberl.rl.groups import Progress
from emberl.rl.run_directory import (
    alone_in,
    forget_earlier,
    open_run_dir,
    trim_metrics,
    trim_samples,
)


def config(**extra: object) -> Config:
    return resolve(
        {"name": "run", "model": {"path": "somewhere"}, "data": {"source": "arithmetic"}, **extra}
    )


def save(run_dir: Path, name: str, **changes: int) -> Path:
    folder = checkpoints.begin_checkpoint(run_dir, name)
    (folder / "weights").write_text(name)
    return checkpoints.finish_checkpoint(folder, Progress(**changes), keep=2)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_run_takes_the_next_free_directory() -> None:
    assert [open_run_dir(config(), "never")[0] for _ in range(3)] == [
        Path("runs/run"),
        Path("runs/run-2"),
        Path("runs/run-3"),
    ]


def test_starts_at_the_same_time_take_different_ones() -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: open_run_dir(config(), "never")[0], range(24)))
    assert len(set(taken)) == 24


@pytest.mark.parametrize("resume", ["must", "auto"])
def test_resume_takes_the_newest_run_that_has_a_checkpoint(resume: run_directory.Resume) -> None:
    for _ in range(11):
        folder, _ = open_run_dir(config(), "never")
    assert folder == Path("runs/run-11")
    save(folder, "sft-000200", stage=0, step=200)
    save(folder, "rl-000007", stage=1, step=7, position=99)
    open_run_dir(config(), "never")  # a start that came to nothing
    resumed, checkpoint = open_run_dir(config(), resume)
    assert resumed == folder
    assert checkpoint == folder / "checkpoints/rl-000007"
    assert checkpoints.read_progress(checkpoint) == Progress(stage=1, step=7, position=99)


def test_auto_starts_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert open_run_dir(config(), "auto") == (Path("runs/run"), None)
    assert open_run_dir(config(), "auto") == (Path("runs/run-2"), None)
    with pytest.raises(ConfigError, match=r"found no run named runs/run with a checkpoint.*auto"):
        open_run_dir(config(), "must")
    named = config(run_dir=str(tmp_path / "named"))
    with pytest.raises(ConfigError, match=r"found no checkpoint under .*auto"):
        open_run_dir(named, "must")
    assert open_run_dir(named, "auto") == (tmp_path / "named", None)


def test_a_named_directory_is_never_overwritten(tmp_path: Path) -> None:
    named = config(run_dir=str(tmp_path / "named"))
    folder, _ = open_run_dir(named, "never")
    (folder / "metrics.jsonl").touch()  # a start that came to nothing
    open_run_dir(named, "never")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ConfigError, match=r"ended before its first checkpoint; write --resume auto"
    ):
        open_run_dir(named, "never")
    assert open_run_dir(named, "auto")[1] is None
    assert (folder / "metrics.jsonl").exists(), "another run may be writing it"
    with alone_in(folder):
        (folder / "stop").touch()
        forget_earlier(folder, anew=False)
        assert not (folder / "stop").exists() and (folder / "metrics.jsonl").exists()
        forget_earlier(folder, anew=True)
    assert not (folder / "metrics.jsonl").exists(), "it starts anew"
    save(folder, "rl-000001", step=1)
    with pytest.raises(ConfigError, match=r"run_dir=.* already holds a run; pass --resume"):
        open_run_dir(named, "never")


def test_an_unwritable_directory_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.*/file/run cannot be written"):
        open_run_dir(config(run_dir=str(tmp_path / "file" / "run")), "never")


HOLD = """
import sys, time
from pathlib import Path
from emberl.rl.run_directory import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_alone_writes_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"by another run, process {other.pid} on "),
            alone_in(tmp_path),
        ):
            pass
        other.kill()
    for _ in range(2):  # a lock ends with its process, and with its block
        with alone_in(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_rows_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"stage": s, "step": n, "axis": a}
        for s, n, a in (
            ("sft", 5, "train"),
            ("rl", 0, "eval"),
            ("rl", 1, "train"),
            ("rl", 2, "train"),
        )
    ]
    file = tmp_path / "metrics.jsonl"
    # the disk was full in the middle of the last line
    file.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"stage": "rl", "st')
    trim_metrics(tmp_path, "rl", 1, ("sft", "rl"))
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:3]
    trim_metrics(tmp_path, "rl", 1, ("sft", "rl"), evaluates=True)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:3]
    trim_metrics(tmp_path, "rl", 0, ("sft", "rl"), evaluates=True)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:1]
    file.write_text('{"stage": "rl", "st\n{"stage": "rl", "step": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1 is not JSON"):
        trim_metrics(tmp_path, "rl", 1, ("sft", "rl"))


def test_answers_that_will_be_shown_again_are_dropped(tmp_path: Path) -> None:
    """Also those of a start that came to nothing."""
    shown = {
        at: f"\n### {at}\n\n| answer |\n|---|\n| 1 \r### rl step 9\r \u2028|\n"
        for at in ("sft step 9", "rl step 0", "rl step 5", "rl step 10")
    }
    file = tmp_path / "samples.md"

    def left(step: int, *, evaluates: bool = False) -> list[str]:
        file.write_bytes("".join(shown.values()).encode())
        trim_samples(tmp_path, "rl", step, ("sft", "rl"), evaluates=evaluates)
        text = file.read_bytes().decode()
        return [at for at, section in shown.items() if section.strip("\n") in text]

    trim_samples(tmp_path, "rl", 1, ("sft", "rl"))
    assert not file.exists()
    assert left(7) == ["sft step 9", "rl step 0", "rl step 5"]
    assert left(5) == left(7)
    assert left(5, evaluates=True) == ["sft step 9", "rl step 0"]
    assert left(0, evaluates=True) == ["sft step 9"]
    forget_earlier(tmp_path, anew=True)
    assert not file.exists()
