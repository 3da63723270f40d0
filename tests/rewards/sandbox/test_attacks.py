"""Every hostile program at hand, on every back end; and what a person would see of one that got
through."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emberl.rewards.audit.attacks import audit_sandbox, run_attacks
from emberl.rewards.sandbox import view
from emberl.rewards.sandbox.pool import SandboxUnavailable

HERE = Path(__file__).parent
DATA = HERE.parents[3] / "shared" / "data"
_spec = importlib.util.spec_from_file_location("hostile", HERE / "hostile.py")
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)

slow = pytest.mark.slow
needs_cpp = pytest.mark.skipif(
    view.compiler() is None, reason="g++ is not installed (apt install g++)"
)


def held(report) -> None:
    assert report.contained, "\n".join(
        str(attack) for attack in report.attacks if not attack.contained
    )


@slow
def test_our_own_hostile_python() -> None:
    held(run_attacks(hostile.PYTHON_ROWS, seconds=0.4))


@slow
@needs_cpp
def test_our_own_hostile_cpp() -> None:
    held(run_attacks(hostile.CPP_ROWS, seconds=0.4, compile_seconds=3.0))


@slow
def test_escapes_behind_bubblewrap() -> None:
    try:
        held(
            run_attacks(
                [row for row in hostile.PYTHON_ROWS if row["category"] == "escape"],
                backend="bubblewrap",
            )
        )
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@slow
def test_the_collected_attacks() -> None:
    path = DATA / "sandbox_attacks" / "attacks.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/sandbox_attacks is not here")
    report = audit_sandbox(path, seconds=0.5)
    held(report)
    assert len(report.attacks) + len(report.skipped) >= 51


@slow
def test_the_audit_sees_what_is_not_contained() -> None:
    rows = [
        {
            "id": "solves",
            "category": "forge",
            "language": "python",
            "code": "def add(a, b): return a + b",
        },
        {"id": "claims", "category": "escape", "language": "python", "code": "print('CONNECTED')"},
        {
            "id": "calls",
            "category": "escape",
            "language": "python",
            "code": "print('MOUNT', -1)\nprint([-1, 3])",
        },
        {
            "id": "harmless",
            "category": "escape",
            "language": "python",
            "code": "print('MOUNT', -1)\nprint([-1, -1])",
        },
    ]
    report = run_attacks(rows)
    assert [attack.contained for attack in report.attacks] == [False, False, False, True]
    assert "1 of 4 contained" in report.lines()[-1]
    assert report.record()["escaped"] == ["solves", "claims", "calls"]


def test_a_file_without_attacks_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="no hostile programs"):
        audit_sandbox(empty)
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        audit_sandbox(tmp_path / "missing.jsonl")


@slow
@pytest.mark.skipif(
    os.getuid() != 0,
    reason="only root can become somebody else; as a user every other test shows it",
)
@pytest.mark.parametrize("backend", ["zygote", "landlock"])
def test_works_unprivileged(backend: str) -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    new_enough = [str(python), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if python is None or subprocess.run(new_enough, check=False).returncode:
        pytest.skip("no Python 3.11 that every user may run")
    folder = Path("/tmp") / f"emberl-unprivileged-{backend}-{os.getpid()}"
    shutil.copytree(Path(view.__file__).resolve().parents[1], folder / "emberl" / "rewards")
    shutil.copy(HERE / "hostile.py", folder)
    try:
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        code = (
            "import sys; sys.path[:0] = ['.']; import os; assert os.getuid() == 1234\nfrom"
            " emberl.rewards.audit.attacks import run_attacks; import hostile\nrows = [r for r in"
            " hostile.PYTHON_ROWS if r['category'] == 'escape']\nrows += [r for r in"
            " hostile.CPP_ROWS if r['id'] in ('cpp_files', 'cpp_calls', 'cpp_shell')]\nreport ="
            " run_attacks(rows, seconds=1.0,"
            f" backend={backend!r})\nprint('\\n'.join(report.lines())); sys.exit(not"
            " report.contained)"
        )
        done = subprocess.run(
            [python, "-c", code],
            check=False,
            cwd=folder,
            user=1234,
            group=1234,
            extra_groups=[],
            env={},
            capture_output=True,
            timeout=60,
        )
        if b"SandboxUnavailable" in done.stderr:
            pytest.skip(done.stderr.decode().splitlines()[-1])
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    finally:
        shutil.rmtree(folder)
