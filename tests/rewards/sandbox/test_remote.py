"""The remote sandbox against a small service of Sandbox Fusion's protocol on this machine, with
faults to order."""

import contextlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from emberl.rewards.code_tests.reward import CodeReward
from emberl.rewards.inputs import RewardInput
from emberl.rewards.sandbox import remote
from emberl.rewards.sandbox.pool import (
    Limits,
    Outcome,
    ProgramEnded,
    SandboxError,
    SandboxUnavailable,
)
from emberl.rewards.sandbox.remote import RemoteSandbox
from emberl.rewards.verdict import Status

pytestmark = pytest.mark.slow


class Service(ThreadingHTTPServer):
    """Runs Python as a plain process, which a test may; C++ is a script that starts with `//`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list = []
        """What to answer the next requests instead: a status, a body, or None to run the program
        after all."""
        self.requests: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        service: Service = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.requests.append(body)
            service.at_once += 1
            service.most_at_once = max(service.most_at_once, service.at_once)
            fault = service.faults.pop(0) if service.faults else None
        status, payload = self._answer(body, fault)
        with service.lock:  # before the client sees the answer and sends its next request
            service.at_once -= 1
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    def _answer(self, body: dict, fault) -> tuple[int, bytes]:
        status, answer = 200, fault
        if self.path != "/run_code":
            status, answer = 404, {}
        elif isinstance(fault, int):
            status, answer = fault, {}
        elif fault is None:
            answer = _run(body)
        return status, json.dumps(answer).encode() if not isinstance(answer, bytes) else answer


def _run(body: dict) -> dict:
    compilation = None
    if body["language"] == "cpp":
        broken = "int" not in body["code"]
        compilation = {
            "status": "Finished",
            "execution_time": 0.1,
            "return_code": int(broken),
            "stdout": "",
            "stderr": "x",
        }
        if broken:
            return {
                "status": "Failed",
                "message": "",
                "compile_result": compilation,
                "run_result": None,
            }
        body = body | {"code": "print(sum(map(int, input().split())))" if body["stdin"] else ""}
    command, seconds = [sys.executable, "-c", body["code"]], body["run_timeout"]
    try:
        done = subprocess.run(
            command,
            input=body["stdin"],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {
            "status": "Failed",
            "message": "",
            "run_result": {"status": "TimeLimitExceeded", "execution_time": 9.0},
        }
    result = {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    run = {"status": "Finished", "execution_time": 0.1, **result}
    status = "Failed" if done.returncode else "Success"
    return {"status": status, "message": "", "compile_result": compilation, "run_result": run}


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(remote, "_MOST_PAUSE", 0.05)
    server = Service()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def box(service):
    with RemoteSandbox(service.url, workers=2) as found:
        service.requests.clear()
        yield found


def test_programs(box) -> None:
    run = box.run_program("n = int(input())\nprint(n * 2)", b"21\n")
    assert (run.outcome, run.exit_code, run.stdout) == (Outcome.EXITED, 0, b"42\n")
    assert box.run_program("1 / 0").exit_code == 1
    assert (
        box.run_program("while True: pass", limits=Limits(seconds=0.2)).outcome
        is Outcome.TIME_LIMIT
    )
    assert box.run_program("raise MemoryError").outcome is Outcome.MEMORY_LIMIT
    assert (
        box.run_program("print('x' * 99)", limits=Limits(output_bytes=50)).outcome
        is Outcome.OUTPUT_LIMIT
    )
    assert box.run_program("import os; os.kill(os.getpid(), 9)").outcome is Outcome.CRASHED


def test_limits_are_sent(box, service) -> None:
    box.run_program("pass", b"in", Limits(seconds=2.0, memory_mb=100))
    sent = service.requests[-1]
    assert (sent["language"], sent["code"], sent["stdin"], sent["memory_limit_MB"]) == (
        "python",
        "pass",
        "in",
        100,
    )
    assert sent["run_timeout"] == Limits(seconds=2.0).own_seconds


@pytest.mark.parametrize(
    "fault", [429, 500, 503, b"no JSON", [], {"status": "SandboxError", "message": "no pod"}]
)
def test_a_far_side_in_trouble_is_asked_again(box, service, fault) -> None:
    service.faults[:] = [fault] * 2
    assert box.run_program("print(1)").stdout == b"1\n"
    assert len(service.requests) == 3
    service.faults[:] = [fault] * 99
    with pytest.raises(SandboxError, match="5 attempts"):
        box.run_program("print(1)")


@pytest.mark.parametrize(
    "result",
    [
        None,
        5,
        {"status": "Error"},
        {"status": "Finished"},
        {"status": "Finished", "return_code": "0"},
    ],
)
def test_an_answer_without_a_run_is_no_verdict(box, service, result) -> None:
    service.faults[:] = [{"status": "Success", "run_result": result}]
    with pytest.raises(SandboxError):
        box.run_program("print(1)")


def test_what_nobody_mends_is_said_at_once(box, service) -> None:
    service.faults[:] = [422]
    with pytest.raises(SandboxError, match="422"):
        box.run_program("print(1)")
    assert len(service.requests) == 1


def test_nothing_there(monkeypatch) -> None:
    monkeypatch.setattr(remote, "_MOST_PAUSE", 0.01)
    with pytest.raises(SandboxUnavailable, match=r"127\.0\.0\.1:9"):
        RemoteSandbox("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="url"):
        RemoteSandbox("10.0.0.1:8080")


def test_requests_at_the_same_time_are_limited(box, service) -> None:
    threads = [
        threading.Thread(target=box.run_program, args=("import time; time.sleep(0.2)",))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert service.most_at_once == 2
    assert box.finished == 7  # one at the start


def test_a_talk(box, service) -> None:
    code = "n = 0\nprint('noise')\ndef f(x):\n    global n\n    n += x\n    return n"
    calls = [{"eval": f"f({x})"} for x in (1, 2, 3)]
    with box.session({"task": "calls", "code": [code]}, first=calls[0], upcoming=calls[1:]) as talk:
        found = [json.loads(talk.receive())]
        for at, call in enumerate(calls):
            if at:
                talk.send(call)
            found.append(json.loads(talk.receive()))
    assert found == [{"ok": None}, {"ok": 1}, {"ok": 3}, {"ok": 6}]
    assert len(service.requests) == 1
    # not foreseen: the program runs again each time
    with box.session({"task": "calls", "code": [code]}) as talk:
        talk.receive()
        for x, total in ((1, 1), (2, 3)):
            talk.send({"eval": f"f({x})"})
            assert json.loads(talk.receive()) == {"ok": total}
    assert len(service.requests) == 4
    with (
        box.session({"task": "calls", "code": ["import os; os._exit(3)"]}, first=calls[0]) as talk,
        pytest.raises(ProgramEnded) as end,
    ):
        talk.receive()
    assert end.value.run.exit_code == 3


def test_the_code_reward_on_a_remote_sandbox(service) -> None:
    reward = CodeReward(url=service.url, timeout=1.0, concurrency=2)

    def graded(code: str, **columns):
        return reward([RewardInput(completion=f"```python\n{code}\n```", columns=columns)])[0]

    asserts = {"test_list": ["assert add(2, 3) == 5", "assert add(0, 1) == 1"]}
    stdin = {"tests": [{"input": "2 3\n", "output": "5\n"}]}
    assert graded("def add(a, b): return a + b", **asserts).status is Status.CORRECT
    assert graded("def add(a, b): return 5", **asserts).status is Status.WRONG
    assert (
        graded(
            "class E:\n    __eq__ = lambda s, o: True\ndef add(a, b): return E()", **asserts
        ).status
        is Status.WRONG
    )
    assert graded("import os; os._exit(0)", **asserts).score == 0
    assert graded("while True: pass", **asserts).status is Status.OVER_LIMIT
    assert graded("print(sum(map(int, input().split())))", **stdin).status is Status.CORRECT
    assert graded("print(6)", **stdin).status is Status.WRONG
    cpp = reward([RewardInput(completion="```cpp\nint main() {}\n```", columns=stdin)])[0]
    assert cpp.status is Status.CORRECT
    service.faults[:] = [500] * 99
    assert graded("print(5)", **stdin).status is Status.VERIFIER_ERROR
    reward.close()
    with pytest.raises(ValueError, match="remote"):
        CodeReward(url=service.url, backend="zygote")
