"""`CodeReward`: runs a model's program against a data set's tests.

    reward = CodeReward(timeout=5.0)
    reward([RewardInput(completion="```python\\ndef add(a, b): return a + b\\n```",
                        columns={"test_list": ["assert add(2, 3) == 5"]})])[0].score    # 1.0

The expected answers stay here: the sandbox gets inputs, one call at a time, and gives plain values or bytes back.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.util
import json
import marshal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inputs import Reward, RewardInput
from ..sandbox.pool import COMPILER_LIMITS, Limits, Outcome, ProgramEnded, Run, Sandbox, SandboxError, Session, twice
from ..sandbox.runs import OVER_LIMIT
from ..sandbox.view import compiler
from ..verdict import Status, Verdict, verifier_error
from .compare import FLOAT_TOLERANCE, Reply, equal, is_plain, parse_reply, printable, same_output, without_tuples
from .extract import Program, completed, extract_program
from .plans import Call, FunctionPlan, JudgePlan, Plan, ProgramPlan
from .references import solutions_of
from .tests import plan_of

if TYPE_CHECKING:
    from ..sandbox.remote import RemoteSandbox, RemoteSession

_HERE = Path(__file__).resolve().parent
_MOST_OUTPUT = 1 << 28


class CodeReward(Reward):
    """Scores 1 if every test passes, else 0; with `partial`, the fraction that passes. Thread-safe.

    Tests: whatever `plan_of` reads from `columns` or `answer`. Programs are Python, or C++ where stdin and stdout are
    tested (`language` "cpp", or "auto" with a C++ fence). `packages`: installed packages that programs may import, for
    example `["numpy"]`; tests may import numpy and these. `timeout` (s), `memory_mb` and `output_bytes` (see `Limits`;
    more where a test expects more) hold for a function's calls together and for each run of a program; `total_seconds`
    for all runs of one completion, `compile_seconds` for the compiler, `reference_seconds` for all runs of
    `check_references`. `concurrency`: runs at the same time, by default one a core. `url`: a remote sandbox in
    the place of this machine's (see `sandbox/remote.py`). Raises SandboxUnavailable, a ValueError, where the machine has
    no sandbox and `allow_unsafe` is not set.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory_mb: int = 512,
        output_bytes: int = 8 << 20,
        concurrency: int | None = None,
        partial: bool = False,
        float_tolerance: float = FLOAT_TOLERANCE,
        language: str = "auto",
        packages: Sequence[str] = (),
        total_seconds: float = 60.0,
        compile_seconds: float = COMPILER_LIMITS.seconds,
        reference_seconds: float = 600.0,
        max_code_chars: int = 100_000,
        backend: str | None = None,
        allow_unsafe: bool = False,
        url: str | None = None,
    ) -> None:
        if language not in ("auto", "python", "cpp"):
            raise ValueError(f"language is {language!r}; use 'auto', 'python' or 'cpp'")
        if url is not None and (backend is not None or allow_unsafe):
            raise ValueError("url names a remote sandbox; backend and allow_unsafe are for one on this machine")
        if language == "cpp" and compiler() is None and url is None:
            raise ValueError("language 'cpp' needs g++ (apt install g++)")
        if not float_tolerance >= 0 or not total_seconds > 0:
            raise ValueError(
                f"float_tolerance ({float_tolerance}) and total_seconds ({total_seconds}) must be positive"
            )
        if isinstance(packages, str) or (missing := [name for name in packages if not _installed(name)]):
            wrong = repr(packages) if isinstance(packages, str) else ", ".join(missing)
            raise ValueError(f"packages: {wrong} is no list of installed packages; give e.g. ['numpy']")
        self.limits = Limits(seconds=timeout, memory_mb=memory_mb, output_bytes=output_bytes)
        self.partial, self.tolerance, self.language = partial, float_tolerance, language
        self.compiler_limits = dataclasses.replace(COMPILER_LIMITS, seconds=compile_seconds)
        self.total_seconds, self.max_code_chars = total_seconds, max_code_chars
        self.packages, self.reference_seconds = tuple(packages), reference_seconds
        self._start: Callable[..., Sandbox | RemoteSandbox]
        if url is not None:
            from ..sandbox.remote import RemoteSandbox  # needs httpx, which no sandbox of our own does

            self._start = functools.partial(RemoteSandbox, url, workers=concurrency)
        else:
            self._start = functools.partial(Sandbox, workers=concurrency, backend=backend, allow_unsafe=allow_unsafe)
        self.sandbox = self._start(preload=self.packages)
        self._judges: dict[tuple[str, ...], Sandbox | RemoteSandbox] = {}
        self._lock = threading.Lock()

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        if len(batch) == 1:
            return [self._grade(batch[0])]
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            return list(pool.map(self._grade, batch))

    @property
    def finished(self) -> int:
        """Runs so far: while it grows, a batch is under way however long it takes."""
        return self.sandbox.finished + sum(judge.finished for judge in list(self._judges.values()))

    def check_reference(self, row: RewardInput) -> str | None:
        """What is wrong with a row's tests, without running anything, or None."""
        try:
            self._plan(row)
        except ValueError as error:
            return str(error)
        return None

    def check_references(self, rows: Sequence[RewardInput]) -> list[str | None]:
        """What is wrong with each row's tests, or None: they cannot be graded, or refuse the row's own solution.

        Rows whose turn has not come after `reference_seconds` are not run, and a warning says how many."""
        found = [self.check_reference(row) for row in rows]
        own = [(i, texts) for i, row in enumerate(rows) if found[i] is None and (texts := solutions_of(row.columns))]
        end, late = time.monotonic() + self.reference_seconds, 0
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            runs = [(i, pool.submit(self._refused, rows[i], texts, end)) for i, texts in own]
            for i, run in runs:
                refusal = run.result()
                late += refusal is None
                found[i] = refusal or None
        if late:
            warnings.warn(
                f"{late} of {len(own)} reference solutions were not run within reference_seconds="
                f"{self.reference_seconds:g}; raise it to prove all tests before training",
                stacklevel=2,
            )
        return found

    def _refused(self, row: RewardInput, solutions: Sequence[str], end: float) -> str | None:
        """Why the row's tests accept none of its solutions; empty if they do, None if the time is over."""
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
        self.sandbox.close()
        for judge in self._judges.values():
            judge.close()

    def _plan(self, row: RewardInput) -> Plan:
        """The row's plan, if the packages that it needs are in sight."""
        plan = plan_of(row.columns, row.answer)
        if isinstance(plan, ProgramPlan):
            return plan
        used = set(plan.packages) - {"numpy"} if isinstance(plan, JudgePlan) else set()
        if missing := sorted((used | set(plan.needs)) - set(self.packages)):
            raise ValueError(
                f"the tests import {', '.join(missing)}: name what is installed in options.packages={[*self.packages, *missing]}"
            )
        return plan

    def _grade(self, item: RewardInput) -> Verdict:
        start = time.perf_counter()

        def verdict(status: Status, score: float, message: str) -> Verdict:
            return Verdict(status=status, score=score, message=message, seconds=time.perf_counter() - start)

        try:
            plan = self._plan(item)
        except ValueError as error:
            return verifier_error(f"tests: {error}", time.perf_counter() - start)
        language = self.language if isinstance(plan, ProgramPlan) else "python"
        program = extract_program(item.completion, language, plan.entries)
        if program is None or len(program.source) > self.max_code_chars:
            why = (
                "no program in the answer" if program is None else f"more than {self.max_code_chars} characters of code"
            )
            return verdict(Status.UNPARSEABLE, 0.0, why)
        try:
            result = self._tested(plan, program)
        except SandboxError as error:
            return verifier_error(f"sandbox: {error}", time.perf_counter() - start)
        if result.unreadable and not program.fenced:
            return verdict(Status.UNPARSEABLE, 0.0, "no program in the answer")
        if result.passed == result.total:
            return verdict(Status.CORRECT, 1.0, "")
        if self.partial and result.passed:
            return verdict(Status.PARTIAL, result.passed / result.total, result.message)
        return verdict(Status.OVER_LIMIT if result.over_limit else Status.WRONG, 0.0, result.message)

    def _tested(self, plan: Plan, program: Program) -> Result:
        """A killed fork server costs a second try, not the sample."""
        if isinstance(plan, ProgramPlan):
            return self._run_program(plan, program)
        action: Callable[[], Result]
        if isinstance(plan, FunctionPlan):
            action = functools.partial(self._call_function, plan, program)
        else:
            action = functools.partial(self._judged, plan, program)
        return twice(action)

    # --- functions

    def _call_function(self, plan: FunctionPlan, program: Program) -> Result:
        total, passed, failure = len(plan.calls), 0, Result(0, 1, "")
        request = {"task": "calls", "code": _parts(plan, program), "usual": plan.usual}
        calls = [{"eval": call.source} for call in plan.calls]
        longest = max(len(str(call.expected)) for call in plan.calls)
        try:
            with self.sandbox.session(request, self._room(longest), first=calls[0], upcoming=calls[1:]) as talk:
                if (loaded := parse_reply(talk.receive())).error:
                    return _raised(loaded, total)
                for number, call in enumerate(plan.calls):
                    if number:
                        talk.send({"eval": call.source})
                    reply = parse_reply(talk.receive())
                    if self._right(call, plan.from_json, reply):
                        passed += 1
                        continue
                    failure = (
                        _raised(reply, total)
                        if reply.error
                        else Result(0, total, f"wrong value of {call.source[:200]}")
                    )
                    if not self.partial:
                        break
        except ProgramEnded as end:
            failure = _ended(end.run, total)
        return Result(passed, total, failure.message, failure.over_limit, failure.unreadable)

    def _right(self, call: Call, from_json: bool, reply: Reply) -> bool:
        if reply.error:
            return False
        try:
            if not is_plain(reply.value):
                return False
            value = without_tuples(reply.value) if from_json else reply.value
            if call.identical and type(value) is not type(call.expected):
                return False
            if equal(call.expected, value, self.tolerance):
                return True
            return call.wrapped and equal(call.expected[0], value, self.tolerance)
        except RecursionError:  # nested beyond all reason
            return False

    def _room(self, expected: int) -> Limits:
        """The limits, with room for an output as large as the expected one."""
        most = min(max(self.limits.output_bytes, 2 * expected + 4096), _MOST_OUTPUT)
        return dataclasses.replace(self.limits, output_bytes=most)

    def _judged(self, plan: JudgePlan, program: Program) -> Result:
        """Runs the data set's test code in its own sandbox; what it asks of the model's code goes to the other one."""
        with self._lock:
            packages = tuple(sorted({*self.packages, *plan.packages}))
            if packages not in self._judges:
                self._judges[packages] = self._start(preload=packages)
            judges = self._judges[packages]
        seen = {"named": list(plan.names), "shared": plan.shared, "printing": plan.printing}
        test = {
            "task": "library",
            "library": _library("wire", "judge"),
            "setup": plan.setup,
            "names": dict(plan.names),
            "modules": plan.modules,
            "stubs": {name: (_HERE / f"{name}_stub.py").read_text() for name in plan.stubs},
            "test": plan.test,
            "collect": plan.collect,
            "partial": self.partial,
        }
        code = {
            "task": "library",
            "library": _library("wire", "host"),
            "code": _parts(plan, program),
            "usual": plan.usual,
            "extras": plan.extras,
        }
        patience = Limits(seconds=3 * self.limits.seconds + 5.0, output_bytes=self.limits.output_bytes)
        with judges.session(test | seen, patience) as judge:
            try:
                with self.sandbox.session(code | seen, self.limits) as talk:
                    if (first := parse_reply(talk.receive())).error:
                        return _raised(first, 1)
                    return _relay(judge, talk)
            except ProgramEnded as end:
                return _ended(end.run, 1)

    # --- programs

    def _run_program(self, plan: ProgramPlan, program: Program) -> Result:
        total, passed, message, over = len(plan.cases), 0, "", False
        run: Callable[..., Run]
        if program.language == "cpp":
            binary, compilation = self.sandbox.compile_cpp(program.source, self.compiler_limits)
            if compilation.exit_code or not binary:
                first = compilation.stderr.decode("utf-8", "replace").partition("error:")[2].partition("\n")[0]
                over = compilation.outcome in OVER_LIMIT
                return Result(0, total, f"does not compile: {printable(first) or compilation}", over)
            run = functools.partial(self.sandbox.run_native, binary)
        else:
            run = functools.partial(self.sandbox.run_program, program.source, usual=True)
        spent, start = 0.0, time.monotonic()  # processor time: a loaded machine changes no verdict
        for number, (given, wanted) in enumerate(plan.cases):
            if spent > self.total_seconds or time.monotonic() - start > 10 * self.total_seconds:
                return Result(passed, total, f"over {self.total_seconds:g} s for all inputs", True)
            done = run(given.encode("utf-8", "surrogatepass"), limits=self._room(len(wanted)))
            spent += done.cpu_seconds
            good = done.outcome is Outcome.EXITED and done.exit_code == 0
            if good and same_output(wanted, done.stdout, self.tolerance):
                passed += 1
                continue
            last = printable(done.stderr.rstrip().rpartition(b"\n")[2].decode("utf-8", "replace"))
            over = done.outcome in OVER_LIMIT
            message = f"input {number}: " + ("wrong output" if good else f"{done} {last}".rstrip())
            if last.startswith(("SyntaxError", "IndentationError")):
                return Result(0, total, message, unreadable=True)
            if not self.partial:
                break
        return Result(passed, total, message, over)


@dataclass(frozen=True, slots=True)
class Result:
    """How many tests passed, and why the last that failed did."""

    passed: int
    total: int
    message: str
    over_limit: bool = False
    unreadable: bool = False


def _raised(reply: Reply, total: int) -> Result:
    unreadable = reply.error in ("SyntaxError", "IndentationError", "TabError")
    return Result(0, total, f"{reply.error}: {reply.text}".strip(": "), reply.error == "MemoryError", unreadable)


def _ended(run: Run, total: int) -> Result:
    return Result(0, total, f"ended instead of answering: {run}", run.outcome in OVER_LIMIT)


def _relay(judge: Session | RemoteSession, talk: Session | RemoteSession) -> Result:
    """Carries the lines of judge and model to each other until the judge has its verdict. Raises ProgramEnded for the
    model's program, SandboxError where the test itself is at fault."""
    while True:
        try:
            line = judge.receive()  # from the data set's own code
        except ProgramEnded as end:
            return _bomb(end)
        if line.startswith((b'{"verdict"', b'{"broken"')):
            return _result(json.loads(line))
        talk.relay(line)
        answer = talk.receive()
        try:
            judge.relay(answer)
        except ProgramEnded as end:
            return _bomb(end)


def _bomb(end: ProgramEnded) -> Result:
    """The judge's end without a verdict: it holds nothing but the test and the model's values."""
    return Result(0, 1, f"the test ended on the returned value: {end}", end.run.outcome in OVER_LIMIT)


def _result(message: dict[str, Any]) -> Result:
    if "broken" in message:
        raise SandboxError(f"the test code does not work: {message['broken']}")
    verdict = message["verdict"]
    failed = verdict["failed"]
    if not failed and not verdict["asked"]:
        raise SandboxError("the test code does not work: it calls no tested function")
    why = f"the test failed: {printable(failed['error'])} {printable(failed['text'])}".rstrip() if failed else ""
    over = bool(failed) and failed["error"] == "MemoryError"
    return Result(verdict["passed"], verdict["total"], why, over)


def _installed(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(name) is not None


def _parts(plan: FunctionPlan | JudgePlan, program: Program) -> list[str]:
    source = completed(program.source, plan.entry, plan.prompt)
    return [part for part in (plan.before, source, plan.after) if part.strip()]


@functools.cache
def _library(*names: str) -> list[tuple[str, str]]:
    """Files of this folder as compiled code, for a child to run."""
    codes = [(name, compile((_HERE / f"{name}.py").read_text(), f"<{name}>", "exec")) for name in names]
    return [(name, base64.b64encode(marshal.dumps(code)).decode()) for name, code in codes]
