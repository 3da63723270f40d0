"""The commands other than `train`, as a user types them: what they print, and with which status
they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from emberl.rl.cli import app
from typer.testing import CliRunner

EMBERL = str(Path(sys.executable).with_name("emberl"))
PAIRS = [
    {"gold": "12", "pred": "so it is \\boxed{12}", "label": True},
    {"gold": "12", "pred": "so it is \\boxed{13}", "label": False},
    {"gold": "1/2", "pred": "\\boxed{0.5}", "label": True},
    {"gold": "7", "pred": "\\boxed{7}", "label": False},
]


def run(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [EMBERL, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_audit_counts_disagreements_with_the_labels(tmp_path: Path) -> None:
    data, page = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "report.html"
    figures = json.loads(run("audit", "math", "--data", data, "--html", page, "--json"))
    assert figures["rows"] == 4
    assert figures["false_accepts"] == 1, "the row labelled wrong whose answer is right"
    assert figures["false_rejects"] == 0
    assert "7" in page.read_text()


@pytest.mark.slow
def test_audit_of_the_sandbox_tells_contained_from_not(tmp_path: Path) -> None:
    common = {"language": "python"}
    reads = "def add(a, b):\n    return open('/etc/shadow').read()"
    attacks = write(
        tmp_path / "attacks.jsonl",
        [
            common | {"id": "read", "category": "escape", "code": reads},
            common
            | {
                "id": "forge",
                "category": "forge",
                "code": "print('{\"ok\": 5}'); raise SystemExit(0)",
            },
        ],
    )
    report = json.loads(run("audit", "sandbox", "--attacks", attacks, "--json"))
    assert (report["contained"], report["total"], report["escaped"]) == (2, 2, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "sandbox"], "needs --attacks FILE"),
        (["audit", "math", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["audit", "mth"], "did you mean 'math'"),
        (["train", "a.yaml", "--optim.lr=1e-4"], "overrides have no dashes; write optim.lr=1e-4"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], message: str) -> None:
    result = json.loads(run(*arguments, status=2))
    assert message in result["error"]


def test_ctrl_c_while_the_command_is_loaded_shows_no_traceback() -> None:
    """The moment is that of the first import of `cli`; afterwards a command handles it itself."""
    code = (
        "import builtins, os, signal, sys\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'typer':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "from emberl.rl.start import main\n"
        "main()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")


def test_doctor_gives_every_line_a_level() -> None:
    checks = json.loads(run("doctor", "--json"))["checks"]
    assert any(check["name"] == "sandbox" for check in checks)
    assert all(check["state"] in ("ok", "warning", "error") for check in checks)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--version"], f"emberl {version('emberl')}"),
        (["presets"], "topr  # arXiv 2503.14286"),
        (["keys"], "seed  int (>= 0, < 4294967296) = 0  # Fixes every draw"),
        (["keys", "kl.coef"], "kl.coef  number (>= 0, <= 1e+06) = 0.001  # Weight of the penalty."),
    ],
)
def test_what_a_configuration_may_hold(arguments: list[str], line: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0 and line in found.stdout
    assert CliRunner().invoke(app, ["keys", "optm"]).exit_code == 2


def test_help_loads_no_configuration() -> None:
    """It takes 0.33 s of a core; with the configuration it would be half as much again."""
    code = (
        "import sys, emberl.rl.cli; sys.exit(any(m in sys.modules for m in ('pydantic',"
        " 'omegaconf', 'numpy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
