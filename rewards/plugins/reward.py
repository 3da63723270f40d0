"""`PluginReward`: runs a user's function in a process of its own (or inline) and turns every fault
of it into a verdict."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..inputs import Reward, RewardInput
from ..verdict import Status, Verdict, not_applicable, verifier_error
from ..worker_pool import Answer, Ended, WorkerPool
from .loading import describe, import_function
from .styles import Adapted, adapt

ISOLATION = ("process", "inline")


class PluginReward(Reward):
    """The reward of `target` (`package.module:function` or `./file.py:function`).

    `isolation="process"` (default): it runs in up to `concurrency` processes, which are killed if
    one call of the function takes more than `timeout` seconds; `"inline"`: in this process, for
    functions known to be quick and sound. A function that sets signal handlers (math_verify's
    limits do) needs a main thread, in which no grader runs; the trial detects that and gives it a
    process. `kwargs` go to every call of the function, or once to a class or factory. A fault of
    the plugin (it raises, hangs, returns no finite number) is `verifier_error` for the samples of
    that call; None is `not_applicable`. Raises ValueError if the function cannot be imported or
    called.
    """

    def __init__(
        self,
        target: str,
        *,
        style: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        concurrency: int = 2,
        isolation: str = "process",
        memory_bytes: int | None = None,
    ) -> None:
        if isolation not in ISOLATION:
            raise ValueError(
                f"isolation is {isolation!r}; it must be one of {', '.join(ISOLATION)}"
            )
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be positive seconds")
        self.target = target
        self.timeout = timeout
        self._inline: Adapted | None = None
        self._pool: WorkerPool | None = None
        self._workers = concurrency
        self._memory_bytes = memory_bytes
        self._setup: dict[str, Any] = {
            "target": target,
            "style": style,
            "keywords": dict(kwargs or {}),
        }
        if isolation == "inline":
            self._inline = make(**self._setup)
            self.style = self._inline.style
            self.batched = self._inline.batched
        else:
            self._start()

    def _start(self) -> None:
        """Starts the processes and asks one of them for the style of the function."""
        self._pool = WorkerPool(
            f"{__name__}:serve",
            self._setup,
            workers=self._workers,
            memory_bytes=self._memory_bytes,
            spare=False,
        )
        message = self._pool.check()
        if not message:
            described = self._pool.run(["describe"], self.timeout)[0]
            message = described.message if described.ended is not Ended.DONE else ""
        if message:
            self.close()
            raise ValueError(f"{self.target}: {message.removeprefix('ValueError: ')}")
        self.style = described.value["style"]
        self.batched = described.value["batched"]

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        calls = [list(batch)] if self.batched else [[row] for row in batch]
        verdicts: list[Verdict] = []
        for rows, answer in zip(calls, self._answers(calls), strict=True):
            verdicts += self._verdicts(rows, answer)
        return verdicts

    def trial(self, example: RewardInput) -> None:
        """Makes one call, with two completions if the function takes a batch: with one alone a
        function that returns a single result would pass. Raises ValueError if it fails or gives
        neither a score nor None."""
        if self._inline is not None and _needs_main_thread(self._inline, example, self.timeout):
            warnings.warn(
                f"{self.target} sets signal handlers, which only a main thread may: it runs in a"
                " process of its own, not inline",
                stacklevel=2,
            )
            self._inline = None
            self._start()
        for verdict in self([example, example] if self.batched else [example]):
            if verdict.status is not Status.VERIFIER_ERROR:
                continue
            raise ValueError(f"{verdict.message} (trial call on {example.completion[:80]!r})")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _answers(self, calls: Sequence[list[RewardInput]]) -> list[Answer]:
        if self._pool is not None:
            plain = [[replace(row, columns=dict(row.columns)) for row in rows] for rows in calls]
            return self._pool.run(plain, self.timeout)
        assert self._inline is not None
        answers = []
        for rows in calls:
            start = time.perf_counter()
            value = attempt(self._inline, rows)
            answers.append(Answer(Ended.DONE, value, seconds=time.perf_counter() - start))
        return answers

    def _verdicts(self, rows: Sequence[RewardInput], answer: Answer) -> list[Verdict]:
        seconds = answer.seconds / max(len(rows), 1)
        results = answer.value
        if answer.ended is not Ended.DONE:
            results = {"failed": answer.message or answer.ended.value}
        if isinstance(results, Mapping) and "failed" in results:
            return [verifier_error(f"{self.target}: {results['failed']}", seconds)] * len(rows)
        if not isinstance(results, list) or len(results) != len(rows):
            message = f"{self.target}: a reply of the wrong form"
            return [verifier_error(message, seconds)] * len(rows)
        return [self._verdict(one, seconds) for one in results]

    def _verdict(self, given: Any, seconds: float) -> Verdict:
        """The verdict of a reply, which is untrusted: a plugin may have written to the socket
        itself."""
        try:
            if given.get("none") is True:
                return not_applicable(f"{self.target} returned None", seconds)
            if given.get("score") is None:
                message = given.get("error") or given.get("message") or "no finite score"
                return verifier_error(f"{self.target}: {message}", seconds)
            score = float(given["score"])
            return Verdict(
                status=Status(given.get("status") or status_of(score, given.get("right"))),
                score=score,
                parts={str(k): float(v) for k, v in given.get("parts", {}).items()},
                message=str(given.get("message", "")),
                seconds=seconds,
            )
        except (ValueError, TypeError, OverflowError, AttributeError, AssertionError) as error:
            return verifier_error(f"{self.target}: a bad reply: {error}", seconds)


def make(target: str, style: str | None, keywords: Mapping[str, Any]) -> Adapted:
    """The function of `target`, ready to be called. Raises the ValueErrors of `import_function` and
    `adapt`."""
    return adapt(import_function(target), style, keywords)


def serve(target: str, style: str | None, keywords: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The function of a worker: answers "describe" with the style of the function, and a batch with
    its results."""
    adapted = make(target, style, keywords)

    def answer(task: str | list[RewardInput]) -> Any:
        if isinstance(task, str):
            return {"style": adapted.style, "batched": adapted.batched, "pid": os.getpid()}
        return attempt(adapted, task)

    return answer


_told: set[str] = set()
"""Places of errors whose traceback has been printed to stderr."""


def attempt(adapted: Adapted, rows: Sequence[RewardInput]) -> Any:
    """The results of one call, or `{"failed": reason}` with the user's file and line; prints the
    traceback once."""
    try:
        return adapted(rows)
    # the worker reports a MemoryError as such and ends (`worker_process.main`)
    except (MemoryError, KeyboardInterrupt):
        raise
    # untrusted, and time limits of libraries derive from BaseException
    except BaseException as error:
        message = describe(error)
        place = message.rpartition("(")[2]
        if place not in _told:
            _told.add(place)
            traceback.print_exception(error, file=sys.stderr)
        return {"failed": message}


def status_of(score: float, right: bool | None = None) -> Status:
    """The status of a score. `right`: whether the function calls the answer right, if the score
    contains more than that."""
    if score >= 1 if right is None else right:
        return Status.CORRECT
    return Status.WRONG if score <= 0 else Status.PARTIAL


def _needs_main_thread(adapted: Adapted, example: RewardInput, timeout: float) -> bool:
    """Whether the function sets a signal handler when it is called in a thread, as graders call it.
    Raises ValueError if it hangs."""
    real, used = signal.signal, threading.Event()

    def noted(*arguments: Any) -> Any:
        if threading.current_thread() is thread:
            used.set()
        return real(*arguments)

    thread = threading.Thread(target=lambda: attempt(adapted, [example]), daemon=True)
    signal.signal = noted  # type: ignore[assignment]
    try:
        thread.start()
        thread.join(timeout)
    finally:
        signal.signal = real
    if thread.is_alive():
        raise ValueError(
            f"{adapted.function!r}: stopped at the limit of {timeout:g} s (trial call)"
        )
    return used.is_set()
