"""`Tester`: runs a program under a plan of tests.

Expected answers stay in this process, or in the judge's sandbox. The program's sandbox receives
only inputs, one call at a time, and returns plain values or bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import marshal
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sandbox.pool import Limits, Outcome, ProgramEnded, Run, Sandbox, SandboxError, Session, twice
from ..sandbox.runs import OVER_LIMIT
from .compare import Reply, equal, is_plain, parse_reply, printable, same_output, without_tuples
from .extract import Program, completed
from .plans import Call, FunctionPlan, JudgePlan, Plan, ProgramPlan

if TYPE_CHECKING:
    from ..sandbox.remote import RemoteSandbox, RemoteSession

_HERE = Path(__file__).resolve().parent
_MOST_OUTPUT = 1 << 28
_SHORTAGE = re.compile(
    r"can't start new thread|Too many open files in system|Resource temporarily unavailable"
)
"""Messages of a program that got no thread or file. Either it used too many itself, or the machine
has none left; then `_CONTROL` fails too."""
# colorsys is a module that no child has loaded, so that importing it opens a file
_CONTROL = """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(16)]
for each in threads: each.start()
import colorsys
"""


@dataclass(frozen=True, slots=True)
class Result:
    """The number of passed tests, the number of all tests, and why the last failed one failed."""

    passed: int
    total: int
    message: str
    over_limit: bool = False
    unreadable: bool = False


def _raised(reply: Reply, total: int) -> Result:
    unreadable = reply.error in ("SyntaxError", "IndentationError", "TabError")
    return Result(
        0,
        total,
        f"{reply.error}: {reply.text}".strip(": "),
        reply.error == "MemoryError",
        unreadable,
    )


def _ended(run: Run, total: int) -> Result:
    return Result(0, total, f"ended instead of answering: {run}", run.outcome in OVER_LIMIT)


def _relay(judge: Session | RemoteSession, talk: Session | RemoteSession) -> Result:
    """Passes lines between judge and model until the judge has its verdict. Raises ProgramEnded for
    the model's program, SandboxError if the test itself is at fault."""
    asked = False
    while True:
        try:
            line = judge.receive()  # from the data set's own code
        except ProgramEnded as end:
            if not asked:  # it has heard nothing of the model's yet
                raise SandboxError(f"the test code does not work: {end}") from None
            return _bomb(end)
        asked = True
        if line.startswith((b'{"verdict"', b'{"broken"')):
            return _result(json.loads(line))
        talk.relay(line)
        answer = talk.receive()
        try:
            judge.relay(answer)
        except ProgramEnded as end:
            return _bomb(end)


def _bomb(end: ProgramEnded) -> Result:
    """The result of a judge that ended without a verdict: since it runs only the test on the
    model's values, one of those ended it."""
    return Result(
        0, 1, f"the test ended on the returned value: {end}", end.run.outcome in OVER_LIMIT
    )


def _result(message: dict[str, Any]) -> Result:
    if "broken" in message:
        raise SandboxError(f"the test code does not work: {message['broken']}")
    verdict = message["verdict"]
    failed = verdict["failed"]
    if not failed and not verdict["asked"]:
        raise SandboxError("the test code does not work: it calls no tested function")
    why = (
        f"the test failed: {printable(failed['error'])} {printable(failed['text'])}".rstrip()
        if failed
        else ""
    )
    over = bool(failed) and failed["error"] == "MemoryError"
    return Result(verdict["passed"], verdict["total"], why, over)


class Tester:
    """Runs programs. Thread-safe.

    `start(preload=packages)` makes a sandbox; those of judges are made on demand. `limits`: of all
    calls of a function together, and of each run of a program; `total_seconds`: of all runs of a
    program together.
    """

    def __init__(
        self,
        start: Callable[..., Sandbox | RemoteSandbox],
        packages: tuple[str, ...],
        *,
        limits: Limits,
        compiler_limits: Limits,
        total_seconds: float,
        tolerance: float,
        partial: bool,
    ) -> None:
        self._start = start
        self.packages = packages
        self.limits = limits
        self.compiler_limits = compiler_limits
        self.total_seconds = total_seconds
        self.tolerance = tolerance
        self.partial = partial
        self.sandbox = start(preload=packages)
        self._judges: dict[tuple[str, ...], Sandbox | RemoteSandbox] = {}
        self._lock = threading.Lock()

    @property
    def finished(self) -> int:
        """Number of runs so far."""
        return sum(each.finished for each in (self.sandbox, *list(self._judges.values())))

    def close(self) -> None:
        for each in (self.sandbox, *self._judges.values()):
            each.close()

    def test(self, plan: Plan, program: Program) -> Result:
        """Returns the result of the plan's tests. Raises SandboxError, but only after a second try
        if a fork server was lost."""
        action: Callable[[], Result]
        if isinstance(plan, ProgramPlan):
            action = functools.partial(self._run_program, plan, program)
        elif isinstance(plan, FunctionPlan):
            action = functools.partial(self._call_function, plan, program)
        else:
            action = functools.partial(self._judged, plan, program)
        result = twice(action)
        if _SHORTAGE.search(result.message):
            if (control := self.sandbox.run_program(_CONTROL)).exit_code:
                raise SandboxError(f"the machine gives no more processes or files: {control}")
            result = twice(action)
        return result

    def _call_function(self, plan: FunctionPlan, program: Program) -> Result:
        total, passed, failure = len(plan.calls), 0, Result(0, 1, "")
        request = {"task": "calls", "code": _parts(plan, program), "usual": plan.usual}
        calls = [{"eval": call.source} for call in plan.calls]
        longest = max(len(str(call.expected)) for call in plan.calls)
        try:
            with self.sandbox.session(
                request, self._room(longest), first=calls[0], upcoming=calls[1:]
            ) as talk:
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
        """The limits, with room for an output as long as the expected one."""
        most = min(max(self.limits.output_bytes, 2 * expected + 4096), _MOST_OUTPUT)
        return dataclasses.replace(self.limits, output_bytes=most)

    def _judged(self, plan: JudgePlan, program: Program) -> Result:
        """Runs the data set's test code in a sandbox of its own, which asks the program's sandbox
        for calls of the model's code."""
        with self._lock:
            packages = tuple(sorted({*self.packages, *plan.packages}))
            if packages not in self._judges:
                self._judges[packages] = self._start(preload=packages)
            judges = self._judges[packages]
        seen = {"named": list(plan.names), "shared": plan.shared, "printing": plan.printing}
        test = {
            "task": "library",
            "library": _library("wire", "remote_objects", "judge"),
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
        patience = Limits(
            seconds=3 * self.limits.seconds + 5.0, output_bytes=self.limits.output_bytes
        )
        with judges.session(test | seen, patience) as judge:
            try:
                with self.sandbox.session(code | seen, self.limits) as talk:
                    if (first := parse_reply(talk.receive())).error:
                        return _raised(first, 1)
                    return _relay(judge, talk)
            except ProgramEnded as end:
                return _ended(end.run, 1)

    def _run_program(self, plan: ProgramPlan, program: Program) -> Result:
        total, passed, message, over = len(plan.cases), 0, "", False
        run: Callable[..., Run]
        if program.language == "cpp":
            binary, compilation = self.sandbox.compile_cpp(program.source, self.compiler_limits)
            if compilation.exit_code or not binary:
                first = (
                    compilation.stderr.decode("utf-8", "replace")
                    .partition("error:")[2]
                    .partition("\n")[0]
                )
                over = compilation.outcome in OVER_LIMIT
                return Result(
                    0, total, f"does not compile: {printable(first) or compilation}", over
                )
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


def _parts(plan: FunctionPlan | JudgePlan, program: Program) -> list[str]:
    source = completed(program.source, plan.entry, plan.prompt)
    return [part for part in (plan.before, source, plan.after) if part.strip()]


@functools.cache
def _library(*names: str) -> list[tuple[str, str]]:
    """The compiled code of files of this folder, for a child to run."""
    codes = [
        (name, compile((_HERE / f"{name}.py").read_text(), f"<{name}>", "exec")) for name in names
    ]
    return [(name, base64.b64encode(marshal.dumps(code)).decode()) for name, code in codes]
