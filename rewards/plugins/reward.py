"""`PluginReward`: a function that is not ours, called in its own process (or inline), whose every fault is a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..inputs import RewardInput
from ..verdict import Status, Verdict, verifier_error
from ..worker_pool import Answer, Ended, WorkerPool
from .styles import Adapted, adapt, import_function

ISOLATION = ("process", "inline")


class PluginReward:
    """`target` (`package.module:function` or `./file.py:function`) as a reward.

    `isolation="process"` (default): it runs in up to `concurrency` processes that are killed when one call of the
    function takes more than `timeout` seconds; `"inline"`: in this process, for functions known to be quick and sound.
    A fault of the plugin (it raises, hangs, returns no finite number) is `verifier_error` for the samples of that call.
    Raises ValueError at once if the function cannot be imported or called.
    """

    def __init__(
        self,
        target: str,
        *,
        style: str | None = None,
        timeout: float = 60.0,
        concurrency: int = 2,
        isolation: str = "process",
        memory_bytes: int | None = None,
    ) -> None:
        if isolation not in ISOLATION:
            raise ValueError(f"isolation is {isolation!r}; it must be one of {', '.join(ISOLATION)}")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be positive seconds")
        self.target, self.timeout = target, timeout
        self._inline: Adapted | None = None
        self._pool: WorkerPool | None = None
        if isolation == "inline":
            self._inline = adapt(import_function(target), style)
            self.style, self.batched = self._inline.style, self._inline.batched
            return
        self._pool = WorkerPool(
            f"{__name__.rpartition('.')[0]}.styles:serve",
            {"target": target, "style": style},
            workers=concurrency,
            memory_bytes=memory_bytes,
            spare=False,
        )
        if failure := self._pool.check():
            self._pool.close()
            raise ValueError(f"{target}: {failure}")
        described = self._pool.run(["describe"], timeout)[0]
        if described.ended is not Ended.DONE:
            self._pool.close()
            raise ValueError(f"{target}: {described.message}")
        self.style, self.batched = described.value["style"], described.value["batched"]

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        calls = [list(batch)] if self.batched else [[row] for row in batch]
        verdicts: list[Verdict] = []
        for rows, answer in zip(calls, self._answers(calls), strict=True):
            verdicts += self._verdicts(rows, answer)
        return verdicts

    def trial(self, example: RewardInput) -> None:
        """One call. Raises ValueError if that gives no score."""
        (verdict,) = self([example])
        if verdict.score is None:
            raise ValueError(f"{verdict.message} (trial call on {example.completion[:80]!r})")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _answers(self, calls: Sequence[list[RewardInput]]) -> list[Answer]:
        if self._pool is not None:
            plain = [[replace(row, columns=dict(row.columns)) for row in rows] for rows in calls]
            return self._pool.run(plain, self.timeout)
        assert self._inline is not None
        found = []
        for rows in calls:
            start = time.perf_counter()
            try:
                value, message = self._inline(rows), ""
            except Exception as error:  # untrusted
                value, message = None, f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            found.append(Answer(Ended.RAISED if value is None else Ended.DONE, value, message, seconds))
        return found

    def _verdicts(self, rows: Sequence[RewardInput], answer: Answer) -> list[Verdict]:
        seconds = answer.seconds / max(len(rows), 1)
        if answer.ended is not Ended.DONE:
            failed = verifier_error(f"{self.target}: {answer.message or answer.ended.value}", seconds)
            return [failed] * len(rows)
        if not isinstance(answer.value, list) or len(answer.value) != len(rows):
            return [verifier_error(f"{self.target}: a reply of the wrong form", seconds)] * len(rows)
        return [self._verdict(found, seconds) for found in answer.value]

    def _verdict(self, found: Any, seconds: float) -> Verdict:
        if not isinstance(found, Mapping) or not isinstance(found.get("score"), (int, float)):
            message = found.get("error") or found.get("message") if isinstance(found, Mapping) else "a bad reply"
            return verifier_error(f"{self.target}: {message}", seconds)
        try:
            score = float(found["score"])
            parts = {str(k): float(v) for k, v in dict(found.get("parts") or {}).items()}
            status = Status(found.get("status", _status(score)))
        except (ValueError, TypeError, OverflowError) as error:  # a plugin may have written to the socket itself
            return verifier_error(f"{self.target}: a bad reply: {error}", seconds)
        if status is Status.VERIFIER_ERROR or not math.isfinite(score):
            return verifier_error(f"{self.target}: {found.get('message') or 'no finite score'}", seconds)
        message = str(found.get("message", ""))
        return Verdict(status=status, score=score, parts=parts, message=message, seconds=seconds)


def _status(score: float) -> Status:
    return Status.CORRECT if score >= 1 else Status.WRONG if score <= 0 else Status.PARTIAL
