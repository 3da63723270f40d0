"""`JudgeReward`: a model behind an OpenAI-compatible URL, e.g. vLLM's server, grades the answers.

All requests go through one event loop in its own thread, at most `concurrency` at a time. A judge
that is down, slow or sends no readable score is an infrastructure error (`verifier_error`), never a
wrong answer.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import httpx

from .inputs import Reward, RewardInput
from .verdict import Status, Verdict, verifier_error

PROMPT = """Question:
{question}

Reference answer:
{answer}

Answer to be marked:
{completion}

Is the answer to be marked right? Compare its final result with the reference answer. \
End with one line, "Score: 1" if it is right or "Score: 0" if it is not."""
PATTERN = r"[Ss]core\W{0,5}(-?\d+(?:\.\d+)?)"
_FIELD = re.compile(r"\{(question|answer|completion)\}")
_AGAIN = (408, 409, 425, 429)
_CACHED = 100_000
_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeOptions:
    """The options of `judge`. Raises ValueError for one that is invalid."""

    base_url: str
    """Address of the API, e.g. `http://host:8000/v1`."""
    model: str
    """Name of the model on its server."""
    prompt: str = PROMPT
    """The judge's user message with the fields {question}, {answer} and {completion}; other braces
    stay as they are."""
    system: str = ""
    """The system message; empty for none."""
    pattern: str = PATTERN
    """A regular expression. Group 1 of its last match in the reply is the score: a number or a word
    of `scores`."""
    scores: Mapping[str, float] | None = None
    """The scores of the judge's words, e.g. {yes: 1, no: 0}."""
    best: float = 1.0
    """The judge's full marks: score = number / best."""
    request: Mapping[str, Any] | None = None
    """Further fields of the request, e.g. {max_tokens: 2048}; the temperature is 0 by default."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""
    timeout: float = 60.0
    """Seconds for one request."""
    retries: int = 3
    """Number of repetitions after a refused connection, a time-out or HTTP 408, 409, 425, 429 and
    5xx, at intervals of 0.5, 1, 2, ... s or as `Retry-After` says."""
    concurrency: int = 32
    """Most concurrent requests."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url is {self.base_url!r}; it must be an address like http://host:8000/v1"
            )
        if "{completion}" not in self.prompt:
            raise ValueError(
                "prompt shows the judge no {completion}; it may have {question} and {answer} too"
            )
        if not self.timeout > 0 or self.retries < 0 or self.concurrency < 1 or not self.best > 0:
            raise ValueError(
                "timeout and best must be positive, retries at least 0 and concurrency at least 1"
            )


class JudgeReward(Reward):
    """The score that a judge gives. Replies are cached, so that equal requests are sent once. Its
    keywords are `JudgeOptions`."""

    Options = JudgeOptions

    def __init__(self, **keywords: Any) -> None:
        options = JudgeOptions(**keywords)
        self._pattern = _compiled(options.pattern)
        self._url = options.base_url
        self._prompt = options.prompt
        self._timeout = options.timeout
        self._retries = options.retries
        self._scores = {
            str(word).lower(): float(value) for word, value in (options.scores or {}).items()
        }
        self._best = options.best
        self._concurrency = options.concurrency
        self._request = {"model": options.model, "temperature": 0.0} | dict(options.request or {})
        self._system = [{"role": "system", "content": options.system}] if options.system else []
        key = os.environ.get(options.api_key_env)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._cache: OrderedDict[bytes, asyncio.Task[Verdict]] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._finished = 0

    @property
    def finished(self) -> int:
        return self._finished

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        loop = self._started()
        future = asyncio.run_coroutine_threadsafe(self._grade(batch), loop)
        waves = -(-len(batch) // self._concurrency)
        one = (self._retries + 1) * (self._timeout + _LONGEST_BACKOFF)
        # other batches may stand in front of this one, so that only a loop that is stuck takes
        # longer
        return future.result(8 * waves * one)

    def trial(self, example: RewardInput) -> None:
        """Sends one request. Raises ValueError if it brings no score."""
        (verdict,) = self([example])
        if verdict.score is None:
            raise ValueError(verdict.message)

    def close(self) -> None:
        with self._lock:
            loop = self._loop
            self._loop = None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._client.aclose(), loop).result(10.0)
            loop.call_soon_threadsafe(loop.stop)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._free = asyncio.Semaphore(self._concurrency)
                self._client = httpx.AsyncClient(
                    base_url=self._url,
                    headers=self._headers,
                    timeout=self._timeout,
                    limits=httpx.Limits(max_connections=self._concurrency),
                )
                threading.Thread(target=self._loop.run_forever, daemon=True, name="judge").start()
            return self._loop

    async def _grade(self, batch: Sequence[RewardInput]) -> list[Verdict]:
        return list(await asyncio.gather(*(self._cached(row) for row in batch)))

    async def _cached(self, row: RewardInput) -> Verdict:
        """The verdict on a row. Requests for an equal row, concurrent or later, share it."""
        text = self._shown(row)
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        task = self._cache.get(key)
        if task is None:
            task = self._cache[key] = asyncio.create_task(self._ask(text))
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        try:
            verdict = await task
        except BaseException:
            self._cache.pop(key, None)
            raise
        if verdict.score is None:
            self._cache.pop(key, None)  # it may be up again the next time
        return verdict

    def _shown(self, row: RewardInput) -> str:
        question = row.messages[-1]["content"] if row.messages else row.plain_prompt or row.prompt
        values = {"question": question, "answer": row.answer, "completion": row.completion}
        return _FIELD.sub(lambda field: values[field[1]], self._prompt)

    async def _ask(self, text: str) -> Verdict:
        start = time.perf_counter()
        body = self._request | {"messages": [*self._system, {"role": "user", "content": text}]}
        problem, pause = "", 0.0
        async with self._free:
            for attempt in range(self._retries + 1):
                if attempt:
                    await asyncio.sleep(pause)
                # random, so that requests refused together are not repeated together
                pause = min(_BACKOFF * 2**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
                try:
                    async with asyncio.timeout(self._timeout):  # httpx's own is for each read
                        response = await self._client.post("chat/completions", json=body)
                except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
                    problem = f"{type(error).__name__} {error}".strip()
                    continue
                if response.status_code == 200:
                    self._finished += 1
                    return self._verdict(response, time.perf_counter() - start)
                problem = f"HTTP {response.status_code} {response.text[:200]}"
                if response.status_code not in _AGAIN and response.status_code < 500:
                    return self._failed(problem, start)
                pause = _asked_pause(response) or pause
        self._finished += 1
        return self._failed(f"{problem}, {self._retries + 1} times", start)

    def _failed(self, problem: str, start: float) -> Verdict:
        return verifier_error(f"judge at {self._url}: {problem}", time.perf_counter() - start)

    def _verdict(self, response: httpx.Response, seconds: float) -> Verdict:
        try:
            reply = response.json()["choices"][0]["message"]["content"]
            said = list(self._pattern.finditer(reply))[-1][1].strip()
        # another's server, a model's words
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            message = f"judge at {self._url}: no score in the reply {response.text[-200:]!r}"
            return verifier_error(message, seconds)
        try:
            score = self._scores[said.lower()] if self._scores else float(said)
        except (KeyError, ValueError):
            return verifier_error(f"judge at {self._url}: {said!r} is no score", seconds)
        score = min(max(score / self._best, 0.0), 1.0)
        status = Status.CORRECT if score >= 1 else Status.WRONG if score <= 0 else Status.PARTIAL
        return Verdict(status=status, score=score, message=reply[-300:], seconds=seconds)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if expression.groups < 1:
        raise ValueError(f"pattern {pattern!r} needs a group around the score, e.g. {PATTERN!r}")
    return expression


def _asked_pause(response: httpx.Response) -> float:
    """Seconds of the `Retry-After` header, at most `_LONGEST_BACKOFF`; 0 if it is absent or a
    date."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), _LONGEST_BACKOFF)
    except ValueError:
        return 0.0
