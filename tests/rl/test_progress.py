"""Run directories, checkpoints that are whole or absent, metrics trimmed for a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emberl.rl import checkpoints as p
from emberl.rl.config.load import Config, ConfigError, resolve


def config(**extra: object) -> Config:
    return resolve({"name": "run", "model": {"path": "somewhere"}, "data": {"source": "arithmetic"}, **extra})


def save(run_dir: Path, name: str, **changes: int) -> Path:
    folder = p.begin_checkpoint(run_dir, name)
    (folder / "weights").write_text(name)
    return p.finish_checkpoint(folder, p.Progress(**changes), keep=2)


def test_a_new_run_takes_the_next_free_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [p.open_run_dir(config(), resume=False)[0] for _ in range(3)] == [
        Path("runs/run"),
        Path("runs/run-2"),
        Path("runs/run-3"),
    ]


def test_resume_takes_the_newest_run_and_its_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(11):
        folder, _ = p.open_run_dir(config(), resume=False)
    assert folder == Path("runs/run-11")
    save(folder, "sft-000200", stage=0, step=200)
    save(folder, "rl-000007", stage=1, step=7, position=99)
    resumed, checkpoint = p.open_run_dir(config(), resume=True)
    assert resumed == folder
    assert checkpoint == folder / "checkpoints/rl-000007"
    assert p.read_progress(checkpoint) == p.Progress(stage=1, step=7, position=99)


def test_an_explicit_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.* already holds a run; pass --resume"):
        p.open_run_dir(config(run_dir=str(tmp_path)), resume=False)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume found no checkpoint under"):
        p.open_run_dir(config(run_dir=str(tmp_path)), resume=True)


def test_an_unwritable_directory_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.*/file/run cannot be written"):
        p.open_run_dir(config(run_dir=str(tmp_path / "file" / "run")), resume=False)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    done = save(tmp_path, "rl-000001", stage=1, step=1)
    p.begin_checkpoint(tmp_path, "rl-000002")
    assert p.latest_checkpoint(tmp_path) == done


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, f"rl-{step:06}", stage=1, step=step)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["rl-000002", "rl-000003"]


def test_rows_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"stage": s, "step": n, "axis": a}
        for s, n, a in (("sft", 5, "train"), ("rl", 0, "eval"), ("rl", 1, "train"), ("rl", 2, "train"))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    p.trim_metrics(tmp_path, "rl", 1, ("sft", "rl"))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows[:3]
