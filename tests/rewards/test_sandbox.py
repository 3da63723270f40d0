"""The sandbox: filters by an interpreter of their code, limits, losses, walls, and every hostile program at hand."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from emberl.rewards.audit.attacks import _descendants, audit_sandbox, run_attacks
from emberl.rewards.sandbox import backends as walls
from emberl.rewards.sandbox import seccomp
from emberl.rewards.sandbox.pool import Limits, Outcome, ProgramEnded, Sandbox, SandboxError, SandboxUnavailable

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data"
_spec = importlib.util.spec_from_file_location("hostile", HERE / "hostile.py")
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)

slow = pytest.mark.slow
needs_cpp = pytest.mark.skipif(walls.compiler() is None, reason="g++ is not installed (apt install g++)")


@pytest.fixture(scope="module", params=["zygote", "bubblewrap"])
def sandbox(request):
    try:
        found = Sandbox(workers=1, backend=request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.close()


# --- filters


def verdict(program: bytes, machine: str, number: int, *args: int) -> int:
    """Runs a filter as the kernel does (man 2 seccomp): the return value for one system call."""
    data = struct.pack("<iIQ6Q", number, seccomp.AUDIT_ARCH[machine], 0, *(args + (0,) * 6)[:6])
    steps = list(struct.iter_unpack("<HBBI", program))
    at, value = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == seccomp.LOAD:
            value = struct.unpack_from("<I", data, k)[0]
        elif code == seccomp.AND:
            value &= k
        elif code == seccomp.JUMP_EQUAL:
            at += yes if value == k else no
        elif code == seccomp.JUMP_GREATER_EQUAL:
            at += yes if value >= k else no
        else:
            assert code == seccomp.RETURN
            return k


PYTHON, NATIVE, COMPILER = seccomp.PYTHON, seccomp.NATIVE, seccomp.COMPILER
CALLS = [
    (PYTHON, "read", (0,), seccomp.ALLOW),
    (PYTHON, "openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC), seccomp.ALLOW),
    (PYTHON, "openat", (0, 0, os.O_WRONLY), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, os.O_RDWR), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, os.O_CREAT), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, 1 << 32), seccomp.ALLOW),  # the kernel takes an int there
    (PYTHON, "clone", (0x3D0F00,), seccomp.ALLOW),  # a thread, as pthread_create makes it
    (PYTHON, "clone", (17,), seccomp.EPERM),  # a process
    (PYTHON, "clone", (0x3D0F00 | 0x10000000,), seccomp.EPERM),  # a thread with a user namespace
    (PYTHON, "clone3", (), seccomp.ENOSYS),
    (PYTHON, "prlimit64", (0, 7, 0), seccomp.ALLOW),
    (PYTHON, "prlimit64", (0, 7, 1 << 40), seccomp.EPERM),  # a pointer whose low half is zero
    (PYTHON, "prlimit64", (1, 7, 0), seccomp.EPERM),
    (PYTHON, "fcntl", (1, 1030), seccomp.ALLOW),
    (PYTHON, "fcntl", (1, 8), seccomp.EPERM),  # F_SETOWN
    (PYTHON, "ioctl", (0, 0x5401), seccomp.ALLOW),
    (PYTHON, "ioctl", (0, 0x5412), seccomp.EPERM),  # TIOCSTI
    (PYTHON, "execve", (), seccomp.EPERM),
    (NATIVE, "openat", (0, 0, 0), seccomp.EPERM),
    (NATIVE, "clone", (0x3D0F00,), seccomp.EPERM),
    (NATIVE, "execve", (), seccomp.EPERM),
    (NATIVE, "execveat", (3, 1, 1, 1, 0x1000), seccomp.ALLOW),
    (NATIVE, "execveat", (3, 1, 1, 1, 0), seccomp.EPERM),
    (COMPILER, "execve", (), seccomp.ALLOW),
    (COMPILER, "clone", (17,), seccomp.ALLOW),
    (COMPILER, "clone", (17 | 0x20000000,), seccomp.EPERM),  # CLONE_NEWPID
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("rules", "name", "args", "expected"), CALLS)
def test_filter(machine: str, rules, name: str, args: tuple[int, ...], expected: int) -> None:
    program = seccomp.assemble(rules, machine)
    assert verdict(program, machine, seccomp.NUMBERS[machine][name], *args) == expected


def test_filters_allow_nothing_else() -> None:
    for machine, numbers in seccomp.NUMBERS.items():
        for rules in (PYTHON, NATIVE, COMPILER):
            program = seccomp.assemble(rules, machine)
            listed = {numbers[name] for name in rules if name in numbers}
            others = set(range(600)) - listed - {numbers["clone3"]}
            assert {verdict(program, machine, number) for number in others} == {seccomp.EPERM}


def test_filter_kills_foreign_architectures() -> None:
    program = seccomp.assemble(PYTHON, "x86_64")
    assert verdict(program, "aarch64", 0) == seccomp.KILL
    assert verdict(program, "x86_64", 0x40000000 + 57) == seccomp.KILL
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.assemble(PYTHON, "riscv64")


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed (apt install linux-libc-dev)")
    found = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text())}
    names = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    mine = seccomp.NUMBERS[machine]
    assert mine == {name: found[names.get(name, name)] for name in mine}


# --- choosing a back end


@pytest.mark.parametrize(
    ("limits", "named"),
    [({"seconds": 0}, "seconds"), ({"memory_mb": 8}, "memory_mb"), ({"output_bytes": 0}, "output_bytes")],
)
def test_limits_are_checked(limits: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Limits(**limits)


def test_without_walls_it_refuses_and_names_the_fix(monkeypatch) -> None:
    def fails(name: str, preload: object) -> None:
        raise SandboxUnavailable(f"{name}: not here")

    monkeypatch.setattr(walls, "_tried", fails)
    with pytest.raises(SandboxUnavailable, match=r"zygote: not here; bubblewrap: not here.*apt install bubblewrap"):
        Sandbox()
    with pytest.raises(ValueError, match="allow_unsafe"):
        Sandbox(backend="unsafe")
    with pytest.raises(ValueError, match="chroot"):
        Sandbox(backend="chroot")


@slow
def test_unsafe_only_when_asked_for_and_loudly(monkeypatch) -> None:
    real = walls._tried
    refuse = SandboxUnavailable("no namespaces")

    def tried(name: str, preload):
        if name != "unsafe":
            raise refuse
        return real(name, preload)

    monkeypatch.setattr(walls, "_tried", tried)
    with pytest.warns(RuntimeWarning, match="UNSAFE.*no namespaces"):
        found = Sandbox(workers=1, allow_unsafe=True)
    with found:
        assert found.backend == "unsafe"
        assert found.run_program("print(6 * 7)").stdout == b"42\n"
        assert found.run_program("open('/tmp/emberl-x', 'w')").exit_code == 1  # the filter still holds


# --- runs


@slow
def test_programs(sandbox) -> None:
    run = sandbox.run_program("n = int(input())\nprint(n * 2)\nimport sys\nprint('e', file=sys.stderr)", b"21\n")
    assert (run.outcome, run.exit_code, run.stdout, run.stderr) == (Outcome.EXITED, 0, b"42\n", b"e\n")
    assert sandbox.run_program("import sys; sys.exit(3)").exit_code == 3
    assert sandbox.run_program("raise SystemExit('no')").exit_code == 1
    assert sandbox.run_program("print(open(0).read()[::-1])", "äb".encode()).stdout == "bä\n".encode()
    threads = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()"
    assert sandbox.run_program(threads).stdout == b"1\n"
    failed = sandbox.run_program("1 / 0")
    assert failed.exit_code == 1 and failed.stderr.rstrip().endswith(b"ZeroDivisionError: division by zero")
    modules = (
        "import dataclasses, enum, datetime, decimal, fractions, hashlib, statistics, zlib, json, ctypes; print(1)"
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
    start = time.monotonic()
    run = sandbox.run_program(code, limits=Limits(seconds=0.5, memory_mb=256))
    assert run.outcome is outcome
    assert run.seconds < 1.5 and time.monotonic() - start < 5
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
def test_children_see_nothing_of_the_mother_process_own_talk(sandbox) -> None:
    code = "import os, sys\ndef f(): return ['solution' in sys.modules, sorted(os.environ), 'f' in vars(sys.modules['__main__'])]"
    with sandbox.session({"task": "calls", "code": [code]}, first={"eval": "f()"}) as talk:
        assert json.loads(talk.receive()) == {"ok": None}
        assert json.loads(talk.receive()) == {"ok": [True, [], False]}
    with sandbox.session({"task": "calls", "code": ["def g(): return f(1, ['x'])"]}, first={"eval": "g()"}) as talk:
        talk.receive()
        assert json.loads(talk.receive())["error"] == "NameError"


@slow
@pytest.mark.parametrize("kind", ["RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NPROC"])
def test_limits_that_all_children_share_hold(sandbox, kind: str) -> None:
    most = 64 if kind in ("RLIMIT_NOFILE", "RLIMIT_NPROC") else 0
    run = sandbox.run_program(f"import resource; print(resource.getrlimit(resource.{kind}))")
    assert run.stdout == f"({most}, {most})\n".encode()


@slow
def test_values_come_as_plain_json(sandbox) -> None:
    code = "import collections, enum\nclass E(enum.IntEnum):\n    A = 7\nP = collections.namedtuple('P', 'x')"
    cases = {
        "(1, [2.5, None], {'a': {3}})": {"tuple": [1, [2.5, None], {"dict": [["a", {"set": [3]}]]}]},
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
    source = "#include <iostream>\nint main(){long a,b;std::cin>>a>>b;std::cout<<a*b<<std::endl;return 3;}"
    binary, compilation = sandbox.compile_cpp(source)
    assert compilation.exit_code == 0 and binary.startswith(b"\x7fELF")
    run = sandbox.run_native(binary, b"6 7\n")
    assert (run.stdout, run.exit_code) == (b"42\n", 3)
    binary, compilation = sandbox.compile_cpp("int main(){return x;}")
    assert binary == b"" and compilation.exit_code == 1 and b"'x' was not declared" in compilation.stderr
    assert sandbox.run_program("import os; print(os.listdir('/tmp'))").stdout == b"[]\n"


# --- losses


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the end of another one may have taken it along already
        os.kill(pid, signal.SIGKILL)


@slow
def test_a_killed_mother_process_loses_no_run(sandbox) -> None:
    pids = list(_descendants(os.getpid()))
    timer = threading.Timer(0.2, lambda: [_kill(pid) for pid in pids])
    timer.start()
    run = sandbox.run_program("import time; time.sleep(0.6); print('done')")
    timer.join()
    assert run.stdout == b"done\n"


@slow
def test_a_talk_that_is_cut_off_is_an_error_of_the_sandbox(sandbox) -> None:
    with sandbox.session({"task": "calls", "code": ["x = 1"]}) as talk:
        talk.receive()
        for pid in list(_descendants(os.getpid())):
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


@slow
def test_runs_at_the_same_time() -> None:
    with Sandbox(workers=2) as pool:
        outputs: dict[int, bytes] = {}

        def work(number: int) -> None:
            for each in range(number, 24, 6):
                outputs[each] = pool.run_program("print(int(input()) ** 2)", str(each).encode()).stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert outputs == {n: f"{n * n}\n".encode() for n in range(24)}


@slow
def test_nothing_is_left() -> None:
    before = len(os.listdir("/proc/self/fd")), set(_descendants(os.getpid()))
    with Sandbox(workers=1) as pool:
        pool.run_program("print(1)")
        with pool.session({"task": "calls", "code": ["x = 1"]}) as talk:
            talk.receive()
    assert (len(os.listdir("/proc/self/fd")), set(_descendants(os.getpid()))) == before
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
        children = list(_descendants(trainer.pid))
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


@slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else; as a user every other test shows it")
def test_works_unprivileged(tmp_path: Path) -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    new_enough = [str(python), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if python is None or subprocess.run(new_enough, check=False).returncode:
        pytest.skip("no Python 3.11 that every user may run")
    folder = Path("/tmp") / f"emberl-unprivileged-{os.getpid()}"
    shutil.copytree(Path(walls.__file__).resolve().parents[1], folder / "emberl" / "rewards")
    shutil.copy(HERE / "hostile.py", folder)
    try:
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        code = (
            "import sys; sys.path[:0] = ['.']; import os; assert os.getuid() == 1234\n"
            "from emberl.rewards.audit.attacks import run_attacks; import hostile\n"
            "rows = [r for r in hostile.PYTHON_ROWS if r['category'] == 'escape']\n"
            "rows += [r for r in hostile.CPP_ROWS if r['id'] in ('cpp_files', 'cpp_calls', 'cpp_shell')]\n"
            "report = run_attacks(rows, seconds=1.0, backend='zygote')\n"
            "print('\\n'.join(report.lines())); sys.exit(not report.contained)"
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


# --- hostile programs


def held(report) -> None:
    assert report.contained, "\n".join(str(attack) for attack in report.attacks if not attack.contained)


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
        held(run_attacks([row for row in hostile.PYTHON_ROWS if row["category"] == "escape"], backend="bubblewrap"))
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
        {"id": "solves", "category": "forge", "language": "python", "code": "def add(a, b): return a + b"},
        {"id": "claims", "category": "escape", "language": "python", "code": "print('CONNECTED')"},
        {"id": "calls", "category": "escape", "language": "python", "code": "print('MOUNT', -1)\nprint([-1, 3])"},
        {"id": "harmless", "category": "escape", "language": "python", "code": "print('MOUNT', -1)\nprint([-1, -1])"},
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
