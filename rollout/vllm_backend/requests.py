"""The state of a sample that an engine in other processes decodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..embedded.sampling import stream_key
from ..engine import Partials, Request
from ..samples import Completion, FinishReason, Prompt, Sampling, Span, merge_spans
from ..stops import StopMatcher, StopStrings

Count = Callable[[str, Sequence[int]], None]
"""A callback for new tokens as they come: (request id, tokens)."""
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Decoded(NamedTuple):
    """The tokens and log-probs of one request from an engine's processes."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str
    spans: tuple[Span, ...] | None = None
    """The versions of the tokens, if those processes report them."""


NOTHING = Decoded((), (), "abort")


def parameters(sampling: Sampling) -> dict[str, Any]:
    """vLLM's sampling parameters, without stop strings: `LiveSample` matches these in the tokens
    that come."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids alone decide what ends a completion
        "seed": sampling.seed,
        "logprobs": 0,
        "detokenize": False,
    }


@dataclass(kw_only=True, eq=False)
class LiveSample:
    """One sample. It may be sent more than once: it is restarted if its engine is lost, or if it
    has no token yet at an update."""

    prompt: Prompt
    number: int
    """Its index within the group."""
    sampling: Sampling
    outcomes: asyncio.Queue[Completion | BaseException]
    """The queue for its completion, or for the error that ended it."""
    stop: StopMatcher | None = None
    partial: Completion | None = None
    """The tokens with which it was requested, and from which it continues."""
    request_id: str = ""
    tokens: int = 0
    """Tokens beyond `partial` that have come so far."""
    tail: bytes | None = b""
    """The state of the stop matcher; None: a stop string is complete."""
    stopped: int | None = None
    """The count of tokens up to the one that completed a stop string; engines decode some beyond
    it."""
    came: float = 0.0
    """The time of the first of them, in seconds that the engine has served."""
    spans: list[Span] = field(default_factory=list)
    """The spans of the tokens of versions that are no longer served."""
    started: float = field(default_factory=time.time)
    work: asyncio.Future[Decoded] | None = None
    restart: bool = False
    """Whether the result of the current request is to be discarded, and the sample sent again."""
    unwanted: bool = False
    """Whether it was aborted."""
    aborted: Completion | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens that an engine reads before it decodes: the prompt's and `partial`'s."""
        return [
            *self.prompt.token_ids,
            *(() if self.partial is None else self.partial.token_ids.tolist()),
        ]

    @property
    def wanted(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - (0 if self.partial is None else len(self.partial))

    @property
    def seed(self) -> int:
        """The seed of its draws, of 63 bits as torch takes it."""
        key = stream_key(self.sampling.seed, self.prompt.id, self.number)
        if self.partial is not None and len(self.partial):
            # another seed, since a continuation must not repeat the draws of its beginning
            key = stream_key(key, self.prompt.id, len(self.partial))
        return key >> 1

    def send_as(self, request_id: str) -> None:
        """Resets it to the state in which it was requested, under a new id."""
        self.request_id = request_id
        self.tokens = 0
        self.spans = []
        self.restart = False
        self.tail = b""
        self.stopped = None
        if self.stop is not None and self.partial is not None:
            self.tail = self.stop.tail(self.partial.open_turn)

    def take(self, token_ids: Sequence[int]) -> bool:
        """Counts tokens as they come; True if one of them completes a stop string, after which no
        more are wanted."""
        before = self.tokens
        self.tokens += len(token_ids)
        if self.stop is None or self.tail is None:
            return False
        for count, token in enumerate(token_ids, before + 1):
            self.tail = self.stop.step(self.tail, token)
            if self.tail is None:
                self.stopped = count
                return True
        return False

    def take_back(self) -> None:
        """Marks its current request as lost, so that it is sent again."""
        self.restart = True
        if self.work is not None:
            self.work.cancel()

    def close_span(self, version: int) -> None:
        """Adds a span of `version` for the tokens that no span covers yet."""
        if self.tokens > self._covered:
            self.spans.append(Span(version, self._covered, self.tokens))

    def completion(self, decoded: Decoded, version: int) -> Completion:
        """The completion of the whole sample. version: that of the tokens that no span covers.
        Raises RuntimeError for an unknown finish reason."""
        reason = REASONS.get(decoded.finish_reason)
        if reason is None:
            raise RuntimeError(
                f"a sample of prompt {self.prompt.id} ended with {decoded.finish_reason!r}"
            )
        count, start = len(decoded.token_ids), self._covered
        assert start <= count <= self.tokens, (
            f"{count} tokens came, {self.tokens} were counted, {start} before an update"
        )
        token_ids, logprobs = (
            np.array(decoded.token_ids, np.int32),
            np.array(decoded.logprobs, np.float32),
        )
        spans = (
            [*self.spans, Span(version, start, count)]
            if decoded.spans is None
            else [*decoded.spans]
        )
        if self.stopped is not None:
            reason, end = "stop", self.stopped
            assert end <= count, f"{count} tokens came of {end} up to a stop string"
            token_ids, logprobs = token_ids[:end], logprobs[:end]
            spans = [Span(v, first, min(last, end)) for v, first, last in spans]
        started, before = self.started, self.partial
        if before is not None:
            had = len(before)
            token_ids, logprobs = (
                np.append(before.token_ids, token_ids),
                np.append(before.logprobs, logprobs),
            )
            spans = [*before.spans, *(Span(v, first + had, stop + had) for v, first, stop in spans)]
            started = before.started
        return Completion(
            prompt_id=self.prompt.id,
            sample=self.number,
            token_ids=token_ids,
            logprobs=logprobs,
            spans=merge_spans([span for span in spans if span.stop > span.start]),
            finish_reason=reason,
            started=started,
            finished=time.time(),
        )

    @property
    def _covered(self) -> int:
        return self.spans[-1].stop if self.spans else 0


def samples_of(
    requests: Sequence[Request],
    partials: Partials,
    outcomes: asyncio.Queue[Completion | BaseException],
    stop_strings: StopStrings,
) -> Iterator[LiveSample]:
    """Yields every sample of these requests; of a prompt in `partials` only the ones there, to go
    on."""
    for prompt, n, sampling in requests:
        stop = stop_strings.matcher(sampling.stop)
        parts: Sequence[Completion | None] = partials.get(prompt.id) or [None] * n
        for index, part in enumerate(parts):
            assert part is None or (part.prompt_id == prompt.id and len(part) < sampling.max_tokens)
            number = index if part is None else part.sample
            yield LiveSample(
                prompt=prompt,
                number=number,
                sampling=sampling,
                outcomes=outcomes,
                stop=stop,
                partial=part,
            )
