"""Which running servers are taken: `connect`, by what a server answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from emberl.rollout.vllm_backend import server as vllm_server
from emberl.rollout.vllm_backend.compat import EngineSettings

SETTINGS = EngineSettings(
    model="model", dtype="float32", device="cpu", threads=1, max_num_seqs=8, max_model_len=64
)
GOOD = {
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "vllm": "0.32.0",
    "labels_tokens": True,
}
GOOD |= {"chunks_on_cpu": False}

Serve = Callable[[dict[str, Any]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(path -> answer) -> its address; other paths answer 404."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps(answers.get(self.path)).encode()
                self.send_response(200 if self.path in answers else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None: ...

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(max_model_len: int = 64, **served: Any) -> dict[str, Any]:
    return {
        "/health": None,
        "/weight_info": {},
        "/update_weight_version": {},
        "/v1/models": {"data": [{"max_model_len": max_model_len}]},
        "/collective_rpc": {"results": [GOOD | served]},
    }


@pytest.mark.parametrize(
    ("answered", "words"),
    [
        (
            answers(vllm="0.30.0", labels_tokens=False),
            r"is vLLM 0\.30\.0, which does not say by which weights a token",
        ),
        (
            {k: v for k, v in answers().items() if k != "/weight_info"},
            "/weight_info answers 404, .* start it as",
        ),
        (
            {k: v for k, v in answers().items() if k != "/collective_rpc"},
            "/collective_rpc answers 404, .*dtype float32",
        ),
        (answers(dtype="bfloat16"), r"started with dtype=bfloat16, not float32; start it as"),
        (
            answers(logprobs_mode="raw_logprobs"),
            "logprobs_mode=raw_logprobs, not processed_logprobs",
        ),
        (answers(chunks_on_cpu=True), "--no-enable-chunked-prefill: on a CPU"),
        (answers(max_model_len=32), "takes sequences of 32 tokens, the run needs 64"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_why(
    answered: dict[str, Any], words: str, serve: Serve
) -> None:
    with pytest.raises(ValueError, match=words):
        vllm_server.connect(serve(answered), SETTINGS, 3, 10.0)
