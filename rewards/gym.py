"""`GymReward`: tasks of reasoning-gym, compared exactly if they have a single right value
(`gym_answers.py`), else scored by the package inside the sandbox."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .gym_answers import EXACT, REFUSED, is_right
from .inputs import Reward, RewardInput
from .math_answers.extract import extract
from .sandbox.pool import Limits, Run, Sandbox, SandboxError
from .sandbox.runs import OVER_LIMIT
from .verdict import Status, Verdict, verifier_error

TASKS = frozenset(EXACT)
"""Tasks that are always allowed: only right answers score 1. Others can be allowed by name, with
`tasks`."""
_SCORER = """
import json, sys
from reasoning_gym import get_score_answer_fn
task, answer, entry = json.load(sys.stdin)
scorer = get_score_answer_fn(task)
try:
    score = scorer(answer=answer, entry=entry)
except Exception:  # what the scorer cannot read is no right answer
    score = 0.0
sys.stdout.write(json.dumps(float(score)))
"""


class GymReward(Reward):
    """1.0 for a right answer, else 0.0. With `binary=False`, a task that is allowed by name gets
    the score of its scorer.

    A row names its task in `columns["metadata"]["source_dataset"]`, as reasoning-gym's items do,
    else by its source. `tasks`: names of further tasks to allow, scored by the package (right from
    0.999 on). Raises ValueError for those whose scorer cannot be trusted, or if reasoning-gym is
    missing for them; SandboxUnavailable if there is no sandbox for them.
    """

    def __init__(
        self,
        *,
        binary: bool = True,
        tasks: Sequence[str] = (),
        timeout: float = 5.0,
        concurrency: int = 2,
    ) -> None:
        for task in tasks:
            if task in REFUSED:
                raise ValueError(
                    f"options.tasks allows {task!r}, which cannot be graded: {REFUSED[task]}"
                )
        self._binary = binary
        self._tasks = TASKS | set(tasks)
        self._limits = Limits(seconds=timeout, memory_mb=2048)
        self._sandbox: Sandbox | None = None
        if set(tasks) - TASKS:
            if importlib.util.find_spec("reasoning_gym") is None:
                raise ValueError(
                    "reward 'gym' needs reasoning-gym for options.tasks: pip install 'emberl[gym]'"
                )
            self._sandbox = Sandbox(workers=concurrency, preload=("reasoning_gym",))
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="gym")

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return list(self._threads.map(self._grade, batch))

    @property
    def finished(self) -> int:
        """Number of scorer runs so far; as long as it grows, a batch is not stuck."""
        return self._sandbox.finished if self._sandbox is not None else 0

    def check_reference(self, row: RewardInput) -> str | None:
        task = _task(row)
        if task in REFUSED:
            return f"the task {task!r} cannot be graded: {REFUSED[task]}"
        if task not in self._tasks:
            return (
                f"the task {task!r} is not among those allowed; name it in options.tasks to"
                " allow it"
            )
        # Many solve a countdown: data sets give its target in place of an answer.
        if task == "countdown" and row.answer == str(_entry(row)["metadata"].get("target")):
            return None
        if task in EXACT and not is_right(task, row.answer, _entry(row)):
            return (
                f"the reference {row.answer[:80]!r} is no answer to a problem of the task {task!r}"
            )
        return None

    def trial(self, row: RewardInput) -> None:
        """Raises ValueError if problems of the row's task cannot be graded."""
        if (message := self.check_reference(row)) is not None:
            raise ValueError(message)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            self._sandbox.close()

    def _grade(self, row: RewardInput) -> Verdict:
        start = time.perf_counter()
        task = _task(row)
        if task not in self._tasks:
            return verifier_error(f"gym: the task {task!r} is not among those allowed")
        candidates = extract(row.completion, row.prompt.rstrip().endswith("<think>")).candidates
        if len(candidates) != 1:
            status = Status.WRONG if candidates else Status.UNPARSEABLE
            return Verdict(status=status, score=0.0, message=f"{len(candidates)} answers found")
        answer = candidates[0].strip()
        if task in EXACT:
            right = is_right(task, answer, _entry(row))
            status = Status.CORRECT if right else Status.WRONG
            return Verdict(status=status, score=float(right), seconds=time.perf_counter() - start)
        assert self._sandbox is not None, "tasks beyond the exact ones have a sandbox"
        request = json.dumps([task, answer, _entry(row)], default=str).encode()
        try:
            run = self._sandbox.run_program(_SCORER, request, self._limits)
        except SandboxError as error:
            return verifier_error(f"gym: {error}", time.perf_counter() - start)
        return self._verdict(run, time.perf_counter() - start)

    def _verdict(self, run: Run, seconds: float) -> Verdict:
        if run.outcome in OVER_LIMIT:
            message = f"the scorer went over its {run.outcome}"
            return Verdict(status=Status.OVER_LIMIT, score=0.0, message=message, seconds=seconds)
        try:
            score = float(json.loads(run.stdout))
        except (ValueError, TypeError):
            line = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return verifier_error(f"gym: the scorer failed: {line or run.outcome}", seconds)
        right = score >= 0.999
        value = float(right) if self._binary else min(max(score, 0.0), 1.0)
        status = Status.CORRECT if right else Status.PARTIAL if value > 0 else Status.WRONG
        return Verdict(status=status, score=value, seconds=seconds)


def _entry(row: RewardInput) -> dict[str, Any]:
    return {
        "question": row.prompt,
        "answer": row.answer,
        "metadata": row.columns.get("metadata", {}),
    }


def _task(row: RewardInput) -> str:
    metadata: Any = row.columns.get("metadata")
    return str(
        metadata.get("source_dataset", row.source) if isinstance(metadata, dict) else row.source
    )
