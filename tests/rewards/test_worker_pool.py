"""The worker pool with tiny factories of this file: kills, retries, limits, threads, nothing left
behind."""

import asyncio
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from emberl.rewards.processes import descendants
from emberl.rewards.worker_pool import Ended, WorkerPool

pytestmark = pytest.mark.slow  # every test starts processes


def serve(kind="echo"):
    def answer(task):
        match task:
            case ["sleep", seconds]:
                time.sleep(seconds)
            case ["spin"]:
                pow(3, 10**9)  # inside C: no Python signal handler would ever run
            case ["raise"]:
                raise KeyError("lost")
            case ["memory"]:
                return len(bytearray(8 * 2**30))
            case ["abort"]:
                os.abort()
            case ["exit_once", path]:
                if not os.path.exists(path):
                    open(path, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
            case ["pid"]:
                return os.getpid()
            case ["fork"]:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                time.sleep(60)
            case ["fork_and_return"]:
                os.fork()  # and both go on
            case ["fork_and_answer"]:
                libc = ctypes.CDLL(None)
                libc.fork()  # Python does not hear of it
            case ["speak", text]:
                os.write(_channel(), struct.pack(">I", len(text)) + text.encode())
            case ["burn", seconds]:
                end = time.process_time() + seconds
                while time.process_time() < end:
                    pass
            case ["connect", port]:
                with socket.create_connection(("127.0.0.1", port), timeout=2):
                    return True
            case ["modules"]:
                return [name for name in ("torch", "ray", "sympy") if name in sys.modules]
        return task

    return answer


def _channel() -> int:
    """The worker's own socket, as a plugin would find it."""
    sockets = [int(fd) for fd in os.listdir("/proc/self/fd") if _target(fd).startswith("socket:")]
    return min(sockets)


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def serve_broken():
    raise RuntimeError("cannot be set up")


def serve_killed_once(mark: str):
    """As one that something ends while it starts."""
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return serve()


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(sys, "path", [os.path.dirname(__file__), *sys.path])
    pools = []

    def build(target="test_worker_pool:serve", **keywords):
        pools.append(WorkerPool(target, {}, **({"workers": 2, "spare": False} | keywords)))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def test_answers_come_in_order_and_workers_start_lazily(make) -> None:
    pool = make()
    assert pool.started == 0
    answers = pool.run([["sleep", 0.2], *[[i] for i in range(20)]], timeout=5)
    assert [a.value for a in answers] == [["sleep", 0.2], *[[i] for i in range(20)]]
    assert pool.started <= 2
    assert pool.run([["modules"]], timeout=5)[0].value == []


def test_a_hung_task_is_killed_at_its_limit_and_the_others_are_graded(make) -> None:
    pool = make(spare=True)
    pool.run([["warm"]], timeout=5)
    start = time.perf_counter()
    answers = pool.run([["spin"], *[[i] for i in range(10)]], timeout=1.0)
    # the limit is on its own time, which a loaded machine gives slowly
    assert time.perf_counter() - start < 10
    assert answers[0].ended is Ended.TIMEOUT
    assert [a.value for a in answers[1:]] == [[i] for i in range(10)]


def test_what_the_worker_started_is_killed_with_it(make) -> None:
    pool = make(workers=1)
    group = pool.run([["pid"]], timeout=5)[0].value  # a worker leads a process group of its own
    assert pool.run([["fork"]], timeout=1.0)[0].ended is Ended.TIMEOUT
    end = time.monotonic() + 5
    while (left := _members(group)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []


def _members(group: int) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, pgrp = file.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(pid)
    return found


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file, open(f"/proc/{pid}/status") as status:
            return "" if "State:\tZ" in status.read() else file.read()
    except OSError:
        return ""


@pytest.mark.parametrize("task", [["fork_and_return"], ["fork_and_answer"]])
def test_a_forked_plugin_shifts_no_answer(make, task: list) -> None:
    tasks = [["a"], task, *[[str(i)] for i in range(8)]]
    pool = make(workers=1)
    for _ in range(2):
        assert [a.value for a in pool.run(tasks, timeout=10)] == tasks


@pytest.mark.parametrize("text", ['{"value": 1}', '{"number": 3, "value": 1}', "[]", "x" * 9, "0"])
def test_what_a_plugin_writes_to_its_socket_is_nobodys_answer(make, text: str) -> None:
    """The worker goes, and with it at most the task under which it spoke; the next one is answered
    by another worker."""
    pool = make(workers=1)
    answers = pool.run([["a"], ["speak", text], ["b"], ["c"]], timeout=10)
    assert [a.value for a in (answers[0], *answers[2:])] == [["a"], ["b"], ["c"]]
    assert answers[1].ended in (Ended.CRASHED, Ended.LOST, Ended.DONE)
    assert answers[1].value in (None, ["speak", text])


def test_a_loaded_machine_costs_no_task_its_time(make) -> None:
    """All on one processor, with seven others on it: 0.3 s take more than two on the wall."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    code = "import signal\nsignal.alarm(60)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(7)]
    try:
        answers = make(workers=1).run([["burn", 0.3], ["spin"], ["burn", 0.3]], timeout=0.8)
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()
    assert [a.ended for a in answers] == [Ended.DONE, Ended.TIMEOUT, Ended.DONE]


def test_faults_are_told_apart(make) -> None:
    answers = make(memory_bytes=2**30).run([["raise"], ["memory"], ["abort"], ["fine"]], timeout=10)
    assert [a.ended for a in answers] == [Ended.RAISED, Ended.MEMORY, Ended.CRASHED, Ended.DONE]
    assert "KeyError" in answers[0].message


def test_a_worker_killed_from_outside_loses_no_sample(make, tmp_path) -> None:
    answers = make().run(
        [["exit_once", str(tmp_path / "mark")], *[[i] for i in range(5)]], timeout=10
    )
    assert all(a.ended is Ended.DONE for a in answers)


def test_killing_workers_all_the_time_loses_no_sample(make) -> None:
    pool, stop = make(), threading.Event()

    def killer() -> None:
        seconds = 0.4
        while not stop.wait(seconds):
            seconds *= 2  # on a loaded machine a worker takes longer than that to start
            for pid in _children()[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        answers = [a for _ in range(4) for a in pool.run([["sleep", 0.05]] * 10, timeout=10)]
    finally:
        stop.set()
        thread.join()
    assert [a.ended for a in answers] == [Ended.DONE] * 40
    assert pool.started > 2


def _children() -> list[int]:
    return [
        pid
        for pid in descendants(os.getpid())
        if "emberl.rewards.worker_process" in _command(str(pid))
    ]


def test_workers_are_recycled(make) -> None:
    pool = make(workers=1, recycle=3)
    pids = [a.value for a in pool.run([["pid"]] * 9, timeout=10)]
    assert len(set(pids)) == 3


def test_threads_and_asyncio_share_a_pool(make) -> None:
    pool = make()

    async def many() -> list:
        return await asyncio.gather(
            *[asyncio.to_thread(pool.run, [[i], ["sleep", 0.01]], 10) for i in range(8)]
        )

    assert [answers[0].value for answers in asyncio.run(many())] == [[i] for i in range(8)]


def test_no_network_where_the_kernel_allows(make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert make().run([["connect", port]], timeout=5)[0].value is True
        closed = make(network=False).run([["connect", port]], timeout=5)[0]
    if closed.value is True:
        pytest.skip("this kernel gives no network namespace")
    assert closed.ended is Ended.RAISED


def test_a_factory_that_fails_is_reported(make) -> None:
    pool = make("test_worker_pool:serve_broken")
    assert "cannot be set up" in pool.check()
    answer = pool.run([["x"]], timeout=5)[0]
    assert answer.ended is Ended.LOST
    assert "cannot be set up" in answer.message


def test_a_worker_killed_while_it_starts_is_replaced(make, tmp_path) -> None:
    pool = WorkerPool(
        "test_worker_pool:serve_killed_once", {"mark": str(tmp_path / "mark")}, workers=1
    )
    assert pool.check() == ""
    assert pool.run([["fine"]], timeout=5)[0].value == ["fine"]
    pool.close()


def test_a_closed_pool_and_a_deadline_answer(make) -> None:
    pool = make(workers=1)
    late = pool.run([["sleep", 30], ["never"]], timeout=60, deadline=1.5)
    assert [a.ended for a in late] == [Ended.LOST, Ended.LOST]
    pool.close()
    assert pool.run([["x"]], timeout=5)[0].ended is Ended.LOST
