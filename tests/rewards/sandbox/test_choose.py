"""Which back end a machine gives, and what the refusal says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from emberl.rewards.sandbox import choose
from emberl.rewards.sandbox.backends import ForkServer
from emberl.rewards.sandbox.pool import Sandbox, SandboxUnavailable

slow = pytest.mark.slow


def test_without_walls_it_refuses_and_names_the_fix(monkeypatch) -> None:
    def fails(name: str, preload: object) -> None:
        raise SandboxUnavailable(f"{name}: not here")

    monkeypatch.setattr(choose, "_tried", fails)
    with pytest.raises(
        SandboxUnavailable,
        match=r"zygote: not here; bubblewrap: not here; landlock: not here. To fix",
    ):
        Sandbox()
    with pytest.raises(ValueError, match="allow_unsafe"):
        Sandbox(backend="unsafe")
    with pytest.raises(ValueError, match="chroot"):
        Sandbox(backend="chroot")


@slow
@pytest.mark.parametrize("when", ["_begin", "start"])
def test_a_fork_server_killed_while_it_is_tried_is_no_reason_for_fewer_walls(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    with Sandbox(workers=1) as usual:
        backend = usual.backend
    real, killed = getattr(ForkServer, when), []

    def kill_first(server: ForkServer, *arguments):
        if not killed:
            killed.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)
        return real(server, *arguments)

    monkeypatch.setattr(ForkServer, when, kill_first)
    with Sandbox(workers=1) as found:
        assert found.backend == backend and killed
        assert found.run_program("print(6 * 7)").stdout == b"42\n"


@slow
def test_unsafe_only_when_asked_for_and_loudly(monkeypatch) -> None:
    real = choose._tried
    refuse = SandboxUnavailable("no namespaces")

    def tried(name: str, preload):
        if name != "unsafe":
            raise refuse
        return real(name, preload)

    monkeypatch.setattr(choose, "_tried", tried)
    with pytest.warns(RuntimeWarning, match="UNSAFE.*no namespaces"):
        found = Sandbox(workers=1, allow_unsafe=True)
    with found:
        assert found.backend == "unsafe"
        assert found.run_program("print(6 * 7)").stdout == b"42\n"
        # the filter still holds
        assert found.run_program("open('/tmp/emberl-x', 'w')").exit_code == 1


@pytest.mark.parametrize(
    ("environment", "files", "said", "unsaid"),
    [
        (
            {},
            (),
            ["apt install bubblewrap", "apparmor_restrict_unprivileged_userns=0", "Linux 5.13"],
            [],
        ),
        (
            {},
            (".dockerenv",),
            ["seccomp=unconfined --security-opt apparmor=unconfined", "does not help", "nerdctl"],
            ["apt install"],
        ),
        (
            {"container": "podman"},
            ("run/.containerenv",),
            ["seccomp=unconfined", "podman"],
            ["apt install"],
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            (".dockerenv",),
            [
                "seccompProfile: {type: Unconfined}",
                "appArmorProfile: {type: Unconfined}",
                "SYS_ADMIN",
            ],
            ["--security-opt", "apt install"],
        ),
    ],
)
def test_the_fix_suits_the_machine(
    tmp_path: Path, environment, files, said: list[str], unsaid: list[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text = choose.fix(environment, tmp_path)
    assert all(words in text for words in (*said, "url: http")), text
    assert not any(words in text for words in unsaid), text


@slow
def test_unsafe_hides_the_memory_and_environment_of_this_process() -> None:
    """Landlock would keep the program from /proc altogether; here it is the kernel's dumpable flag,
    against the same user."""
    code = """
import os, warnings
from emberl.rewards.sandbox.pool import Sandbox
warnings.simplefilter("ignore")
with Sandbox(workers=1, backend="unsafe", allow_unsafe=True) as box:
    for name in ("mem", "environ", "maps", "auxv", "fd/0"):
        print(box.run_program(f"open('/proc/{os.getpid()}/{name}', 'rb').read(9); print('READ')"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, text=True, check=True
    )
    assert done.stdout.splitlines() == ["exit code 1"] * 5
