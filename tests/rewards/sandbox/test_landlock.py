"""The back end without privileges: what each version of Landlock is asked, and every hostile
program in a simulated container."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from emberl.rewards.processes import descendants, stat_of
from emberl.rewards.sandbox import landlock
from emberl.rewards.sandbox.pool import Limits, Outcome, Sandbox, SandboxUnavailable
from emberl.rewards.sandbox.view import compiler

HERE = Path(__file__).parent
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def sandbox():
    try:
        found = Sandbox(workers=1, backend="landlock")
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.close()


@pytest.mark.parametrize(
    ("abi", "files", "words"),
    [
        (1, (1 << 13) - 1, 1),
        (2, (1 << 14) - 1, 1),
        (3, (1 << 15) - 1, 1),
        (4, (1 << 15) - 1, 2),
        (5, (1 << 16) - 1, 2),
        (6, (1 << 16) - 1, 3),
        (99, (1 << 16) - 1, 3),
    ],
)
def test_each_version_is_asked_for_all_that_it_knows(
    monkeypatch, tmp_path: Path, abi: int, files: int, words: int
) -> None:
    asked = []

    class Kernel:
        """Takes the system calls of a ruleset, as `uapi/linux/landlock.h` has them."""

        def syscall(self, number: int, *arguments) -> int:
            if number == 444 and arguments[0] is None:
                return abi
            if number == 444:
                asked.append(struct.unpack(f"<{arguments[1].value // 8}Q", arguments[0]))
            else:
                asked.append((arguments[0], *struct.unpack("<Q", arguments[2][:8])))
            return 77

    monkeypatch.setattr(landlock, "_libc", Kernel())
    (tmp_path / "file").touch()
    assert (
        landlock.ruleset([str(tmp_path), str(tmp_path / "file"), "/not/there"], [str(tmp_path)])
        == 77
    )
    assert asked[0] == (files, 0b11, 0b11)[:words]
    truncate = 1 << 14 if abi >= 3 else 0
    assert asked[1:] == [(77, 1 | 4 | 8), (77, 1 | 4), (77, 2 | 4 | 8 | 1 << 5 | 1 << 8 | truncate)]


def test_a_kernel_without_landlock_is_named(monkeypatch) -> None:
    class Kernel:
        def syscall(self, *_) -> int:
            return -1

    monkeypatch.setattr(landlock, "_libc", Kernel())
    with pytest.raises(OSError, match=r"Linux 5\.13"):
        landlock.ruleset([], [])


def test_masked_folders_are_left_out(tmp_path: Path) -> None:
    for name in (
        "lib/python3/json/a.py",
        "lib/python3/site-packages/x.py",
        "lib/python3/os.py",
        "lib/libc.so",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = landlock.readable_below(f"{tmp_path}/lib", [f"{tmp_path}/lib/python3/site-packages"])
    assert found == [
        f"{tmp_path}/lib/{name}" for name in ("libc.so", "python3/json", "python3/os.py")
    ]


@slow
def test_hostile_programs_in_a_container(sandbox) -> None:
    """The back end is found without being named."""
    rows = "PYTHON_ROWS + hostile.CPP_ROWS" if compiler() else "PYTHON_ROWS"
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\nfrom emberl.rewards.audit.attacks import"
        f" run_attacks; import hostile\nreport = run_attacks(hostile.{rows}, seconds=0.4,"
        " compile_seconds=3.0)\nprint('\\n'.join(report.lines())); sys.exit(not report.contained"
        " or report.backend != 'landlock')"
    )
    command = [sys.executable, str(HERE / "container.py"), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, timeout=600, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@slow
def test_contents_and_lists_of_the_host_are_closed_existence_is_not(
    sandbox, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    code = f"""
import os
for act in (os.listdir, os.scandir, lambda p: open(p + "/secret"), lambda p: os.open(p, os.O_RDONLY)):
    try: print(act({str(tmp_path)!r}))
    except PermissionError: print("closed")
print(os.path.exists({str(tmp_path / "secret")!r}))"""
    assert sandbox.run_program(code).stdout.split() == [b"closed"] * 4 + [b"True"]


@slow
def test_threads_are_counted(sandbox) -> None:
    code = """
import threading, time
threading.stack_size(32768)
for _ in range(COUNT): threading.Thread(target=time.sleep, args=(0.3,)).start()
print("all")"""
    few = sandbox.run_program(code.replace("COUNT", "40"), limits=Limits(seconds=2.0))
    assert few.stdout == b"all\n"
    many = sandbox.run_program(code.replace("COUNT", "400"), limits=Limits(seconds=2.0))
    assert many.outcome is Outcome.THREAD_LIMIT


@slow
@pytest.mark.skipif(compiler() is None, reason="g++ is not installed (apt install g++)")
@pytest.mark.parametrize("lost", ["server", "trainer"])
def test_a_compiler_ends_with_its_fork_server_and_with_the_trainer(lost: str) -> None:
    source = (
        b"constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\nconstexpr long x ="
        b" f(60); int main() {}"
    )
    code = f"""
import sys
from emberl.rewards.sandbox.pool import COMPILER_LIMITS, Sandbox, SandboxError
try: s = Sandbox(workers=1, backend="landlock")
except ValueError: sys.exit()
print("up", flush=True)
try: s._compile({source!r}, COMPILER_LIMITS)
except SandboxError: print("lost", flush=True)
sys.stdin.read()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as trainer:
        if trainer.stdout.readline() != b"up\n":
            pytest.skip("no landlock here")
        deadline = time.monotonic() + 20
        while len(below := list(descendants(trainer.pid))) < 3:
            assert time.monotonic() < deadline, "no compiler has started"
            time.sleep(0.01)
        (server,) = [pid for pid in below if int(stat_of(pid)[1]) == trainer.pid]
        os.kill(server if lost == "server" else trainer.pid, signal.SIGKILL)
        while [pid for pid in below if (stat := stat_of(pid)) and stat[0] not in "ZX"]:
            assert time.monotonic() < deadline, f"a compiler outlives the {lost}"
            time.sleep(0.02)
        assert lost == "trainer" or trainer.stdout.readline() == b"lost\n"
        trainer.kill()


@slow
def test_runs_do_not_reach_each_other() -> None:
    """Two programs at the same time, both of the same user, in one PID namespace."""
    try:
        pool = Sandbox(workers=2, backend="landlock")
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    victim = "import time, os; print(os.getpid(), flush=True); time.sleep(1.0); print('alive')"
    attacker = """
import ctypes, os, signal
libc = ctypes.CDLL(None)
got = []
for pid in {*range(max(os.getpid() - 300, 1), os.getpid() + 300)} - {os.getpid()}:
    proc = f"/proc/{pid}/"
    for act in (lambda: os.kill(pid, 9), lambda: os.killpg(pid, 9), lambda: open(proc + "mem"),
                lambda: open(proc + "environ"), lambda: os.listdir(proc + "fd"), lambda: os.readlink(proc + "cwd"),
                lambda: os.pidfd_open(pid), lambda: signal.pidfd_send_signal(0, 9)):
        try: act(); got.append(pid)
        except OSError: pass
    for number in (101, 310, 312, 62, 200, 297, 424, 434):
        if libc.syscall(number, pid, 0, 0, 0) >= 0: got.append((number, pid))
print(got)"""
    found = {}
    with pool:
        threads = [
            threading.Thread(target=lambda n=name, c=code: found.update({n: pool.run_program(c)}))
            for name, code in (("victim", victim), ("attacker", attacker))
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(60)
    assert found["victim"].stdout.endswith(b"alive\n")
    assert found["attacker"].stdout == b"[]\n"
