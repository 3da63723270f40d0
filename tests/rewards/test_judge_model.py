"""The judge against a server of our own: scores, silence, refusals, retries, the cache and the
prompt."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.judge_model import JudgeReward
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status

Reply = tuple[int, str]


class Server:
    """Speaks as much of OpenAI's protocol as a judge needs. `answer`: from the judge's prompt to
    status and text."""

    def __init__(self, answer: Callable[[str], Reply]) -> None:
        self.prompts: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.most = self.running = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    self.requests.append(
                        body | {"path": handler.path, "key": handler.headers["authorization"]}
                    )
                    self.prompts.append(prompt)
                    self.running += 1
                    self.most = max(self.most, self.running)
                status, text = answer(prompt)
                with lock:
                    self.running -= 1
                reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = json.dumps(reply if status == 200 else {"error": text}).encode()
                handler.send_response(status)
                handler.send_header("content-length", str(len(data)))
                handler.end_headers()
                with contextlib.suppress(ConnectionError):  # the judge may have given up
                    handler.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], Reply]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[str], Reply]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server: Server, **options: Any) -> JudgeReward:
    given: dict[str, Any] = {"timeout": 5.0, "retries": 0} | options
    return JudgeReward(base_url=server.url, model="judge-7b", **given)


def row(completion: str, answer: str = "18") -> RewardInput:
    return RewardInput(
        completion=completion, answer=answer, messages=({"role": "user", "content": "6*3? {x}"},)
    )


@pytest.mark.parametrize(
    ("reply", "options", "status", "score"),
    [
        ("It is right.\nScore: 1", {}, Status.CORRECT, 1.0),
        ("Score: 1? No.\nScore: 0", {}, Status.WRONG, 0.0),
        ("score = 0.25", {}, Status.PARTIAL, 0.25),
        ("**Score:** 7", {"best": 10}, Status.PARTIAL, 0.7),
        ("Score: 99", {"best": 10}, Status.CORRECT, 1.0),
        (
            "Yes, it is. no",
            {"pattern": r"(?i)\b(yes|no)\b", "scores": {"yes": 1, "no": 0}},
            Status.WRONG,
            0.0,
        ),
        ("I cannot say", {}, Status.VERIFIER_ERROR, None),
        ("perhaps", {"pattern": r"(\w+)"}, Status.VERIFIER_ERROR, None),
        ("maybe", {"pattern": r"(\w+)", "scores": {"yes": 1}}, Status.VERIFIER_ERROR, None),
    ],
)
def test_the_score_in_a_reply(
    serve: Any, reply: str, options: dict, status: Status, score: float | None
) -> None:
    graded = judge(serve(lambda prompt: (200, reply)), **options)
    (verdict,) = graded([row("18")])
    assert (verdict.status, verdict.score) == (
        status,
        None if score is None else pytest.approx(score),
    )
    graded.close()


def test_what_the_judge_is_sent(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = serve(lambda prompt: (200, "Score: 1"))
    template = 'Q {question} A {answer} C {completion} {"json": 1} {other}'
    graded = judge(
        server,
        prompt=template,
        system="Be strict.",
        request={"max_tokens": 9},
        api_key_env="JUDGE_KEY",
    )
    graded([row("{answer} \\d {question}")])
    (request,) = server.requests
    assert server.prompts == ['Q 6*3? {x} A 18 C {answer} \\d {question} {"json": 1} {other}']
    assert request["messages"][0] == {"role": "system", "content": "Be strict."}
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-7b", 0.0, 9)
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    graded.close()


def test_requests_go_side_by_side_within_the_limit_and_each_only_once(serve: Any) -> None:
    def slow(prompt: str) -> Reply:
        time.sleep(0.1)
        return 200, f"Score: {int('yes' in prompt)}"

    server = serve(slow)
    graded = judge(server, concurrency=4)
    rows = [row(f"{i} {'yes' if i % 2 else 'no'}") for i in range(12)]
    found: list[list[float | None]] = []
    threads = [
        threading.Thread(target=lambda: found.append([v.score for v in graded(rows)]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[0.0, 1.0] * 6] * 3
    assert len(server.requests) == 12
    assert 2 <= server.most <= 4
    assert graded.finished == 12
    graded.close()


def test_a_judge_that_stumbles_is_asked_again(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberl.rewards.judge_model._BACKOFF", 0.01)
    replies = iter([(503, "loading"), (429, "busy"), (200, "Score: 1")])
    server = serve(lambda prompt: next(replies))
    graded = judge(server, retries=2)
    assert graded([row("18")])[0].score == 1.0
    assert len(server.requests) == 3
    graded.close()


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (lambda prompt: (500, "broken"), "HTTP 500 .*broken.*, 2 times", 2),
        (lambda prompt: (404, "no such model"), "HTTP 404 .*no such model", 1),
        (lambda prompt: (time.sleep(1.5), (200, "Score: 1"))[1], "Timeout.*, 2 times", 2),
    ],
)
def test_a_judge_that_is_down_is_an_infrastructure_error(
    serve: Any, monkeypatch: pytest.MonkeyPatch, answer: Any, message: str, requests: int
) -> None:
    monkeypatch.setattr("emberl.rewards.judge_model._BACKOFF", 0.01)
    server = serve(answer)
    graded = judge(server, retries=1, timeout=0.5)
    (verdict,) = graded([row("17")])
    assert verdict.status is Status.VERIFIER_ERROR
    with pytest.raises(ValueError, match=f"judge at {server.url}: {message}"):
        raise ValueError(verdict.message)
    assert len(server.requests) == requests
    graded.close()


def test_nobody_listens_and_then_somebody_does(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberl.rewards.judge_model._BACKOFF", 0.01)
    up: list[bool] = []
    server = serve(lambda prompt: (200, "Score: 1") if up else (503, "starting"))
    suite = build_suite(
        {
            "judge": {
                "use": "judge",
                "timeout": 5.0,
                "options": {"base_url": server.url, "model": "m", "retries": 1},
            }
        }
    )
    with pytest.raises(ValueError, match=r"reward\.judge: judge at .*503"):
        suite.trial(row("0"))
    up.append(True)
    suite.trial(row("0"))  # a failure is not cached
    server.close()
    assert suite.grade([row("18")])[0].status is Status.VERIFIER_ERROR
    suite.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "host:8000"}, "must be an address"),
        ({"prompt": "mark {answer}"}, "no {completion}"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "score"}, "needs a group"),
        ({"best": 0}, "must be positive"),
        ({"modle": "x"}, "no option modle"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    given = {"base_url": "http://localhost:1/v1", "model": "m"} | options
    with pytest.raises(ValueError, match=message):
        build_suite({"j": {"use": "judge", "options": given}})
