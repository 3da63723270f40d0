"""`WorkerPool`: grading processes, where every task has a limit that ends in SIGKILL.

The limit is on a task's own time, running or sleeping, so that a loaded machine changes no verdict
(`processes.py`).

Threads and `signal.alarm` cannot stop a computation inside C code, and a thread cannot be killed
without its process, so code that may hang runs in processes. One thread drives one process: it
sends a task, waits for the reply or the limit, and goes on to the next. Workers start on demand
with a clean interpreter; a spare one stands ready, so that a kill costs no start. A task whose
worker died is given to another.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .worker_process import Answer, Ended, WorkerLost, WorkerProcess, wall_limit

__all__ = ["Answer", "Ended", "WorkerPool"]

START_SECONDS = 120.0
"""Most seconds that a worker may take to start and import its modules."""
ATTEMPTS = 3
"""Number of workers that may die under one task before it is given up."""


class WorkerPool:
    """Runs tasks in up to `workers` processes of `target`, a factory `package.module:function`.

    The worker calls the factory with `arguments`; it returns a function from a (pickled) task to a
    JSON value. `memory_bytes` limits the address space, `network=False` removes the network if the
    kernel allows, `environment` replaces the environment (None: inherit). Output goes to our
    standard error, or nowhere with `output=False`. `recycle`: tasks after which a worker is
    replaced. Thread-safe; usable from asyncio through a thread.
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
    ) -> None:
        if workers < 1:
            raise ValueError(f"concurrency is {workers}; it must be at least 1")
        self._setup = {
            "target": target,
            "arguments": dict(arguments),
            "memory_bytes": memory_bytes,
            "network": network,
        }
        self._environment = environment
        self._output = output
        self._workers = workers
        self._recycle = recycle
        self._spare = spare
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[WorkerProcess] = []
        self._closed = False
        self.started = 0
        """Processes started so far."""
        self.broken = ""
        """Why workers cannot start, once that is known."""

    def run(
        self, tasks: Sequence[Any], timeout: float, deadline: float | None = None
    ) -> list[Answer]:
        """Returns one answer per task, in order.

        `timeout`: own seconds of one task; `deadline`: wall seconds of all tasks, by default far
        more than they need on a loaded machine.
        """
        if deadline is None:
            deadline = START_SECONDS + wall_limit(timeout) * len(tasks)
        batch = _Batch(list(tasks), timeout, time.monotonic() + deadline)
        threads = [
            threading.Thread(target=self._work, args=(batch,), daemon=True)
            for _ in range(min(self._workers, len(tasks)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(batch.end - time.monotonic(), 0.0))
        finally:
            answers = batch.finish()
        if batch.error is not None:
            raise batch.error
        return answers

    def check(self, timeout: float = START_SECONDS) -> str:
        """Starts a worker and waits for it. Returns the error, or an empty string. A worker lost
        without a message, e.g. killed from outside, is replaced."""
        if not self._slots.acquire(timeout=timeout):
            return "no worker was free"
        try:
            for attempt in range(1, ATTEMPTS + 1):
                worker = None
                try:
                    worker = self._take()
                    worker.wait_ready(timeout)
                    self._give_back(worker)
                    break
                except WorkerLost as error:
                    if worker is not None:
                        worker.close()
                    if error.final or attempt == ATTEMPTS:
                        return str(error)
        finally:
            self._slots.release()
        return ""

    def close(self) -> None:
        """Ends the idle workers; busy ones end with their tasks."""
        with self._lock:
            self._closed = True
            idle = self._idle
            self._idle = []
        for worker in idle:
            worker.close()

    def _work(self, batch: _Batch) -> None:
        """A thread's share of a batch: one task after the other, on the same worker as long as it
        lives."""
        if not self._slots.acquire(timeout=max(batch.end - time.monotonic(), 0.0)):
            return
        worker = None
        try:
            while (index := batch.next()) is not None:
                batch.answers[index], worker = self._answer(batch, batch.tasks[index], worker)
        except BaseException as error:  # not a worker's: a task that cannot be pickled
            batch.error = error
        finally:
            self._give_back(worker)
            self._slots.release()

    def _answer(
        self, batch: _Batch, task: Any, worker: WorkerProcess | None
    ) -> tuple[Answer, WorkerProcess | None]:
        """The answer, and the worker if it can take another task. A task whose worker ends is given
        to a new one, at most `ATTEMPTS` times in all."""
        start = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            if self._closed:
                return Answer(Ended.LOST, message="the pool is closed"), worker
            ready = False
            try:
                worker = worker or self._take()
                if not batch.hold(worker):
                    return Answer(Ended.LOST), worker
                worker.wait_ready(START_SECONDS)
                ready = True
                return worker.ask(task, batch.timeout), self._kept(worker)
            except WorkerLost as error:
                status, worker = (worker.close() if worker else 0), None
                answer = _lost(str(error), ready, status, attempt, time.monotonic() - start)
                if not ready and error.final:
                    self.broken = str(error)
                    break
        return answer, None

    def _take(self) -> WorkerProcess:
        """Returns a worker, perhaps still starting, for the caller alone. Raises WorkerLost."""
        worker = None
        while worker is None:
            with self._lock:
                worker = self._idle.pop() if self._idle else self._start()
                if self._spare and not self._idle and not self._closed:
                    self._idle.append(self._start())
            if not worker.quiet():  # it ended, or spoke unasked
                worker.close()
                worker = None
        return worker

    def _start(self) -> WorkerProcess:
        self.started += 1
        try:
            return WorkerProcess(self._setup, self._environment, self._output)
        except OSError as error:  # no process, no memory, no descriptor
            raise WorkerLost(str(error)) from None

    def _kept(self, worker: WorkerProcess) -> WorkerProcess | None:
        """The worker, or None after closing one that is dead or due to be replaced."""
        if worker.served < self._recycle and worker.process.poll() is None:
            return worker
        worker.close()
        return None

    def _give_back(self, worker: WorkerProcess | None) -> None:
        if worker is None:
            return
        with self._lock:
            keep = not self._closed and not worker.stopped
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.close()


@dataclass(slots=True)
class _Batch:
    """The tasks of one call of `WorkerPool.run`, and their answers so far."""

    tasks: list[Any]
    timeout: float
    end: float
    answers: dict[int, Answer] = field(default_factory=dict)
    error: BaseException | None = None
    _next: int = 0
    _workers: set[WorkerProcess] = field(default_factory=set)
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> int | None:
        """The index of a task that no thread has taken, None if there is none."""
        with self._lock:
            if self._over or self._next == len(self.tasks):
                return None
            self._next += 1
            return self._next - 1

    def hold(self, worker: WorkerProcess) -> bool:
        """Whether the batch goes on. The worker will be stopped when the batch is over."""
        with self._lock:
            self._workers.add(worker)
            return not self._over

    def finish(self) -> list[Answer]:
        """Ends the batch and the workers that are still busy with it; returns the answers in
        order."""
        late = Answer(Ended.LOST, message="not graded within the deadline of the batch")
        with self._lock:
            answers = [self.answers.get(index, late) for index in range(len(self.tasks))]
            self._over = True
            unfinished = len(self.answers) < len(self.tasks)
        for worker in self._workers if unfinished else ():
            worker.stop()
        return answers


def _lost(why: str, ready: bool, status: int, times: int, seconds: float) -> Answer:
    """The answer to a task whose workers have ended, `times` times."""
    if not ready:
        return Answer(Ended.LOST, None, f"the worker cannot start: {why}", seconds)
    if status == -signal.SIGKILL:
        return Answer(Ended.LOST, None, f"its worker was killed {times} times", seconds)
    message = f"its worker ended with status {status}, {times} times"
    return Answer(Ended.CRASHED, None, message, seconds)
