"""`CodeReward`: runs a model's program against a data set's tests.

    reward = CodeReward(timeout=5.0)
    reward([RewardInput(completion="```python\\ndef add(a, b): return a + b\\n```",
                        columns={"test_list": ["assert add(2, 3) == 5"]})])[0].score    # 1.0

The expected answers stay here: the sandbox gets inputs, one call at a time, and gives plain values or bytes back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..inputs import RewardInput
from ..sandbox.pool import COMPILER_LIMITS, Limits, Outcome, ProgramEnded, Run, Sandbox, SandboxError, Session, twice
from ..sandbox.remote import RemoteSandbox, RemoteSession
from ..sandbox.runs import OVER_LIMIT
from ..sandbox.view import compiler
from ..verdict import Status, Verdict, verifier_error
from .compare import FLOAT_TOLERANCE, Reply, equal, is_plain, parse_reply, printable, same_output, without_tuples
from .tests import Call, FunctionPlan, JudgePlan, Plan, ProgramPlan, plan_of

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\s`]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S)
_PYTHON_TAGS, _CPP_TAGS = {"", "python", "py", "python3"}, {"cpp", "c++", "cc", "cxx"}


@dataclass(frozen=True, slots=True)
class Program:
    """The code in a completion."""

    source: str
    language: str
    fenced: bool


def extract_program(completion: str, language: str = "auto") -> Program | None:
    """The last fenced block of the final answer (what follows `</think>`), or all of it where nothing is fenced.

    `language`: "python", "cpp", or "auto", which goes by the fence's tag. None if there is no answer.
    """
    _, closed, answer = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return None  # the model never stopped thinking
    blocks = [(match[2].lower(), match[3]) for match in _FENCE.finditer(answer)]
    tags = {"python": _PYTHON_TAGS, "cpp": _CPP_TAGS | {""}, "auto": _PYTHON_TAGS | _CPP_TAGS}[language]
    fitting = [block for block in blocks if block[0] in tags]
    tag, source = fitting[-1] if fitting else ("", answer)
    if (blocks and not fitting) or not source.strip():
        return None
    found = language if language != "auto" else ("cpp" if tag in _CPP_TAGS else "python")
    return Program(source, found, bool(fitting))


class CodeReward:
    """Scores 1 if every test passes, else 0; with `partial`, the fraction that passes. Thread-safe.

    Tests: whatever `codetests.plan_of` reads from `columns` or `answer`. Programs are Python, or C++ where stdin and
    stdout are tested (`language` "cpp", or "auto" with a C++ fence). `timeout` (s), `memory_mb` and `output_bytes` (see
    `Limits`) hold for a function's calls together and for each run of a program; `total_seconds` for all runs of one
    completion, `compile_seconds` for the compiler. `concurrency`: runs at the same time, by default one a core.
    `url`: a remote sandbox in the place of this machine's (see `sandbox/remote.py`).
    Raises SandboxUnavailable, a ValueError, where the machine has no sandbox and `allow_unsafe` is not set.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory_mb: int = 512,
        output_bytes: int = 1 << 20,
        concurrency: int | None = None,
        partial: bool = False,
        float_tolerance: float = FLOAT_TOLERANCE,
        language: str = "auto",
        total_seconds: float = 60.0,
        compile_seconds: float = COMPILER_LIMITS.seconds,
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
        self.limits = Limits(seconds=timeout, memory_mb=memory_mb, output_bytes=output_bytes)
        self.partial, self.tolerance, self.language = partial, float_tolerance, language
        self.compiler_limits = dataclasses.replace(COMPILER_LIMITS, seconds=compile_seconds)
        self.total_seconds, self.max_code_chars = total_seconds, max_code_chars
        self._start: Callable[[], Sandbox | RemoteSandbox]
        if url is not None:
            self._start = functools.partial(RemoteSandbox, url, workers=concurrency)
        else:
            local = {"backend": backend, "allow_unsafe": allow_unsafe}
            self._start = functools.partial(Sandbox, workers=concurrency, **local)
        self.sandbox = self._start()
        self._judge: Sandbox | RemoteSandbox | None = None
        self._lock = threading.Lock()

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        if len(batch) == 1:
            return [self._grade(batch[0])]
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            return list(pool.map(self._grade, batch))

    @property
    def finished(self) -> int:
        """Runs so far: while it grows, a batch is under way however long it takes."""
        return self.sandbox.finished

    def check_reference(self, row: RewardInput) -> str | None:
        """What is wrong with a row's tests, or None."""
        try:
            plan_of(row.columns, row.answer)
        except ValueError as error:
            return str(error)
        return None

    def trial(self, row: RewardInput) -> None:
        """Raises ValueError if the row's tests cannot be read or the sandbox does not run."""
        plan_of(row.columns, row.answer)
        if (run := self.sandbox.run_program("print(6 * 7)")).stdout != b"42\n":
            raise ValueError(f"the sandbox ({self.sandbox.backend}) does not run programs: {run}")

    def close(self) -> None:
        self.sandbox.close()
        if self._judge is not None:
            self._judge.close()

    def _grade(self, item: RewardInput) -> Verdict:
        start = time.perf_counter()

        def verdict(status: Status, score: float, message: str) -> Verdict:
            return Verdict(status=status, score=score, message=message, seconds=time.perf_counter() - start)

        try:
            plan = plan_of(item.columns, item.answer)
        except ValueError as error:
            return verifier_error(f"tests: {error}", time.perf_counter() - start)
        program = extract_program(item.completion, self.language)
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
        """A killed mother process costs a second try, not the sample."""
        if isinstance(plan, ProgramPlan):
            return self._run_program(plan, program)
        if program.language != "python":
            return Result(0, 1, "the tests call a Python function")
        action: Callable[[], Result]
        if isinstance(plan, FunctionPlan):
            action = functools.partial(self._call_function, plan, program)
        else:
            action = functools.partial(self._judged, plan, program)
        return twice(action)

    # --- functions

    def _call_function(self, plan: FunctionPlan, program: Program) -> Result:
        total, passed, failure = len(plan.calls), 0, Result(0, 1, "")
        try:
            with self._session(plan, program, plan.calls) as talk:
                if (loaded := parse_reply(talk.receive())).error:
                    return _raised(loaded, total)
                for number, call in enumerate(plan.calls):
                    if number:
                        talk.send({"eval": call.source})
                    reply = parse_reply(talk.receive())
                    if self._right(call.expected, plan.from_json, reply):
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
        return Result(passed, total, failure.message, failure.over_limit)

    def _right(self, expected: object, from_json: bool, reply: Reply) -> bool:
        if reply.error:
            return False
        try:
            if not is_plain(reply.value):
                return False
            return equal(expected, without_tuples(reply.value) if from_json else reply.value, self.tolerance)
        except RecursionError:  # nested beyond all reason
            return False

    def _session(
        self, plan: FunctionPlan | JudgePlan, program: Program, calls: Sequence[Call] = ()
    ) -> contextlib.AbstractContextManager[Session | RemoteSession]:
        source = program.source
        if plan.entry and not re.search(rf"^\s*(async\s+)?def\s+{re.escape(plan.entry)}\b", source, re.M):
            source = plan.prompt + source  # a completion of the prompt's function
        parts = [part for part in (plan.before, source, plan.after) if part.strip()]
        messages = [{"eval": call.source} for call in calls]
        first, rest = (messages[0], messages[1:]) if messages else (None, [])
        return self.sandbox.session({"task": "calls", "code": parts}, self.limits, first=first, upcoming=rest)

    def _judged(self, plan: JudgePlan, program: Program) -> Result:
        """Runs the data set's test code in its own sandbox and carries its calls over, as plain values both ways."""
        with self._lock:
            if self._judge is None:
                self._judge = self._start()
        request = {"task": "judge", "setup": plan.setup, "names": dict(plan.names), "test": plan.test}
        patience = Limits(seconds=3 * self.limits.seconds + 5.0, output_bytes=self.limits.output_bytes)
        with self._judge.session(request, patience) as judge:
            try:
                with self._session(plan, program) as talk:
                    if (first := parse_reply(talk.receive())).error:
                        return _raised(first, 1)
                    return _carry(judge, talk)
            except ProgramEnded as end:
                return _ended(end.run, 1)

    # --- programs

    def _run_program(self, plan: ProgramPlan, program: Program) -> Result:
        total, passed, message, over = len(plan.cases), 0, "", False
        run: Callable[[bytes], Run]
        if program.language == "cpp":
            binary, compilation = self.sandbox.compile_cpp(program.source, self.compiler_limits)
            if compilation.exit_code or not binary:
                first = compilation.stderr.decode("utf-8", "replace").partition("error:")[2].partition("\n")[0]
                over = compilation.outcome in OVER_LIMIT
                return Result(0, total, f"does not compile: {printable(first) or compilation}", over)
            run = functools.partial(self.sandbox.run_native, binary, limits=self.limits)
        else:
            run = functools.partial(self.sandbox.run_program, program.source, limits=self.limits)
        start = time.monotonic()
        for number, (given, wanted) in enumerate(plan.cases):
            if time.monotonic() - start > self.total_seconds:
                return Result(passed, total, f"over {self.total_seconds:g} s for all inputs", True)
            done = run(given.encode("utf-8", "surrogatepass"))
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


def _carry(judge: Session | RemoteSession, talk: Session | RemoteSession) -> Result:
    """Passes calls from the judge to the model's function until the judge has its verdict. Raises ProgramEnded for the
    model's program, SandboxError where the test itself is at fault."""
    calls = 0
    while True:
        try:
            message = json.loads(judge.receive())  # from the data set's own code
        except ProgramEnded as end:  # it holds nothing but the test and the model's plain values: a bomb of a value
            return Result(0, 1, f"the test ended on the returned value: {end}", end.run.outcome in OVER_LIMIT)
        if "eval" in message:
            calls += 1
            talk.send({"eval": message["eval"]})
            reply = parse_reply(talk.receive())
            try:
                plain = not reply.error and is_plain(reply.value)
            except RecursionError:  # nested beyond all reason
                plain = False
            judge.send({"ok": reply.value} if plain else {"error": reply.error or "no plain value"})
        elif "passed" in message and calls:
            return Result(1, 1, "")
        elif "failed" in message:
            failure = message["failed"]
            return Result(0, 1, f"the test failed: {failure['error']} {printable(failure['text'])}".rstrip())
        else:
            raise SandboxError(f"the test code does not work: {message.get('broken', 'it calls no tested function')}")
