"""The examinations of `emberl doctor`, each on made-up machines."""

from __future__ import annotations

from typing import Any

import pytest
from emberl.rl.config.load import resolve
from emberl.rl.watch import doctor
from emberl.rl.watch.machine import Check, Machine, SandboxUnavailable, State, worst

OK, WARNING, ERROR = State.OK, State.WARNING, State.ERROR
GIB = 1 << 30


class Fake(Machine):
    """A machine of made-up answers, by the name of what is asked."""

    def __init__(self, overrides: dict[str, Any] | None = None, **answers: Any) -> None:
        config = None
        if overrides is not None:
            base = {"name": "run", "model": {"path": "x"}, "data": {"source": "arithmetic"}}
            config = resolve(base | overrides)
        super().__init__(config, answers.pop("environ", {}))
        self.answers = answers

    def version(self, package: str) -> str | None:
        return self.answers["versions"].get(package)

    def requirements(self) -> tuple[str, ...]:
        return tuple(self.answers["requirements"])

    def read(self, path: str) -> str | None:
        return self.answers.get("files", {}).get(path)

    def output(self, *command: str) -> str | None:
        return self.answers["outputs"].get(command[0])

    def which(self, program: str) -> str | None:
        return self.answers.get("programs", {}).get(program)

    def free(self, path: str) -> int:
        if isinstance(self.answers["free"], OSError):
            raise self.answers["free"]
        return self.answers["free"]

    def writable(self, path: str) -> bool:
        return self.answers.get("writable", True)

    def cores(self) -> tuple[int, int]:
        return self.answers["cores"]

    def limit(self, name: str) -> tuple[int, int]:
        return self.answers["limits"][name]

    def sandbox(self) -> str:
        if isinstance(self.answers["sandbox"], Exception):
            raise self.answers["sandbox"]
        return self.answers["sandbox"]

    def hostname(self) -> str:
        return "box"

    def addresses(self, host: str) -> list[str]:
        return ["127.0.1.1"]

    def outward(self) -> str:
        return self.answers["outward"]

    def reaches(self, host: str, port: int) -> str | None:
        return self.answers["unreachable"].get(f"{host}:{port}")

    def joins(self, address: str) -> str | None:
        return self.answers["unreachable"].get(address)


def test_packages() -> None:
    wanted = [
        "torch>=2.10,<2.14",
        "ray>=2.52",
        "numpy",
        "wandb>=0.19",
        "vllm>=0.23; extra == 'vllm'",
        "ruff>=1; extra == 'dev'",
    ]
    have = {"torch": "2.13.0+cpu", "numpy": "2.0", "wandb": "0.99", "vllm": "0.20", "ruff": "0.1"}
    lines = list(doctor.packages(Fake(versions=have, requirements=wanted)))
    assert [(c.name, c.state) for c in lines] == [
        ("torch", OK),
        ("ray", ERROR),
        ("numpy", OK),
        ("wandb", WARNING),
        ("vllm", WARNING),
    ]
    assert lines[1].fix == "pip install 'ray>=2.52'"
    assert lines[3].text == "0.99, newer than what is tested (0.31)"
    assert lines[4].text == "0.20, outside >=0.23"


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        (None, OK),
        ({}, OK),
        ({"rollout": {"engine": "vllm"}}, ERROR),
        ({"rollout": {"engine": "vllm", "servers": ["http://a:1"]}}, OK),
    ],
)
def test_vllm_is_needed_where_it_decodes(settings: dict[str, Any] | None, state: State) -> None:
    lines = doctor.packages(
        Fake(settings, versions={}, requirements=["vllm>=0.23; extra == 'vllm'"])
    )
    assert [line.state for line in lines] == [state]


@pytest.mark.parametrize(
    ("soft", "hard", "state", "fix"),
    [
        (-1, -1, OK, ""),
        (8192, 8192, OK, ""),
        (1024, -1, WARNING, "ulimit -n 65536"),
        (1024, 4096, WARNING, "limits.conf"),
        (256, 4096, ERROR, "the hard limit is 4096"),
    ],
)
def test_open_files(soft: int, hard: int, state: State, fix: str) -> None:
    (check,) = doctor.open_files(Fake(limits={"RLIMIT_NOFILE": (soft, hard)}))
    assert check.state is state
    assert fix in check.fix and bool(check.fix) is bool(fix)


@pytest.mark.parametrize(
    ("soft", "pids", "state", "text"),
    [
        (-1, None, OK, "no limit"),
        (-1, "max\n", OK, "no limit"),
        (-1, "4096\n", OK, "4096 by /sys/fs/cgroup/pids.max"),
        (1200, "4096\n", WARNING, "1200 by ulimit -u"),
        (1200, "256\n", ERROR, "256 by /sys/fs/cgroup/pids.max"),
    ],
)
def test_processes(soft: int, pids: str | None, state: State, text: str) -> None:
    files = {} if pids is None else {"/sys/fs/cgroup/pids.max": pids}
    (check,) = doctor.processes(Fake(limits={"RLIMIT_NPROC": (soft, soft)}, files=files))
    assert (check.state, check.text) == (state, text)


@pytest.mark.parametrize(
    ("free", "writable", "state", "fix"),
    [
        (64 * GIB, True, OK, ""),
        (GIB, True, WARNING, "shm-size"),
        (GIB // 16, True, ERROR, "shm-size"),
        (64 * GIB, False, ERROR, "chmod 1777 /dev/shm"),
        (FileNotFoundError("/dev/shm"), True, ERROR, "mount -t tmpfs"),
    ],
)
def test_shared_memory(free: Any, writable: bool, state: State, fix: str) -> None:
    (check,) = doctor.shared_memory(Fake(free=free, writable=writable))
    assert check.state is state and fix in check.fix


@pytest.mark.parametrize(
    ("part", "state"),
    [
        (None, WARNING),
        ({"use": "math"}, WARNING),
        ({"use": "code"}, ERROR),
        ({"by_source": {"taco": "code", "*": "math"}}, ERROR),
        ({"use": "code", "options": {"url": "http://sandbox:8080"}}, WARNING),
    ],
)
def test_only_who_runs_programs_needs_a_sandbox(part: dict[str, Any] | None, state: State) -> None:
    settings = None if part is None else {"reward": {"parts": {"answer": part}}}
    refused = SandboxUnavailable("no sandbox: zygote: not permitted. To fix: sysctl -w x=1")
    (check,) = doctor.sandbox(Fake(settings, sandbox=refused))
    assert check.state is state
    assert (check.text, check.fix) == (
        "no code rewards: no sandbox: zygote: not permitted",
        "sysctl -w x=1",
    )
    (check,) = doctor.sandbox(Fake(settings, sandbox="landlock"))
    assert check.state is OK and "a program can ask whether a path" in check.text


def test_the_placement_must_fit_the_quota() -> None:
    two = {"cluster": {"device": "cpu", "learners": 2, "rollouts": 1}}
    (check,) = doctor.cores(Fake(two, cores=(2, 8)))
    assert (check.state, check.text) == (
        ERROR,
        "2 of 8 by affinity and quota, the placement needs 3",
    )
    assert [c.state for c in doctor.cores(Fake(two, cores=(3, 8)))] == [OK]
    two["cluster"]["address"] = "head:6379"  # there, not here
    assert [c.state for c in doctor.cores(Fake(two, cores=(2, 8)))] == [OK]
    assert [c.state for c in doctor.cores(Fake(cores=(1, 1)))] == [OK]


def test_the_disk_must_hold_the_checkpoints(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    settings = {"model": {"path": str(tmp_path)}, "checkpoint": {"keep": 2}}
    (check,) = doctor.disk(Fake(settings, free=2 * GIB))
    assert check.state is OK
    (check,) = doctor.disk(Fake(settings, free=20 << 20))  # three of 7 MiB
    assert check.state is ERROR and "checkpoint.keep" in check.fix
    (check,) = doctor.disk(Fake(settings, free=22 << 20))
    assert check.state is WARNING
    (check,) = doctor.disk(Fake(settings, free=2 * GIB, writable=False))
    assert check.state is ERROR and "run_dir" in check.fix


def test_what_is_elsewhere_must_answer() -> None:
    settings = {
        "cluster": {"address": "head:6379"},
        "rollout": {"engine": "vllm", "servers": ["http://a:8000", "https://b"]},
    }
    fake = Fake(settings, outward="10.0.0.5", unreachable={"b:443": "refused", "head:6379": "HTTP"})
    lines = {f"{c.name} {c.text}": c.state for c in doctor.network(fake)}
    assert lines == {
        "ports free ones on 127.0.0.1": OK,
        "address box stands for 127.0.1.1; Ray knows this node as 10.0.0.5": OK,
        "cluster.address head:6379: HTTP": ERROR,
        "rollout.servers a:8000 answers": OK,
        "rollout.servers b:443: refused": ERROR,
    }


@pytest.mark.parametrize(
    ("wanted", "environ", "unreachable", "state", "text"),
    [
        ("auto", {}, {}, OK, "offline, kept in the run's directory"),
        ("disabled", {}, {}, OK, "not wanted"),
        ("online", {}, {}, ERROR, "tracking.wandb=online, and there is no key"),
        ("auto", {"WANDB_API_KEY": "k"}, {}, OK, "key found, https://api.wandb.ai answers"),
        (
            "auto",
            {"WANDB_API_KEY": "k", "WANDB_BASE_URL": "http://own:8080"},
            {"own:8080": "no route"},
            WARNING,
            "http://own:8080: no route",
        ),
        ("online", {"WANDB_MODE": "offline"}, {}, OK, "offline, kept in the run's directory"),
    ],
)
def test_wandb(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path,
    wanted: str,
    environ: dict[str, str],
    unreachable: dict[str, str],
    state: State,
    text: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .netrc may hold a key
    settings = {"tracking": {"wandb": wanted}}
    fake = Fake(settings, environ=environ, unreachable=unreachable)
    (check,) = doctor.weights_and_biases(fake)
    assert (check.state, check.text) == (state, text)


def test_a_card_that_is_named_must_answer() -> None:
    cards = {"nvidia-smi": "NVIDIA H200, 143771 MiB\nNVIDIA H200, 143771 MiB\n"}
    (check,) = doctor.accelerator(Fake(outputs=cards))
    assert check.text == "NVIDIA H200, 143771 MiB; NVIDIA H200, 143771 MiB"
    assert list(doctor.accelerator(Fake({"cluster": {"device": "npu"}}, outputs={}))) == []
    assert list(doctor.accelerator(Fake(outputs={}))) == []
    (check,) = doctor.accelerator(Fake({"cluster": {"device": "cuda"}}, outputs={}))
    assert check.state is ERROR


def test_the_compiler() -> None:
    (check,) = doctor.compiler(Fake(programs={"g++": "/usr/bin/g++"}))
    assert check.state is OK
    (check,) = doctor.compiler(Fake(programs={}))
    assert check.fix == "apt install g++"


def test_the_worst_line_decides() -> None:
    lines = [Check(name=state, state=state, text="") for state in (OK, WARNING, OK)]
    assert worst(lines) is WARNING
    assert worst([*lines, Check(name="x", state=ERROR, text="")]) is ERROR
    assert worst([]) is OK


@pytest.mark.slow
def test_this_machine_gets_a_line_for_everything() -> None:
    lines = list(doctor.examine())
    names = [check.name for check in lines]
    assert {"python", "torch", "ray", "sandbox", "processors", "/dev/shm", "disk", "W&B"} <= {
        *names
    }
    assert all(bool(check.fix) is (check.state is not OK) for check in lines)
    torch = next(check for check in lines if check.name == "torch")
    assert str(torch).startswith(f"{torch.state:8} torch")
