"""A batch's records of the samples that wait, and of those in its slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..samples import Completion, Prompt, Sampling, Span
from ..stops import StopMatcher
from .kv_cache import PromptState

Deliver = Callable[[Completion], None]


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """Samples of one prompt that wait for slots."""

    prompt: Prompt
    samples: Sequence[int]
    """Indices within the group."""
    sampling: Sampling
    deliver: Deliver
    stop: StopMatcher | None = None
    begun: Completion | None = None
    """The beginning that the only sample of this request has already."""
    placed: int = 0
    """Samples that were given a slot."""
    state: PromptState | None = None
    """The prefilled tokens, kept until the last sample is admitted or the weights change."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that are prefilled: the prompt, and what was decoded before."""
        return self.prompt.token_ids + (
            () if self.begun is None else tuple(self.begun.token_ids.tolist())
        )

    @property
    def left(self) -> Sequence[int]:
        return self.samples[self.placed :]


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """One sample in a slot."""

    request: WaitingRequest
    sample: int
    started: float
    spans: list[Span] = field(default_factory=list)
    """Tokens of earlier weight versions."""
    tail: bytes | None = b""
    """The state of its stop strings."""


@dataclass(slots=True)
class Counters:
    """Work done since the engine started."""

    prefill_tokens: int = 0
    """Prompt tokens computed, pads left out."""
    decode_steps: int = 0
    decode_tokens: int = 0


def unstarted(prompt_id: str, index: int) -> Completion:
    """Of a sample that was aborted before its first token."""
    now = time.time()
    return Completion(
        prompt_id=prompt_id,
        sample=index,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        spans=(),
        finish_reason="abort",
        started=now,
        finished=now,
    )
