"""The checks of `emberl doctor`, each on made-up machines."""

import importlib.metadata
from resource import RLIM_INFINITY

import pytest
from emberl.rewards.sandbox import choose
from emberl.rl.watch import doctor
from emberl.rl.watch.doctor import Check, Level

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR


def installed(versions: dict[str, str]):
    def look(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return look


def test_python() -> None:
    assert doctor.check_python("3.11.0").level is OK
    assert doctor.check_python("3.9.18").level is ERROR
    assert doctor.check_python("3.9.18").fix == "use Python 3.11 or later"


def test_packages() -> None:
    wanted = [
        "torch>=2.10,<2.14",
        "ray>=2.50",
        "numpy",
        "vllm>=0.23; extra == 'vllm'",
        "ruff>=1; extra == 'dev'",
    ]
    have = {"torch": "2.13.0+cpu", "numpy": "2.0", "vllm": "0.20", "ruff": "0.1"}
    lines = doctor.check_packages(wanted, installed(have))
    assert [(c.name, c.level) for c in lines] == [
        ("torch", OK),
        ("ray", ERROR),
        ("numpy", OK),
        ("vllm", WARNING),
    ]
    assert lines[1].fix == "pip install 'ray>=2.50'"
    assert lines[3].detail == "0.20, outside >=0.23"
    absent = doctor.check_packages(["vllm>=0.23; extra == 'vllm'"], installed({}))
    assert absent == [Check(name="vllm", level=OK, detail="absent (optional)")]


@pytest.mark.parametrize(
    ("soft", "hard", "level", "fix"),
    [
        (RLIM_INFINITY, RLIM_INFINITY, OK, ""),
        (8192, 8192, OK, ""),
        (1024, RLIM_INFINITY, WARNING, "ulimit -n 65536"),
        (1024, 4096, WARNING, "limits.conf"),
        (256, 4096, ERROR, "the hard limit is 4096"),
    ],
)
def test_open_files(soft: int, hard: int, level: Level, fix: str) -> None:
    check = doctor.check_open_files(soft, hard)
    assert check.level is level
    assert fix in check.fix and bool(check.fix) is bool(fix)


@pytest.mark.parametrize(("free", "level"), [(64 << 30, OK), (1 << 30, WARNING), (64 << 20, ERROR)])
def test_shared_memory(monkeypatch, tmp_path, free: int, level: Level) -> None:
    usage = doctor.shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = doctor.check_shared_memory(str(tmp_path))
    assert check.level is level
    assert ("shm-size" in check.fix) is (level is not OK)


def test_shared_memory_that_is_not_there(tmp_path) -> None:
    check = doctor.check_shared_memory(str(tmp_path / "shm"))
    assert check.level is ERROR and "mount" in check.fix


def test_a_machine_without_a_sandbox(monkeypatch) -> None:
    def fails(name: str, preload: object) -> None:
        raise choose.SandboxUnavailable(f"{name}: Operation not permitted")

    monkeypatch.setattr(choose, "_tried", fails)
    check = doctor.check_sandbox()
    assert check.level is WARNING  # who grades no programs needs none
    assert "zygote: Operation not permitted" in check.detail
    assert "max_user_namespaces" in check.fix and "Landlock" in check.fix


def test_the_compiler() -> None:
    assert doctor.check_compiler("/usr/bin/g++").level is OK
    assert doctor.check_compiler(None).fix == "apt install g++"


def test_the_worst_line_decides() -> None:
    lines = [Check(name=level, level=level, detail="") for level in (OK, WARNING, OK)]
    assert doctor.worst(lines) is WARNING
    assert doctor.worst([*lines, Check(name="x", level=ERROR, detail="")]) is ERROR
    assert doctor.worst([]) is OK


@pytest.mark.slow
def test_this_machine_gets_a_line_for_everything() -> None:
    lines = doctor.examine()
    names = [check.name for check in lines]
    assert {"python", "torch", "ray", "sandbox", "g++", "/dev/shm", "open files"} <= set(names)
    assert all(bool(check.fix) is (check.level is not OK) for check in lines)
    torch = next(check for check in lines if check.name == "torch")
    assert str(torch).startswith(f"{torch.level:8} torch")
