"""One sample on its way through an engine that runs in other processes: what is known of it here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .samples import Completion, FinishReason, Prompt, Sampling, Span, merge_spans

REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Decoded(NamedTuple):
    """What an engine's processes returned for one request."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str


NOTHING = Decoded((), (), "abort")


@dataclass(kw_only=True, eq=False)
class InFlight:
    """One sample. It may be sent more than once: anew when its engine was lost, or had no token of it at an update."""

    prompt: Prompt
    number: int
    """Its index within the group."""
    sampling: Sampling
    outcomes: asyncio.Queue[Completion | BaseException]
    """Where its completion, or the error that ended it, goes."""
    request_id: str = ""
    tokens: int = 0
    """Decoded so far, as far as this process has heard."""
    begun: float = 0.0
    """When the first of them came, in seconds that the engine has served."""
    spans: list[Span] = field(default_factory=list)
    """Of the tokens of versions that are no longer served."""
    started: float = field(default_factory=time.time)
    work: asyncio.Future[Decoded] | None = None
    restart: bool = False
    """What comes of the present request does not count: it is sent anew."""
    unwanted: bool = False
    """Somebody aborted it."""
    partial: Completion | None = None

    def send_as(self, request_id: str) -> None:
        """It starts from nothing under this id."""
        self.request_id, self.tokens, self.spans, self.restart = request_id, 0, [], False

    def take_back(self) -> None:
        """Its present request is lost; it is to be sent anew."""
        self.restart = True
        if self.work is not None:
            self.work.cancel()

    def close_span(self, version: int) -> None:
        """The tokens that no span covers yet are of `version`."""
        if self.tokens > self._covered:
            self.spans.append(Span(version, self._covered, self.tokens))

    def completion(self, decoded: Decoded, version: int) -> Completion:
        """`version` is of the tokens that no span covers."""
        reason = REASONS.get(decoded.finish_reason)
        if reason is None:
            raise RuntimeError(f"a sample of prompt {self.prompt.id} ended with {decoded.finish_reason!r}")
        count, start = len(decoded.token_ids), self._covered
        assert start <= count <= self.tokens, (
            f"{count} tokens came, {self.tokens} were counted, {start} before an update"
        )
        rest = [Span(version, start, count)] if count > start else []
        return Completion(
            prompt_id=self.prompt.id,
            sample=self.number,
            token_ids=np.array(decoded.token_ids, np.int32),
            logprobs=np.array(decoded.logprobs, np.float32),
            spans=merge_spans([*self.spans, *rest]),
            finish_reason=reason,
            started=self.started,
            finished=time.time(),
        )

    @property
    def _covered(self) -> int:
        return self.spans[-1].stop if self.spans else 0


__all__ = ["NOTHING", "Decoded", "InFlight"]
