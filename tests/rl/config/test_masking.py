"""Nothing that a run writes or says has a secret in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emberl.rl.checkpoints import Progress, begin_checkpoint, check_resumed, finish_checkpoint
from emberl.rl.cli import app
from emberl.rl.config.load import load_config, shown_tree, to_yaml
from emberl.rl.config.masking import NAMED
from typer.testing import CliRunner

CONFIG = """\
name: run
model: {path: somewhere}
data: {source: arithmetic}
reward:
  parts:
    judged:
      use: judge
      options:
        base_url: http://me:pa55word@host:8000/v1
        model: m
        api_key: ${oc.env:JUDGE_KEY}
        prompt: "say ${oc.env:JUDGE_KEY} twice {question} {answer}"
    other: {use: "mine:score", kwargs: {hf_token: literal-secret, label_key: answer}}
rollout: {engine: vllm, servers: ["http://u:hunter2hunter2@host:8000"]}
"""
SECRETS = ("sk-very-secret", "pa55word", "literal-secret", "hunter2hunter2")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path / "run.yaml"


def test_files_and_trackers(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    options = config.reward.parts["judged"].options
    assert options["api_key"] == "sk-very-secret", "the run itself has it"
    folder = finish_checkpoint(begin_checkpoint(tmp_path, "rl-1"), Progress(), 1, config)
    written = [to_yaml(config), json.dumps(shown_tree(config))]
    written += [f.read_text() for f in folder.rglob("*") if f.is_file()]
    for text in written:
        assert not [secret for secret in SECRETS if secret in text]
    shown = shown_tree(config)["reward"]["parts"]
    assert shown["judged"]["options"] == {
        "base_url": "http://***@host:8000/v1",
        "model": "m",
        "api_key": "${oc.env:JUDGE_KEY}",
        "prompt": "say ${oc.env:JUDGE_KEY} twice {question} {answer}",
    }
    assert shown["other"]["kwargs"] == {"hf_token": "***", "label_key": "answer"}
    assert check_resumed(config, folder, False) == [], "masked as they are, they are the same"
    # what was written is a configuration again, where the variable is there
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "again.yaml").reward.parts["judged"].options
    assert again["api_key"] == "sk-very-secret"


def test_messages(file: Path) -> None:
    overrides = ["reward.parts.judged.timeout=${oc.env:JUDGE_KEY}"]
    ran = CliRunner().invoke(app, ["train", str(file), *overrides])
    assert ran.exit_code == 2
    assert "reward.parts.judged.timeout" in ran.stdout
    assert "sk-very-secret" not in ran.stdout + ran.stderr


def test_a_dry_run(file: Path) -> None:
    ran = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert not [secret for secret in SECRETS if secret in ran.stdout + ran.stderr]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True),
        ("OPENAI_API_KEY", True),
        ("hf_token", True),
        ("token", True),
        ("password", True),
        ("client_secret", True),
        ("eos_token", False),
        ("micro_batch_tokens", False),
        ("label_key", False),
        ("keys", False),
    ],
)
def test_names(name: str, secret: bool) -> None:
    assert bool(NAMED.search(name)) is secret
