"""`WorkerPool`: processes that grade, each task with a deadline that ends in SIGKILL.

Threads and `signal.alarm` cannot stop a computation inside C code, and a killed thread takes its process with it; so what
may hang runs elsewhere. Workers start lazily with a clean interpreter, one more than may run stands ready so that a
kill costs no start, and a task whose worker died through no fault of its own is given to another one.
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

START_SECONDS = 120.0
"""How long a worker may take to import what it needs."""
PATIENCE = 10
"""How many times a limit of processor time a task may take by the clock."""
ATTEMPTS = 3
"""How many workers may die under one task before it is given up."""
MAX_REPLY = 64 * 2**20
_BOOT = (
    "import sys, json, os; sys.path[:] = json.loads(os.environ.pop('EMBERL_WORKER_PATH')); "
    "from {package}.worker_process import main; main(int(sys.argv[1]))"
)


class Ended(StrEnum):
    """How a task ended."""

    DONE = "done"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASHED = "crashed"  # the task brought its worker down each time: a signal such as SIGSEGV, or an exit
    RAISED = "raised"
    LOST = "lost"  # no worker could be had, or every one was killed from outside


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one task: the JSON value that the worker returned if `ended` is DONE, else a message."""

    ended: Ended
    value: Any = None
    message: str = ""
    seconds: float = 0.0


class WorkerPool:
    """Runs tasks in up to `workers` processes of `target`, a factory `package.module:function` called in the worker.

    The factory gets `arguments` and returns a function from one (pickled) task to a JSON value. `memory_bytes` limits the
    address space, `network=False` takes the network away where the kernel allows it, `environment` replaces the
    worker's environment (None: inherit), its output goes to our standard error, or nowhere with `output=False`.
    `processor_time`: a task's limit is of its worker's processor time, so that a loaded machine changes no verdict (at most
    `PATIENCE` times as long by the clock). Thread-safe; usable from asyncio through a thread.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        workers: int,
        memory_bytes: int | None = None,
        network: bool = True,
        environment: Mapping[str, str] | None = None,
        recycle: int = 5000,
        spare: bool = True,
        output: bool = True,
        processor_time: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"concurrency is {workers}; it must be at least 1")
        self._setup = {
            "target": target,
            "arguments": dict(arguments),
            "memory_bytes": memory_bytes,
            "network": network,
        }
        self._environment, self._output = environment, output
        self._workers, self._recycle, self._spare = workers, recycle, spare
        self._processor_time = processor_time
        self._free = threading.Condition()
        self._idle: list[_Worker] = []
        self._running = 0
        self._closed = False
        self.started = 0
        """Processes started so far."""
        self.broken = ""
        """Why workers cannot start, once that is known."""

    def run(self, tasks: Sequence[Any], timeout: float, deadline: float | None = None) -> list[Answer]:
        """One answer per task, in order. `timeout`: seconds for one task; `deadline`: seconds for all of them."""
        return _Run(self, tasks, timeout, deadline).answers()

    def check(self, timeout: float = START_SECONDS) -> str:
        """Starts a worker and waits for it; what went wrong, or an empty string."""
        end = time.monotonic() + timeout
        worker = self.acquire(timeout)
        if worker is None:
            return "no worker was free"
        while not worker.ready and not worker.failure and time.monotonic() < end:
            worker.poll(min(0.5, max(end - time.monotonic(), 0.0)))
        failure = worker.failure if worker.ready or worker.failure else f"did not start within {timeout:g} s"
        self.release(worker, kill=bool(failure))
        return failure

    def acquire(self, wait: float) -> _Worker | None:
        """A worker (perhaps still starting) for the caller alone; None if none is free within `wait` seconds."""
        with self._free:
            if not self._free.wait_for(lambda: self._closed or self._running < self._workers, max(wait, 0.0)):
                return None
            if self._closed:
                return None
            for worker in self._idle:
                worker.poll(0.0)
            worker = next((w for w in self._idle if w.ready), None) or next(iter(self._idle), None) or self._start()
            if worker in self._idle:
                self._idle.remove(worker)
            self._running += 1
            if self._spare and not self._idle:
                self._idle.append(self._start())
            return worker

    def release(self, worker: _Worker, kill: bool = False) -> None:
        """Gives a worker back, dead or alive."""
        keep = not kill and not worker.failure and worker.served < self._recycle and not self._closed
        if not keep:
            worker.kill()
        with self._free:
            self._running -= 1
            if keep and not self._closed:
                self._idle.insert(0, worker)
                while len(self._idle) > self._workers + self._spare:
                    self._idle.pop().kill()
            elif keep:
                worker.kill()
            self._free.notify()

    def _start(self) -> _Worker:
        self.started += 1
        return _Worker(self._setup, self._environment, self._output)

    def close(self) -> None:
        """Ends the idle workers; running ones end with their tasks."""
        with self._free:
            self._closed = True
            idle, self._idle = self._idle, []
            self._free.notify_all()
        for worker in idle:
            worker.kill()


class _Worker:
    """One process and the socket to it. Requests are pickled by us; replies are JSON, as the other side is untrusted."""

    def __init__(self, setup: Mapping[str, Any], environment: Mapping[str, str] | None, output: bool) -> None:
        ours, theirs = socket.socketpair()
        self.socket, self.ready, self.failure, self.served = ours, False, "", 0
        self._buffer = bytearray()
        self.replies: deque[Any] = deque()
        environment = dict(os.environ if environment is None else environment)
        environment["EMBERL_WORKER_PATH"] = json.dumps([path or os.getcwd() for path in sys.path])
        boot = _BOOT.format(package=__name__.rpartition(".")[0])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", boot, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2 if output else subprocess.DEVNULL,
                stderr=None if output else subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # one signal to the group ends what the worker started, too
            )
        finally:
            theirs.close()
        ours.settimeout(10.0)
        self.send(setup)

    def send(self, task: Any) -> bool:
        payload = pickle.dumps(task)
        try:
            self.socket.sendall(struct.pack(">I", len(payload)) + payload)
        except OSError as error:  # it died, or does not read: either way the next look at it says so
            self.failure = self.failure or f"the worker does not take tasks: {error}"
            return False
        return True

    def poll(self, wait: float) -> None:
        """Reads what there is, waiting up to `wait` seconds for the first byte."""
        self.socket.settimeout(wait)
        try:
            while chunk := self.socket.recv(1 << 16):
                self._buffer += chunk
                self.socket.settimeout(0.0)
            self.failure = self.failure or "the worker ended"
        except (BlockingIOError, TimeoutError):
            pass
        except OSError as error:
            self.failure = self.failure or f"the worker is gone: {error}"
        finally:
            self.socket.settimeout(10.0)
        self._decode()

    def _decode(self) -> None:
        while len(self._buffer) >= 4:
            (length,) = struct.unpack(">I", self._buffer[:4])
            if length > MAX_REPLY:
                self.failure = f"a reply of {length} bytes"
                return
            if len(self._buffer) < 4 + length:
                return
            payload = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            try:
                reply = json.loads(payload, parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                self.failure = f"a reply that is no JSON: {error}"
                return
            if self.ready:
                self.replies.append(reply)
            elif isinstance(reply, dict) and reply.get("ready"):
                self.ready = True
            else:
                self.failure = str(reply.get("error")) if isinstance(reply, dict) else "a bad greeting"

    def processor_seconds(self) -> float:
        """Processor time that the process has used; 0 when it is gone."""
        try:  # the clock of another process, as clock_getcpuclockid(3) computes its id
            return time.clock_gettime((~self.process.pid << 3) | 2)
        except OSError:
            return 0.0

    def kill(self) -> int:
        """Ends the process and all that it started; the exit status."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.socket.close()
        try:
            return self.process.wait(10.0)
        except subprocess.TimeoutExpired:  # stuck in the kernel; nothing more can be done from here
            return -int(signal.SIGKILL)


@dataclass(slots=True)
class _Job:
    index: int
    assigned: float
    sent: float | None = None
    used: float = 0.0
    """Processor time of the worker when the task was sent."""


class _Run:
    """One call of `WorkerPool.run`: the workers that it holds and the task that each is at."""

    def __init__(self, pool: WorkerPool, tasks: Sequence[Any], timeout: float, deadline: float | None) -> None:
        self.pool, self.tasks, self.timeout = pool, tasks, timeout
        self.end = time.monotonic() + (deadline if deadline is not None else START_SECONDS + timeout * len(tasks))
        self.queue = deque(range(len(tasks)))
        self.done: list[Answer | None] = [None] * len(tasks)
        self.deaths = [0] * len(tasks)
        self.busy: dict[_Worker, _Job] = {}

    def answers(self) -> list[Answer]:
        try:
            while self.queue or self.busy:
                if time.monotonic() > self.end:
                    break
                self._assign()
                self._wait()
        finally:
            for worker in list(self.busy):
                self._give_back(worker, kill=True)
        return [a or Answer(Ended.LOST, message="not graded within the deadline of the batch") for a in self.done]

    def _assign(self) -> None:
        while self.queue:
            wait = 0.0 if self.busy else self.end - time.monotonic()
            if (worker := self.pool.acquire(wait)) is None:
                if not self.busy and self.pool._closed:
                    for index in self.queue:
                        self.done[index] = Answer(Ended.LOST, message="the pool is closed")
                    self.queue.clear()
                return
            self.busy[worker] = _Job(self.queue.popleft(), time.monotonic())
            if worker.ready:
                self._send(worker)

    def _send(self, worker: _Worker) -> None:
        job = self.busy[worker]
        job.sent, job.used = time.monotonic(), worker.processor_seconds()
        worker.send({"task": self.tasks[job.index], "timeout": self.timeout})

    def _limit(self, job: _Job) -> float:
        """When the task's time is over. A start counts towards it, but never for more than half of it."""
        if job.sent is None:
            return job.assigned + START_SECONDS
        return max(job.assigned + self.timeout, job.sent + self.timeout / 2)

    def _has_time(self, worker: _Worker, job: _Job, now: float) -> bool:
        """Whether a task past its limit by the clock has processor time left; it is then given that much more."""
        if not self.pool._processor_time or job.sent is None or now > job.sent + PATIENCE * self.timeout:
            return False
        left = self.timeout - (worker.processor_seconds() - job.used)
        if left <= 0.0:
            return False
        job.assigned = now - self.timeout + max(left, 0.01)
        return True

    def _wait(self) -> None:
        if not self.busy:
            return
        next_end = min(self.end, *(self._limit(job) for job in self.busy.values()))
        with selectors.DefaultSelector() as selector:
            for worker in self.busy:
                selector.register(worker.socket, selectors.EVENT_READ, worker)
            readable = [key.data for key, _ in selector.select(max(next_end - time.monotonic(), 0.0))]
        for worker in readable:
            worker.poll(0.0)
            self._look_at(worker)
        now = time.monotonic()
        for worker, job in list(self.busy.items()):
            if now < self._limit(job) or self._has_time(worker, job, now):
                continue
            if job.sent is None:
                worker.failure = f"the worker did not start within {START_SECONDS:g} s"
                self._died(worker)
            else:
                message = f"stopped at the limit of {self.timeout:g} s"
                self._finish(worker, Answer(Ended.TIMEOUT, message=message, seconds=now - job.sent), kill=True)

    def _look_at(self, worker: _Worker) -> None:
        job = self.busy[worker]
        if worker.replies:
            reply, seconds = worker.replies.popleft(), time.monotonic() - (job.sent or job.assigned)
            worker.served += 1
            self._finish(worker, _read_reply(reply, seconds), kill=bool(worker.failure))
        elif worker.failure:
            self._died(worker)
        elif worker.ready and job.sent is None:
            self._send(worker)

    def _died(self, worker: _Worker) -> None:
        """A worker ended under its task: another one gets the task, unless it seems to be the task's doing."""
        job, never_ready = self.busy[worker], not worker.ready
        self.deaths[job.index] += 1
        status = self._give_back(worker, kill=True)
        if never_ready and worker.failure != "the worker ended":
            self.pool.broken = worker.failure
        if self.deaths[job.index] < ATTEMPTS and not (never_ready and self.pool.broken):
            self.queue.appendleft(job.index)
            return
        if never_ready:
            ended, message = Ended.LOST, f"the worker cannot start: {worker.failure}"
        elif status == -signal.SIGKILL:
            ended, message = Ended.LOST, f"its worker was killed {self.deaths[job.index]} times"
        else:
            ended, message = Ended.CRASHED, f"its worker ended with status {status}, {self.deaths[job.index]} times"
        self.done[job.index] = Answer(ended, message=message, seconds=time.monotonic() - job.assigned)

    def _finish(self, worker: _Worker, answer: Answer, kill: bool) -> None:
        self.done[self.busy[worker].index] = answer
        if kill or not self.queue or worker.served >= self.pool._recycle:
            self._give_back(worker, kill)
        else:
            self.busy[worker] = _Job(self.queue.popleft(), time.monotonic())
            self._send(worker)

    def _give_back(self, worker: _Worker, kill: bool) -> int:
        del self.busy[worker]
        status = 0
        if kill:
            try:  # a dead worker keeps its own status; one that lives is killed by us
                status = worker.process.wait(0.2) if worker.failure else 0
            except subprocess.TimeoutExpired:
                pass
            status = worker.kill() or status
        self.pool.release(worker, kill)
        return status


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in a reply")


def _read_reply(reply: Any, seconds: float) -> Answer:
    if not isinstance(reply, dict):
        return Answer(Ended.RAISED, message="a reply of the wrong form", seconds=seconds)
    if "value" in reply:
        return Answer(Ended.DONE, value=reply["value"], seconds=seconds)
    ended = Ended.MEMORY if reply.get("memory") else Ended.RAISED
    return Answer(ended, message=str(reply.get("error", ""))[:2000], seconds=seconds)
