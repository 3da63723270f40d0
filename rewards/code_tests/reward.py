"""`CodeReward`: runs a model's program against a data set's tests.

reward = CodeReward(timeout=5.0)
reward([RewardInput(completion="```python\\ndef add(a, b): return a + b\\n```",
                    columns={"test_list": ["assert add(2, 3) == 5"]})])[0].score    # 1.0
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..inputs import Reward, RewardInput
from ..sandbox.pool import COMPILER_LIMITS, Limits, Sandbox, SandboxError
from ..sandbox.view import compiler
from ..verdict import Status, Verdict, verifier_error
from .compare import FLOAT_TOLERANCE
from .extract import extract_program
from .plans import JudgePlan, Plan, ProgramPlan
from .running import Tester
from .solutions import solutions_of
from .tests import plan_of

if TYPE_CHECKING:
    from ..sandbox.remote import RemoteSandbox


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeOptions:
    """The options of `code`. Raises ValueError for one that is invalid."""

    timeout: float = 5.0
    """Processor seconds of all calls of a function together, and of each run of a program
    (`Limits`)."""
    memory_mb: int = 512
    """Their memory in MiB."""
    output_bytes: int = 8 << 20
    """Most bytes of their output; a test that expects more allows more."""
    concurrency: int | None = None
    """Concurrent runs; None: one per core."""
    partial: bool = False
    """Whether a program that fails some tests scores the fraction that it passes."""
    float_tolerance: float = FLOAT_TOLERANCE
    """Largest difference from an expected number, relative to the larger of that number and 1."""
    language: str = "auto"
    """Language of programs on stdin and stdout: python, cpp, or auto (C++ if the fence is tagged
    so)."""
    packages: Sequence[str] = ()
    """Installed packages that programs may import, e.g. [numpy]; tests may import these and
    numpy."""
    total_seconds: float = 60.0
    """Processor seconds of all runs of one completion."""
    compile_seconds: float = COMPILER_LIMITS.seconds
    """Processor seconds of the compiler."""
    reference_seconds: float = 600.0
    """Wall seconds of all runs of `check_references`."""
    max_code_chars: int = 100_000
    """A program of more characters is not run."""
    backend: str | None = None
    """The sandbox's back end; None: the first that works on this machine."""
    allow_unsafe: bool = False
    """Whether programs run without a sandbox if the machine supports none."""
    url: str | None = None
    """Address of a remote sandbox to use instead of a local one (`sandbox/remote.py`)."""

    def __post_init__(self) -> None:
        if self.url is not None and (self.backend is not None or self.allow_unsafe):
            raise ValueError(
                "url names a remote sandbox; backend and allow_unsafe are for one on this machine"
            )
        _check_language(self.language, remote=self.url is not None)
        if not self.float_tolerance >= 0 or not self.total_seconds > 0:
            raise ValueError(
                f"float_tolerance ({self.float_tolerance}) and total_seconds"
                f" ({self.total_seconds}) must be positive"
            )
        _check_packages(self.packages)


class CodeReward(Reward):
    """Scores 1 if every test passes, else 0; with `partial`, the fraction of tests that pass.
    Thread-safe. Its keywords are `CodeOptions`.

    Tests are what `plan_of` reads from `columns` or `answer`. Programs are Python, or C++ if stdin
    and stdout are tested. Raises SandboxUnavailable, a ValueError, where the machine has no sandbox
    and `allow_unsafe` is not set.
    """

    Options = CodeOptions

    def __init__(self, **keywords: Any) -> None:
        options = CodeOptions(**keywords)
        self.limits = Limits(
            seconds=options.timeout,
            memory_mb=options.memory_mb,
            output_bytes=options.output_bytes,
        )
        self.compiler_limits = dataclasses.replace(COMPILER_LIMITS, seconds=options.compile_seconds)
        self.partial = options.partial
        self.language = options.language
        self.max_code_chars = options.max_code_chars
        self.packages = tuple(options.packages)
        self.reference_seconds = options.reference_seconds
        start: Callable[..., Sandbox | RemoteSandbox]
        if options.url is not None:
            # needs httpx, which no sandbox of our own does
            from ..sandbox.remote import RemoteSandbox

            start = functools.partial(RemoteSandbox, options.url, workers=options.concurrency)
        else:
            start = functools.partial(
                Sandbox,
                workers=options.concurrency,
                backend=options.backend,
                allow_unsafe=options.allow_unsafe,
            )
        self.tester = Tester(
            start,
            self.packages,
            limits=self.limits,
            compiler_limits=self.compiler_limits,
            total_seconds=options.total_seconds,
            tolerance=options.float_tolerance,
            partial=self.partial,
        )
        self.sandbox = self.tester.sandbox

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        if len(batch) == 1:
            return [self._grade(batch[0])]
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            return list(pool.map(self._grade, batch))

    @property
    def finished(self) -> int:
        """Number of runs so far; as long as it grows, a batch is not stuck."""
        return self.tester.finished

    def check_reference(self, row: RewardInput) -> str | None:
        """The fault of a row's tests, which are not run for it; None if there is none."""
        try:
            self._plan(row)
        except ValueError as error:
            return str(error)
        return None

    def check_references(self, rows: Sequence[RewardInput]) -> list[str | None]:
        """The fault of each row's tests, None if there is none: they cannot be graded, or they
        refuse the row's own solution.

        Rows that are not reached within `reference_seconds` are not run; a warning gives their
        number.
        """
        faults = [self.check_reference(row) for row in rows]
        own = [
            (i, texts)
            for i, row in enumerate(rows)
            if faults[i] is None and (texts := solutions_of(row.columns))
        ]
        end, late = time.monotonic() + self.reference_seconds, 0
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            runs = [(i, pool.submit(self._refused, rows[i], texts, end)) for i, texts in own]
            for i, run in runs:
                refusal = run.result()
                late += refusal is None
                faults[i] = refusal or None
        if late:
            warnings.warn(
                f"{late} of {len(own)} reference solutions were not run within reference_seconds="
                f"{self.reference_seconds:g}; raise it to prove all tests before training",
                stacklevel=2,
            )
        return faults

    def _refused(self, row: RewardInput, solutions: Sequence[str], end: float) -> str | None:
        """Why the row's tests accept none of its solutions; empty if they accept one, None if the
        time is over."""
        first = ""
        for solution in solutions:
            if time.monotonic() > end:
                return None
            verdict = self._grade(dataclasses.replace(row, completion=solution))
            if verdict.status is Status.CORRECT:
                return ""
            first = first or f"its own solution is refused: {verdict.status}: {verdict.message}"
        return first

    def trial(self, row: RewardInput) -> None:
        """Raises ValueError if the row's tests cannot be read or the sandbox does not run."""
        self._plan(row)
        if (run := self.sandbox.run_program("print(6 * 7)")).stdout != b"42\n":
            raise ValueError(f"the sandbox ({self.sandbox.backend}) does not run programs: {run}")

    def close(self) -> None:
        self.tester.close()

    def _plan(self, row: RewardInput) -> Plan:
        """The plan of a row. Raises ValueError if there is none, or if it needs packages that are
        not visible."""
        plan = plan_of(row.columns, row.answer)
        if isinstance(plan, ProgramPlan):
            return plan
        # 163 of the 164 tests of HumanEval+ import numpy, which the program itself does not need
        used = set(plan.packages) - {"numpy"} if isinstance(plan, JudgePlan) else set()
        if missing := sorted((used | set(plan.needs)) - set(self.packages)):
            raise ValueError(
                f"the tests import {', '.join(missing)}: name what is installed in"
                f" options.packages={[*self.packages, *missing]}"
            )
        return plan

    def _grade(self, item: RewardInput) -> Verdict:
        start = time.perf_counter()

        def verdict(status: Status, score: float, message: str) -> Verdict:
            return Verdict(
                status=status, score=score, message=message, seconds=time.perf_counter() - start
            )

        try:
            plan = self._plan(item)
        except ValueError as error:
            return verifier_error(f"tests: {error}", time.perf_counter() - start)
        language = self.language if isinstance(plan, ProgramPlan) else "python"
        program = extract_program(item.completion, language, plan.entries)
        if program is None or len(program.source) > self.max_code_chars:
            why = (
                "no program in the answer"
                if program is None
                else f"more than {self.max_code_chars} characters of code"
            )
            return verdict(Status.UNPARSEABLE, 0.0, why)
        try:
            result = self.tester.test(plan, program)
        except SandboxError as error:
            return verifier_error(f"sandbox: {error}", time.perf_counter() - start)
        # prose that was taken for code, as there were no fences
        if result.unreadable and not program.fenced:
            return verdict(Status.UNPARSEABLE, 0.0, "no program in the answer")
        if result.passed == result.total:
            return verdict(Status.CORRECT, 1.0, "")
        if self.partial and result.passed:
            return verdict(Status.PARTIAL, result.passed / result.total, result.message)
        return verdict(
            Status.OVER_LIMIT if result.over_limit else Status.WRONG, 0.0, result.message
        )


def _check_language(language: str, *, remote: bool) -> None:
    if language not in ("auto", "python", "cpp"):
        raise ValueError(f"language is {language!r}; use 'auto', 'python' or 'cpp'")
    if language == "cpp" and compiler() is None and not remote:
        raise ValueError("language 'cpp' needs g++ (apt install g++)")


def _check_packages(packages: Sequence[str]) -> None:
    if isinstance(packages, str):
        wrong = repr(packages)
    else:
        wrong = ", ".join(
            name
            for name in packages
            if not name.isidentifier() or importlib.util.find_spec(name) is None
        )
    if wrong:
        raise ValueError(f"packages: {wrong} is no list of installed packages; give e.g. ['numpy']")
