"""What a user gets wrong is one clear line that names the key and the fix, with a status that is
not zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emberl.rl.cli import app
from small_system import Emberl
from typer.testing import CliRunner

pytestmark = pytest.mark.slow


BEFORE_RAY = [
    (["data.source=missing.jsonl"], "data.source"),
    (["data.source=empty.jsonl"], "data.source"),
    (["cluster.cpus_per_learner=5000"], "cluster.cpus_per_learner"),
    (["run_dir=/proc/emberl"], "run_dir=/proc/emberl cannot be written"),
    (
        ["stages=[rl]", "algorithm=ppo", "critic.path=nowhere/at-all"],
        "critic.path='nowhere/at-all'",
    ),
    (
        ["stages=[rl]", "model.tiny=null", "model.path=nowhere/at-all"],
        "model.path='nowhere/at-all'",
    ),
    (
        ["stages=[rl]", "model.tiny=null", "model.path=./nowhere"],
        "model.path='./nowhere' does not exist",
    ),
    (["stages=[rl]", "model.tiny=null", "model.path=broken.gguf"], "damaged or cut short"),
    (["model.lora.targets=[nonsense]"], "model.lora.targets"),
    (["algorithm=grop"], "did you mean 'grpo'"),
    (
        ["data={source: rows.jsonl, prompt_column: quesion, max_prompt_length: 16}"],
        "data.prompt_column",
    ),
    (["reward.parts.answer.use=no_such_reward"], "no_such_reward"),
    (["schedule.max_staleness=-1"], "schedule.max_staleness=-1"),
]
AFTER = [(["data.max_prompt_length=4"], "data.max_prompt_length")]


def put_files(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')


@pytest.mark.parametrize(("overrides", "message"), BEFORE_RAY)
def test_one_line_names_the_key_before_ray_starts(
    emberl: Emberl, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    """In this process, as starting one takes longer than the answer."""
    put_files(emberl.folder)
    monkeypatch.chdir(emberl.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def start(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    found = CliRunner().invoke(app, ["train", str(emberl.config), *overrides])
    result = json.loads(found.stdout.strip().splitlines()[-1])
    assert (found.exit_code, result["status"]) == (2, "error")
    assert message in result["error"]
    assert not list(emberl.folder.glob("runs/*/checkpoints"))


@pytest.mark.parametrize(("overrides", "message"), AFTER)
def test_one_line_names_the_key(
    emberl: Emberl, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    put_files(emberl.folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = emberl.train(*overrides, status=2)
    assert result["status"] == "error"
    assert message in result["error"]
    assert not list(emberl.folder.glob("run*/**/checkpoints"))


def test_dry_run_looks_at_the_model_s_files(emberl: Emberl) -> None:
    found = CliRunner().invoke(
        app, ["train", str(emberl.config), "--dry-run", "model.tiny=null", "model.path=./nowhere"]
    )
    assert found.exit_code == 2
    assert "does not exist" in json.loads(found.stdout.strip().splitlines()[-1])["error"]


def test_dry_run_prints_configuration_and_placement(emberl: Emberl) -> None:
    changes = ["algorithm=dapo", "filter.zero_variance=true", f"run_dir={emberl.folder}/runs"]
    found = CliRunner().invoke(app, ["train", str(emberl.config), "--dry-run", *changes])
    assert found.exit_code == 0
    out = found.stdout
    assert "clip_high: 0.28" in out, "the preset is shown expanded"
    assert "bundle  0  learner 0  0.5 CPU, 1 threads" in out
    assert "bundle  1  rollout 0  0.5 CPU, 1 threads" in out
    assert not (emberl.folder / "runs").exists()
