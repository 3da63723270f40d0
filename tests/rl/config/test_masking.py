"""Nothing that a run writes or says has a secret in it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from emberl.rl.checkpoints import begin_checkpoint, check_resumed, finish_checkpoint
from emberl.rl.cli import app
from emberl.rl.config.load import load_config, shown_tree, to_yaml
from emberl.rl.config.masking import hidden, masked
from emberl.rl.exits import telling_why
from emberl.rl.groups import Progress
from emberl.rl.watch.tracking import Tracker
from rich.console import Console
from typer import Exit
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
    ("name", "value", "secret"),
    [
        *((name, "x", True) for name in ("api_key", "OPENAI_API_KEY", "hf_token", "token")),
        *((name, "x", True) for name in ("password", "client_secret", "X-Api-Key", "apiKey")),
        *((name, "x", True) for name in ("db_pwd", "Authorization", "session_cookie")),
        *((name, "x", False) for name in ("eos_token", "micro_batch_tokens", "label_key", "keys")),
        ("openai_key", "a8c1f0aa77e54cd6b0f3", True),
        ("github_token", "a8c1f0aa77e54cd6b0f3", True),
        ("label_key", "ground_truth_answer", False),
        ("end_token", "<|end_of_the_turn_2|>", False),
    ],
)
def test_names(name: str, value: str, secret: bool) -> None:
    assert (masked({name: value}) == {name: "***"}) is secret


def test_a_number_may_be_a_password() -> None:
    assert masked({"password": 1234567890, "max_tokens": 1234567890, "top": None}) == {
        "password": "***",
        "max_tokens": 1234567890,
        "top": None,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:p@ssw0rd@host/v1", "at https://***@host/v1"),
        ("https://host/v1?key=abc123&n=2 failed", "https://host/v1?key=***&n=2 failed"),
        ("https://host/v1?access_token=abc123 failed", "https://host/v1?access_token=*** failed"),
        ("401: Incorrect API key sk-proj-abc123def456ghi789", "401: Incorrect API key ***"),
        ("{'Authorization': 'Bearer abc123def456'}", "{'Authorization': 'Bearer ***'}"),
        ("hf_" + "aB3" * 12, "***"),
        ("the task-based sk-learn model of 2024", "the task-based sk-learn model of 2024"),
        ("a bearer of news: mail me@host or see https://host/@me", None),
    ],
)
def test_what_services_issue_is_known_by_its_form(text: str, shown: str | None) -> None:
    assert hidden(text) == (text if shown is None else shown)


def test_what_the_environment_gave_stays_an_interpolation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short it is, and wherever it stands; in words that are no secret it is not looked
    for."""
    for name, value in {"PIN": "4711", "WHERE": "/scratch/me", "KEPT": "s3cr3t-s3cr3t"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.yaml").write_text(
        "name: run\nmodel: {path: somewhere}\ndata: {source: arithmetic}\n"
        "run_dir: ${oc.env:WHERE}/run\n"
        "reward: {parts: {a: {use: 'm:f', kwargs: {deep: [{pin: '${oc.env:PIN}'}], n: '4711'}}}}\n"
        "tracking: {notes: 'with ${oc.env:KEPT}', tags: ['${oc.env:PIN}', four]}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    shown = shown_tree(config)
    kwargs = shown["reward"]["parts"]["a"]["kwargs"]
    assert kwargs == {"deep": [{"pin": "${oc.env:PIN}"}], "n": "4711"}
    assert shown["run_dir"] == "${oc.env:WHERE}/run"
    assert shown["tracking"]["notes"] == "with ${oc.env:KEPT}"
    assert shown["tracking"]["tags"] == ["${oc.env:PIN}", "four"]
    assert hidden("saved in /scratch/me/run with s3cr3t-s3cr3t") == (
        "saved in /scratch/me/run with ${oc.env:KEPT}"
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_a_line_for_a_person_and_an_alert(file: Path, tmp_path: Path) -> None:
    """Foreign messages may quote what they were given."""
    config = load_config(file, ["tracking.wandb=disabled"])
    out = io.StringIO()
    tracker = Tracker(config, tmp_path, Console(file=out, width=200))
    tracker.note("the judge said: Incorrect key sk-very-secret at http://me:pa55word@host")
    tracker.alert("grader", "401 for sk-very-secret")
    tracker.close()
    written = out.getvalue() + (tmp_path / "alerts.jsonl").read_text()
    assert not [secret for secret in SECRETS if secret in written]
    assert written.count("${oc.env:JUDGE_KEY}") == 3


def test_a_traceback(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_config(file)
    with pytest.raises(Exit), telling_why(""):
        raise RuntimeError("401 for sk-very-secret")
    said = capsys.readouterr()
    assert "RuntimeError: 401 for ${oc.env:JUDGE_KEY}" in said.err.splitlines()[-1]
    assert "Traceback" in said.err and "sk-very-secret" not in said.out + said.err
