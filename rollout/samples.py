"""The nouns `Prompt`, `Sampling` and `Completion`: what goes into an engine and what comes out of it.

Token ids are the truth from here to the learner: text is decoded once for the grader and never tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: an end token, or the token that completes a stop string (either is part of the completion); `length`:
`max_tokens` reached; `abort`: cut short by us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem, e.g. `Prompt(id="arithmetic/17", token_ids=(9, 14, 8, 18), answer="12", source="arithmetic")`."""

    id: str
    """Unique within a run; names the problem, not the attempt."""
    token_ids: tuple[int, ...]
    answer: str
    """The reference answer that the grader compares with; empty where a task needs none."""
    source: str
    """The data source, as in `val-core/{source}/acc/mean@1`."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation before the chat template, each `{"role": ..., "content": ...}`."""
    prefix: str = ""
    """The beginning of the answer, where the prompt has it already: its last tokens. Verifiers read it before what was
    sampled."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the data row, handed to reward functions by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn, in this order: repetition penalty, temperature, min-p, top-k, top-p.

    Log-probs are of the distribution that is left after all of them, renormalised, so the one really sampled. A learner,
    which knows the temperature alone, cannot take them for its old policy where anything else is set.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are never drawn; 0 means all. Greedy answers know no min-p,
    top-k and top-p."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the prompt or the answer so far are divided by it, or multiplied where they are
    negative (CTRL, arXiv 1909.05858); 1 means none."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends a completion and is its last token."""
    stop: tuple[str, ...] = ()
    """The token that completes one of these texts ends a completion and is its last. Only sampled tokens count."""
    seed: int = 0
    """With the prompt's id and the sample's index it fixes every draw, whatever else shares the batch."""


class Span(NamedTuple):
    """Tokens `start:stop` of a completion were sampled by weights of `version`."""

    version: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One sampled answer: aligned arrays over its T tokens, and where each token's weights came from."""

    prompt_id: str
    sample: int
    """Index within the group, 0..G-1."""
    token_ids: NDArray[np.int32]
    """[T]"""
    logprobs: NDArray[np.float32]
    """[T] log-prob of each token under the distribution it was drawn from."""
    spans: tuple[Span, ...]
    """Cover 0..T in order without a gap; more than one if weights changed in flight."""
    finish_reason: FinishReason
    started: float = 0.0
    """Wall-clock time (`time.time()`) of admission to the engine."""
    finished: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert len(self.logprobs) == n, f"{n} tokens but {len(self.logprobs)} log-probs"
        edge = 0
        for span in self.spans:
            assert span.start == edge and span.stop > edge, f"spans {self.spans} do not tile {n} tokens"
            edge = span.stop
        assert edge == n, f"spans {self.spans} do not tile {n} tokens"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        """The version of the stalest token (of the newest weights where there is no token)."""
        return min((span.version for span in self.spans), default=0)


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Joins neighbours of equal version."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            merged[-1] = merged[-1]._replace(stop=span.stop)
        else:
            merged.append(span)
    return tuple(merged)


__all__ = ["Completion", "FinishReason", "Prompt", "Sampling", "Span", "merge_spans"]
