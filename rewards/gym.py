"""`GymReward`: tasks of reasoning-gym, scored by their own scorers, inside the sandbox.

Some of those scorers evaluate the answer as Python, so the sandbox keeps them from the machine, and a character filter
keeps the answers of those tasks from being more than arithmetic: code could otherwise forge the score that it is given.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .inputs import RewardInput
from .math_answers.extract import extract
from .sandbox.pool import Limits, Outcome, Run, Sandbox, SandboxError
from .verdict import Status, Verdict, verifier_error

_ARITHMETIC = re.compile(r"[0-9+\-*/()., xX÷×=\[\]\n]{1,400}")
_EVALUATING = frozenset(("countdown", "puzzle24"))
"""Tasks whose scorers run the answer as an expression."""
TASKS = frozenset((
    "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum", "complex_arithmetic",
    "count_bits", "count_primes", "decimal_arithmetic", "decimal_chain_sum", "fraction_simplification", "gcd",
    "isomorphic_strings", "lcm", "leg_counting", "letter_counting", "number_filtering", "number_sequence", "number_sorting",
    "power_function", "prime_factorization", "products", "self_reference", "simple_equations",
    "simple_geometry", "spell_backward", "syllogism", "time_intervals", "word_sorting", *_EVALUATING,
))  # fmt: skip
"""Tasks whose scorer gives 1 to right answers only. Others may be allowed by name, with `tasks`."""
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


class GymReward:
    """1.0 where the task's scorer gives at least 0.999, else 0.0; with `binary=False` the scorer's own number.

    A row names its task in `columns["metadata"]["source_dataset"]` (as reasoning-gym's items do), else in its source.
    `tasks`: more task names to allow. Raises ValueError where reasoning-gym is missing, SandboxUnavailable without a
    sandbox.
    """

    def __init__(
        self, *, binary: bool = True, tasks: Sequence[str] = (), timeout: float = 5.0, concurrency: int = 2
    ) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("reward 'gym' needs reasoning-gym: pip install 'emberl[gym]'")
        self._binary, self._tasks = binary, TASKS | set(tasks)
        self._limits = Limits(seconds=timeout, memory_mb=2048)
        self._sandbox = Sandbox(workers=concurrency, preload=("reasoning_gym",))
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="gym")
        self._closed = threading.Event()

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return list(self._threads.map(self._grade, batch))

    def check_reference(self, row: RewardInput) -> str | None:
        task = _task(row)
        if task not in self._tasks:
            return f"the task {task!r} is not among those allowed; name it in options.tasks to allow it"
        return None

    def close(self) -> None:
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
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
        if task in _EVALUATING and _ARITHMETIC.fullmatch(answer) is None:
            return Verdict(status=Status.WRONG, score=0.0, message="not an arithmetic expression")
        entry = {"question": row.prompt, "answer": row.answer, "metadata": row.columns.get("metadata", {})}
        request = json.dumps([task, answer, entry], default=str).encode()
        try:
            run = self._sandbox.run_program(_SCORER, request, self._limits)
        except SandboxError as error:
            return verifier_error(f"gym: {error}", time.perf_counter() - start)
        return self._verdict(run, time.perf_counter() - start)

    def _verdict(self, run: Run, seconds: float) -> Verdict:
        if run.outcome in (Outcome.TIME_LIMIT, Outcome.MEMORY_LIMIT):
            return Verdict(
                status=Status.OVER_LIMIT, score=0.0, message=f"the scorer went over its {run.outcome}", seconds=seconds
            )
        try:
            score = float(json.loads(run.stdout))
        except (ValueError, TypeError):
            line = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return verifier_error(f"gym: the scorer failed: {line or run.outcome}", seconds)
        right = score >= 0.999
        value = float(right) if self._binary else min(max(score, 0.0), 1.0)
        status = Status.CORRECT if right else Status.PARTIAL if value > 0 else Status.WRONG
        return Verdict(status=status, score=value, seconds=seconds)


def _task(row: RewardInput) -> str:
    metadata: Any = row.columns.get("metadata")
    return str(metadata.get("source_dataset", row.source) if isinstance(metadata, dict) else row.source)
