"""Runs in the sandbox: outcomes, talks, limits on own time, losses, nothing left behind; on every
back end of this machine."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from emberl.rewards.processes import descendants, stat_of
from emberl.rewards.sandbox.backends import ForkServer
from emberl.rewards.sandbox.pool import (
    Limits,
    Outcome,
    ProgramEnded,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
)
from emberl.rewards.sandbox.view import compiler

slow = pytest.mark.slow
needs_cpp = pytest.mark.skipif(compiler() is None, reason="g++ is not installed (apt install g++)")


@pytest.fixture(scope="module", params=["zygote", "bubblewrap", "landlock"])
def sandbox(request):
    try:
        found = Sandbox(workers=1, backend=request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.close()


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"seconds": 0}, "seconds"),
        ({"memory_mb": 8}, "memory_mb"),
        ({"output_bytes": 0}, "output_bytes"),
    ],
)
def test_limits_are_checked(limits: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Limits(**limits)


# --- runs


@slow
def test_programs(sandbox) -> None:
    run = sandbox.run_program(
        "n = int(input())\nprint(n * 2)\nimport sys\nprint('e', file=sys.stderr)", b"21\n"
    )
    assert (run.outcome, run.exit_code, run.stdout, run.stderr) == (
        Outcome.EXITED,
        0,
        b"42\n",
        b"e\n",
    )
    assert sandbox.run_program("import sys; sys.exit(3)").exit_code == 3
    assert sandbox.run_program("raise SystemExit('no')").exit_code == 1
    assert (
        sandbox.run_program("print(open(0).read()[::-1])", "äb".encode()).stdout == "bä\n".encode()
    )
    threads = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()"
    assert sandbox.run_program(threads).stdout == b"1\n"
    failed = sandbox.run_program("1 / 0")
    assert failed.exit_code == 1 and failed.stderr.rstrip().endswith(
        b"ZeroDivisionError: division by zero"
    )
    modules = (
        "import dataclasses, enum, datetime, decimal, fractions, hashlib, statistics, zlib, json,"
        " ctypes; print(1)"
    )
    assert sandbox.run_program(modules).stdout == b"1\n"


@slow
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("while True: pass", Outcome.TIME_LIMIT),
        ("import time; time.sleep(60)", Outcome.TIME_LIMIT),
        ("x = bytearray(1 << 30)", Outcome.MEMORY_LIMIT),
        ("while True: print('x' * 9999)", Outcome.OUTPUT_LIMIT),
        ("import ctypes; ctypes.string_at(0)", Outcome.CRASHED),
        ("import os; os._exit(125)", Outcome.EXITED),
    ],
)
def test_outcomes(sandbox, code: str, outcome: Outcome) -> None:
    run = sandbox.run_program(code, limits=Limits(seconds=0.5, memory_mb=256))
    assert run.outcome is outcome
    assert run.cpu_seconds < 1.0 and run.seconds < Limits(seconds=0.5).wall_seconds
    assert len(run.stdout) <= 1 << 20


@slow
def test_a_function_sees_one_call_at_a_time(sandbox) -> None:
    code = "import select\ndef peek(x): return select.select([3], [], [], 0.05)[0]"
    with sandbox.session({"task": "calls", "code": [code]}) as talk:
        assert json.loads(talk.receive()) == {"ok": None}
        talk.send({"eval": "peek(1)"})
        assert json.loads(talk.receive()) == {"ok": []}


@slow
def test_a_load_that_fails_is_answered_before_the_first_call_runs(sandbox) -> None:
    code = "import time\ndef f(): time.sleep(60)\n1 / 0"
    start = time.monotonic()
    with sandbox.session({"task": "calls", "code": [code]}, first={"eval": "f()"}) as talk:
        assert json.loads(talk.receive())["error"] == "ZeroDivisionError"
    assert time.monotonic() - start < 3
    with sandbox.session({"task": "calls", "code": ["x = 1"]}, first={"eval": "x + 1"}) as talk:
        assert [json.loads(talk.receive()) for _ in range(2)] == [{"ok": None}, {"ok": 2}]


@slow
def test_children_see_nothing_of_the_fork_server_own_talk(sandbox) -> None:
    code = (
        "import os, sys\ndef f(): return ['solution' in sys.modules, sorted(os.environ), 'f' in"
        " vars(sys.modules['__main__'])]"
    )
    with sandbox.session({"task": "calls", "code": [code]}, first={"eval": "f()"}) as talk:
        assert json.loads(talk.receive()) == {"ok": None}
        assert json.loads(talk.receive()) == {"ok": [True, [], False]}
    with sandbox.session(
        {"task": "calls", "code": ["def g(): return f(1, ['x'])"]}, first={"eval": "g()"}
    ) as talk:
        talk.receive()
        assert json.loads(talk.receive())["error"] == "NameError"


@slow
@pytest.mark.parametrize(
    "kind", ["RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NPROC"]
)
def test_limits_that_all_children_share_hold(sandbox, kind: str) -> None:
    if kind == "RLIMIT_NPROC" and sandbox.backend == "landlock":
        pytest.skip("there threads are counted from outside")
    most = 64 if kind in ("RLIMIT_NOFILE", "RLIMIT_NPROC") else 0
    run = sandbox.run_program(f"import resource; print(resource.getrlimit(resource.{kind}))")
    assert run.stdout == f"({most}, {most})\n".encode()


@slow
def test_values_come_as_plain_json(sandbox) -> None:
    code = (
        "import collections, enum\nclass E(enum.IntEnum):\n    A = 7\nP ="
        " collections.namedtuple('P', 'x')"
    )
    cases = {
        "(1, [2.5, None], {'a': {3}})": {
            "tuple": [1, [2.5, None], {"dict": [["a", {"set": [3]}]]}]
        },
        "float('nan'), 1e400": {"tuple": [{"float": "nan"}, {"float": "inf"}]},
        "1 << 4200": {"int": hex(1 << 4200)},
        "E.A": 7,
        "P(1)": {"tuple": [1]},
        "collections.Counter('aa')": {"dict": [["a", 2]]},
        "'\\ud800'": "\ud800",
        "1j": {"complex": [0.0, 1.0]},
        "object": {"other": "type"},
    }
    with sandbox.session({"task": "calls", "code": [code]}) as talk:
        talk.receive()
        for source, value in cases.items():
            talk.send({"eval": source})
            assert json.loads(talk.receive()) == {"ok": value}, source


@slow
@needs_cpp
def test_cpp(sandbox) -> None:
    source = (
        "#include <iostream>\nint main(){long"
        " a,b;std::cin>>a>>b;std::cout<<a*b<<std::endl;return 3;}"
    )
    binary, compilation = sandbox.compile_cpp(source)
    assert compilation.exit_code == 0 and binary.startswith(b"\x7fELF")
    run = sandbox.run_native(binary, b"6 7\n")
    assert (run.stdout, run.exit_code) == (b"42\n", 3)
    binary, compilation = sandbox.compile_cpp("int main(){return x;}")
    assert (
        binary == b""
        and compilation.exit_code == 1
        and b"'x' was not declared" in compilation.stderr
    )
    if sandbox.backend != "landlock":  # where nothing of /tmp can be listed at all
        assert sandbox.run_program("import os; print(os.listdir('/tmp'))").stdout == b"[]\n"


# --- own time

LOADED = """
import importlib.util, json, os, subprocess, sys, time
from emberl.rewards.sandbox.pool import Limits, Sandbox
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # all on one processor: a load is what this test makes it
spin = [sys.executable, "-c", "import signal; signal.alarm(100)\\nwhile True: pass"]
burn = "import time\\ndef f(s):\\n    while time.process_time() < s: pass\\n    return 1\\n"
found = []
with Sandbox(workers=1, backend=sys.argv[1]) as box:
    for load in (1, 8):
        others = [subprocess.Popen(spin) for _ in range(load - 1)]
        limits = Limits(seconds=0.4)
        outcomes = [
            str(box.run_program(code, limits=limits).outcome)
            for code in (burn + "f(0.25)", "while True: pass", "import time; time.sleep(0.5)", "import time; time.sleep(60)")
        ]
        with box.session({"task": "calls", "code": [burn]}, limits) as talk:
            replies = [talk.receive()]
            for at in range(10):  # a slow parent's time is not the program's
                talk.send({"eval": f"f({at * 0.025})"})
                replies.append(talk.receive())
                time.sleep(0.1)
        outcomes.append(str(box.run_program("while True: pass", limits=Limits(seconds=1.0)).outcome))
        found.append([outcomes, [json.loads(reply) for reply in replies] == [{"ok": None}] + [{"ok": 1}] * 10])
        for other in others:
            other.kill()
print(json.dumps(found))
"""


@slow
@pytest.mark.parametrize("backend", ["zygote", "landlock"])
def test_a_loaded_machine_changes_no_verdict(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, backend], capture_output=True, timeout=120, check=False
    )
    if b"SandboxUnavailable" in done.stderr:
        pytest.skip(done.stderr.decode().splitlines()[-1])
    assert done.returncode == 0, done.stderr.decode()
    alone, loaded = json.loads(done.stdout)
    assert alone == [["exited", "time limit", "exited", "time limit", "time limit"], True]
    assert loaded == alone


@slow
@pytest.mark.parametrize(
    "code",
    [
        "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
        (
            "import signal, contextlib\nwith contextlib.suppress(OSError):"
            " signal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass"
        ),
        "import time\nwhile True: time.sleep(0.001)",
        (
            "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep,"
            " args=(99,)).start()"
        ),
    ],
)
def test_nobody_gets_out_of_the_time_limit(sandbox, code: str) -> None:
    run = sandbox.run_program(code, limits=Limits(seconds=0.5))
    assert run.outcome is Outcome.TIME_LIMIT
    assert run.cpu_seconds < 1.2 and run.seconds < 10


@slow
def test_a_program_that_takes_no_input_is_ended(sandbox) -> None:
    code = "import time\ntime.sleep(60)"
    with (
        pytest.raises(ProgramEnded) as end,
        sandbox.session(
            {"task": "calls", "code": [code]}, Limits(seconds=0.4), first={"eval": "0" * (4 << 20)}
        ) as talk,
    ):
        talk.receive()
    assert end.value.run.outcome is Outcome.TIME_LIMIT


# --- losses


def _kill(pid: int) -> None:
    # the end of another one may have taken it along already
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@slow
def test_a_killed_fork_server_loses_no_run(sandbox) -> None:
    pids = list(descendants(os.getpid()))
    timer = threading.Timer(0.2, lambda: [_kill(pid) for pid in pids])
    timer.start()
    run = sandbox.run_program("import time; time.sleep(0.6); print('done')")
    timer.join()
    assert run.stdout == b"done\n"


@slow
def test_a_talk_that_is_cut_off_is_an_error_of_the_sandbox(sandbox) -> None:
    with sandbox.session({"task": "calls", "code": ["x = 1"]}) as talk:
        talk.receive()
        for pid in list(descendants(os.getpid())):
            _kill(pid)
        with pytest.raises(SandboxError):
            talk.receive()
    assert sandbox.run_program("print(1)").stdout == b"1\n"


@slow
def test_a_program_that_ends_in_a_talk_is_its_own_doing(sandbox) -> None:
    with (
        pytest.raises(ProgramEnded) as end,
        sandbox.session({"task": "calls", "code": ["import os; os._exit(0)"]}) as talk,
    ):
        talk.receive()
    assert end.value.run.outcome in (Outcome.EXITED, Outcome.STOPPED)


def _leaf(root: int) -> int:
    """The process of the run that is under way: the youngest that has no child."""
    below = set(descendants(root))
    return max(
        below - {int(stat_of(pid)[1]) for pid in below}, key=lambda pid: int(stat_of(pid)[19])
    )


@slow
def test_a_child_killed_from_outside_says_nothing_about_its_program(sandbox) -> None:
    """As the machine does that is out of memory. In a talk, too, where the parent ends children
    itself."""
    with sandbox.session(
        {"task": "calls", "code": ["import time\ndef f(): time.sleep(60)"]}
    ) as talk:
        talk.receive()
        talk.send({"eval": "f()"})
        os.kill(_leaf(os.getpid()), signal.SIGKILL)
        with pytest.raises(SandboxError, match="killed from outside"):
            talk.receive()
    assert sandbox.run_program("print(1)").stdout == b"1\n"


@slow
def test_a_program_cannot_pass_its_end_off_as_ours(sandbox) -> None:
    """It closes its channel, asks for signals, breaks its own process: whatever it does is a run of
    its own."""
    for code in (
        "import os, time\nos.close(3)\ntime.sleep(60)",
        "import os\nos.kill(os.getpid(), 9)",
        "import signal\nsignal.raise_signal(9)",
        "import ctypes\nctypes.CDLL(None).abort()",
        "import os\nos.abort()",
        "import faulthandler\nfaulthandler._sigsegv()",
        (
            "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xf4')\n"
            "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
        ),
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ):
        with sandbox.session({"task": "calls", "code": [code]}, Limits(seconds=0.5)) as talk:
            try:
                reply = json.loads(talk.receive())
            except ProgramEnded as end:
                reply = {"error": end.run.outcome}
        assert "ok" in reply or reply["error"] in (
            "PermissionError",
            "OSError",
            "RecursionError",
            *Outcome,
        ), code


@slow
def test_what_goes_wrong_in_process_1_is_no_verdict(sandbox, monkeypatch) -> None:
    """A limit on processes of its cgroup, as pods have them."""
    folder = Path("/sys/fs/cgroup/pids") / f"emberl-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "pids.max").write_text("1")
    except OSError:
        pytest.skip("no pids cgroup that we may write to")
    home = (
        Path("/sys/fs/cgroup/pids")
        / Path("/proc/self/cgroup").read_text().partition(":pids:")[2].split("\n")[0][1:]
    )
    sandbox.run_program("print(1)")
    server = _leaf(os.getpid())
    try:
        (folder / "cgroup.procs").write_text(str(server))
        with pytest.raises(SandboxError, match="no process for the run"):
            sandbox.run_program("print(3)")
    finally:
        (home / "cgroup.procs").write_text(str(server))
        folder.rmdir()
    assert sandbox.run_program("print(3)").stdout == b"3\n"


@slow
def test_no_descriptor_left_is_no_verdict(sandbox) -> None:
    sandbox.run_program("print(1)")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 2, hard))
    try:
        for act in (
            sandbox.run_program,
            lambda code: sandbox.session({"code": [code]}).__enter__(),
        ):
            with pytest.raises(SandboxError, match="open files"):
                act("print(2)")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert sandbox.run_program("print(3)").stdout == b"3\n"


@slow
@needs_cpp
def test_a_full_disk_is_no_program_that_does_not_compile(tmp_path: Path, monkeypatch) -> None:
    """Where the compiler's folder is on the host's disk."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with Sandbox(workers=1, backend="landlock") as box:
            for source in ("int main() {}", "int main("):
                with pytest.raises(SandboxError, match="compiler does not work"):
                    box.compile_cpp(source)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


@pytest.mark.parametrize(
    "reply",
    [b"", b"no\nout of memory", b'{"error": "an exception that is as long as a reply"}', b"x" * 41],
)
def test_only_a_reply_is_read_as_one(reply: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = ForkServer.__new__(ForkServer)
    server._control, server._started, server._overslept = ours, time.monotonic(), False
    with ours, theirs:
        theirs.send(reply) if reply else theirs.close()
        with pytest.raises(SandboxError):
            server.finish(Limits())


@slow
def test_what_one_run_writes_to_stderr_does_not_reach_the_next(sandbox) -> None:
    code = (
        "import os, sys\ndef f(x):\n    os.write(2, b'x' * 70000)\n    os.write(1, b'x' * 70000)\n "
        "   return x"
    )
    for number in range(3):
        with sandbox.session(
            {"task": "calls", "code": [code]}, first={"eval": f"f({number})"}
        ) as talk:
            assert [json.loads(talk.receive()) for _ in range(2)] == [{"ok": None}, {"ok": number}]


@slow
def test_runs_at_the_same_time() -> None:
    with Sandbox(workers=2) as pool:
        outputs: dict[int, bytes] = {}

        def work(number: int) -> None:
            for each in range(number, 24, 6):
                outputs[each] = pool.run_program(
                    "print(int(input()) ** 2)", str(each).encode()
                ).stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert outputs == {n: f"{n * n}\n".encode() for n in range(24)}


@slow
def test_nothing_is_left() -> None:
    before = len(os.listdir("/proc/self/fd")), set(descendants(os.getpid()))
    with Sandbox(workers=1) as pool:
        pool.run_program("print(1)")
        with pool.session({"task": "calls", "code": ["x = 1"]}) as talk:
            talk.receive()
    assert (len(os.listdir("/proc/self/fd")), set(descendants(os.getpid()))) == before
    with pytest.raises(SandboxError, match="closed"):
        pool.run_program("print(1)")


@slow
def test_it_ends_with_the_trainer() -> None:
    code = (
        "from emberl.rewards.sandbox.pool import Sandbox\ns = Sandbox(workers=1)\n"
        "print('up', flush=True)\ns.run_program('while True: pass')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout.readline() == b"up\n"
        time.sleep(0.3)
        children = list(descendants(trainer.pid))
        assert len(children) >= 3  # launcher, process 1, the running child
        trainer.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/stat").exists() and _running(pid) for pid in children):
        assert time.monotonic() < deadline, "the sandbox outlives the trainer"
        time.sleep(0.02)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
