"""A vLLM server that already runs, as the engine of a rollout worker: the calls of
`process.RunningLLM`, over HTTP.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --dtype float32 --skip-tokenizer-init
    \\
        --logprobs-mode processed_logprobs --generation-config vllm \\
        --worker-extension-cls emberl.rollout.vllm_backend.extension.WeightExtension

If that command is missing, as in vLLM's CPU wheels:
`python -m vllm.entrypoints.openai.api_server --model MODEL ...`. On a CPU add
--no-enable-chunked-prefill.

Routes, as of vLLM 0.32: `/inference/v1/generate`, which `--enable-scale-out` opens, takes and gives
token ids; `/pause`, `/resume`, `/abort_requests`, `/update_weight_version`, `/reset_prefix_cache`
and `/collective_rpc` exist in the developer mode only. The server reports which version sampled
each token. Weights go through a file that both see.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

import httpx

from ..samples import Sampling, Span
from .compat import NO_CHUNKS, EngineSettings, model_config
from .process import EngineLostError
from .requests import Count, Decoded, parameters

T = TypeVar("T")

GENERATE = "/inference/v1/generate"
ID_PREFIX = "generate-tokens-"
"""The prefix that the server gives to a request's id."""
RETRY_S = 1.0
START = (
    "start it as VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --dtype {dtype}"
    " --logprobs-mode processed_logprobs --generation-config vllm --worker-extension-cls"
    " emberl.rollout.vllm_backend.extension.WeightExtension"
)


def connect(url: str, settings: EngineSettings, version: int, timeout: float) -> RunningServer:
    """Waits up to `timeout` seconds until the server answers, checks that it can be used, and
    labels its weights as `version`.

    Raises ValueError, with the command to start it, if it cannot be used, and EngineLostError if it
    does not answer.
    """
    how = START.format(dtype=settings.dtype)
    with httpx.Client(base_url=url, timeout=timeout) as client:
        _wait_for(client, url, timeout)
        described = [
            client.get("/weight_info"),
            client.post("/collective_rpc", json={"method": "emberl_describe"}),
        ]
        lacking = next((answer for answer in described if answer.status_code != 200), None)
        if lacking is not None:
            raise ValueError(
                f"rollout.servers: {url}{lacking.request.url.path} answers {lacking.status_code},"
                f" so it is not a vLLM 0.32 whose weights emberl can change; {how}"
            )
        served = described[1].json()["results"][0]
        if not served["labels_tokens"]:
            raise ValueError(
                f"rollout.servers: {url} is vLLM {served['vllm']}, which does not say by which"
                " weights a token was sampled; 0.32 does (without rollout.servers,"
                " rollout.engine=vllm starts older ones itself)"
            )
        client.post("/update_weight_version", json={"new_version": str(version)}).raise_for_status()
        length = client.get("/v1/models").json()["data"][0]["max_model_len"]
    wanted = {"dtype": settings.dtype, "logprobs_mode": "processed_logprobs"}
    for name, value in wanted.items():
        if served[name] != value:
            raise ValueError(
                f"rollout.servers: {url} was started with {name}={served[name]}, not {value}; {how}"
            )
    if served["chunks_on_cpu"]:
        raise ValueError(
            f"rollout.servers: start {url} with --no-enable-chunked-prefill: {NO_CHUNKS}"
        )
    if length < settings.max_model_len:
        raise ValueError(
            f"rollout.servers: {url} takes sequences of {length} tokens, the run needs"
            f" {settings.max_model_len}: start it with --max-model-len {settings.max_model_len}"
        )
    return RunningServer(url, model_config(settings.model).vocab_size)


def _wait_for(client: httpx.Client, url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            if client.get("/health").status_code == 200:
                return
            problem = "it is not healthy"
        except httpx.TransportError as error:
            problem = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise EngineLostError(f"{url} did not answer within {timeout:g} s: {problem}")
        time.sleep(RETRY_S)


class RunningServer:
    """A connection to a running server. Every method must be called on one event loop, and raises
    RuntimeError, with the server's message, if that refuses."""

    def __init__(self, url: str, vocab_size: int) -> None:
        self.url = url
        self.vocab_size = vocab_size
        self._mine = uuid.uuid4().hex[:12]  # makes ids and salts unique: others may use the server
        # a connection for each sample, of which httpx would allow 100; the engine has the deadlines
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=None, limits=limits)
        self._count: Count = lambda _request_id, _tokens: None

    def on_tokens(self, count: Count) -> None:
        """From now on, `count(request id, new tokens)` is called as they come."""
        self._count = count

    async def decode(
        self, request_id: str, token_ids: list[int], sampling: Sampling, salt: str
    ) -> Decoded:
        """As `RunningLLM.decode`, with the versions of the tokens."""
        body = self._request(request_id, token_ids, parameters(sampling), salt) | {"stream": True}
        drawn: list[int] = []
        logprobs: list[float] = []
        try:
            async with self._client.stream("POST", GENERATE, json=body) as answer:
                if answer.status_code != 200:
                    raise RuntimeError(
                        f"{self.url}{GENERATE}: {(await answer.aread()).decode()[:500]}"
                    )
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "choices" not in chunk:
                        raise RuntimeError(f"{self.url}{GENERATE}: {chunk}")
                    for choice in chunk["choices"]:
                        new = choice["token_ids"] or []
                        if new:
                            logprobs += [
                                entry["logprob"] for entry in choice["logprobs"]["content"]
                            ]
                            drawn += new
                            self._count(request_id, new)
                        if choice["finish_reason"] is not None:
                            spans = [
                                Span(int(s["version"]), s["start"], s["end"])
                                for s in choice["weight_versions"] or ()
                            ]
                            return Decoded(drawn, logprobs, choice["finish_reason"], tuple(spans))
        except httpx.TransportError as error:
            raise self._lost(error) from error
        raise EngineLostError(f"{self.url} ended its answer before the sample ended")

    async def prompt_logprobs(
        self, request_id: str, token_ids: list[int], salt: str
    ) -> list[float]:
        """As `RunningLLM.prompt_logprobs`."""
        wanted = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        answer = await self._post(GENERATE, self._request(request_id, token_ids, wanted, salt))
        return [
            float(entry[str(token)]["logprob"])
            for token, entry in zip(token_ids[1:], answer["prompt_logprobs"][1:], strict=True)
        ]

    async def abort(self, request_ids: Collection[str]) -> None:
        """Aborts requests: they end with the tokens that the server has. Ids that it does not know
        are ignored."""
        if request_ids:  # an empty list would abort the requests of all clients
            await self._post(
                "/abort_requests", {"request_ids": [ID_PREFIX + self._name(i) for i in request_ids]}
            )

    async def pause(self) -> None:
        """Pauses decoding and keeps all requests; returns once no step runs."""
        await self._post("/pause?mode=keep&clear_cache=false")

    async def resume(self) -> None:
        await self._post("/resume")

    async def sleep(self, level: int) -> None:
        """As `RunningLLM.sleep`."""
        await self._post(f"/sleep?level={level}&mode=keep")

    async def wake(self, what: str) -> None:
        """As `RunningLLM.wake`."""
        await self._post(f"/wake_up?tags={what}")
        await self.pause()

    async def label(self, version: int) -> None:
        """Makes the server label tokens that are sampled from now on with this version."""
        await self._post("/update_weight_version", {"new_version": str(version)})

    async def clear_prefix_cache(self) -> bool:
        """Empties the prefix cache; False, and nothing is done, while requests of any client hold
        blocks of it."""
        return bool((await self._post("/reset_prefix_cache"))["success"])

    async def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """One result of each worker process."""
        return list(
            (await self._post("/collective_rpc", {"method": method, "args": list(arguments)}))[
                "results"
            ]
        )

    async def within(self, what: str, work: Awaitable[T], deadline: float) -> T:
        """The result of `work`. Raises TimeoutError after `deadline` seconds."""
        try:
            return await asyncio.wait_for(work, deadline)
        except TimeoutError:
            raise TimeoutError(f"{self.url}: {what!r} took longer than {deadline:g} s") from None

    def last_lines(self) -> list[str]:
        """A line that refers to the server's log, which is not available here."""
        return [f"look into the log of {self.url}"]

    async def shutdown(self) -> None:
        """Closes the connection; the server keeps running. Idempotent."""
        await self._client.aclose()

    def _request(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any], salt: str
    ) -> dict[str, Any]:
        salted = f"{self._mine}-{salt}"
        return {
            "request_id": self._name(request_id),
            "token_ids": token_ids,
            "sampling_params": sampling,
            "cache_salt": salted,
        }

    def _name(self, request_id: str) -> str:
        return f"{self._mine}-{request_id}"

    async def _post(self, path: str, body: Any = None) -> Any:
        try:
            answer = await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        if answer.status_code != 200:
            raise RuntimeError(
                f"{self.url}{path} answers {answer.status_code}: {answer.text[:500]}"
            )
        return answer.json()

    def _lost(self, error: Exception) -> EngineLostError:
        return EngineLostError(f"{self.url} does not answer: {error or type(error).__name__}")
