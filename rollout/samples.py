"""The inputs of an engine, `Prompt` and `Sampling`, and its output, `Completion`.

Only token ids travel from here to the learner: text is decoded once for the grader and never
tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: an end token, or the token that completes a stop string (either is part of the
completion); `length`: `max_tokens` reached; `abort`: cut short by us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem, e.g.
    `Prompt(id="arithmetic/17", token_ids=(9, 14, 8, 18), answer="12", source="arithmetic")`."""

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
    """The beginning of the answer that the prompt's last tokens already contain. Verifiers read it
    before the sampled text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the data row, handed to reward functions by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling parameters, applied in this order: repetition penalty, temperature, min-p, top-k,
    top-p.

    Log-probs are of the renormalised distribution after all of them, the one that is sampled. A
    learner applies the temperature alone, so with any other parameter set it cannot take them as
    its old policy's.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are never drawn; 0 means all. Greedy
    answers know no min-p, top-k and top-p."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the prompt or the answer so far are divided by it, or multiplied
    where they are negative (CTRL, arXiv 1909.05858); 1 means none."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends a completion and is its last token."""
    stop: tuple[str, ...] = ()
    """The token that completes one of these texts ends a completion and is its last. Only sampled
    tokens count."""
    seed: int = 0
    """Fixes every draw, together with the prompt's id and the sample's index, whatever else is in
    the batch."""


class Span(NamedTuple):
    """Tokens `start:stop` of a completion were sampled by weights of `version` (or stand among such
    tokens)."""

    version: int
    start: int
    stop: int


EpisodeStatus = Literal["done", "max_turns", "length", "error", "timeout", "bad_reply"]
"""Why an episode ended: the environment said so; `rollout.max_turns`; no room for another turn; or
the environment raised, was late, or returned something else than (observation, reward, done)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """The turns of a completion, and how its environment ended them."""

    turns: tuple[int, ...]
    """Index of each turn's first token among the completion's tokens."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation after the prompt, as text: the model's turns, and the observations between
    them."""
    reward: float | None
    """The sum of the turns' rewards; None where the environment gave none."""
    status: EpisodeStatus
    message: str = ""
    """The error, in one line."""

    @property
    def failed(self) -> bool:
        """Whether the environment failed, so that the episode says nothing about the policy."""
        return self.status in ("error", "timeout", "bad_reply")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One sampled answer: aligned arrays over its T tokens, and where each token's weights came
    from."""

    prompt_id: str
    sample: int
    """Index within the group, 0..G-1."""
    token_ids: NDArray[np.int32]
    """[T]"""
    logprobs: NDArray[np.float32]
    """[T] log-prob of each token under the distribution it was drawn from; 0 for a token that was
    not drawn."""
    spans: tuple[Span, ...]
    """Cover 0..T in order without a gap; more than one if weights changed in flight."""
    finish_reason: FinishReason
    started: float = 0.0
    """Wall-clock time (`time.time()`) of admission to the engine."""
    finished: float = 0.0
    worker: int = 0
    """Number of the rollout worker that decoded it, or its last turn."""
    loss_mask: NDArray[np.bool_] | None = None
    """[T] whether the token was drawn from the policy, and so trains; None: all were. Others are an
    environment's words."""
    episode: Episode | None = None
    """Its turns; None without an environment."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert len(self.logprobs) == n, f"{n} tokens but {len(self.logprobs)} log-probs"
        assert self.loss_mask is None or len(self.loss_mask) == n, (
            f"{n} tokens but a mask of {len(self.loss_mask)}"
        )
        edge = 0
        for span in self.spans:
            assert span.start == edge and span.stop > edge, (
                f"spans {self.spans} do not tile {n} tokens"
            )
            edge = span.stop
        assert edge == n, f"spans {self.spans} do not tile {n} tokens"

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[T] `loss_mask` in full."""
        return np.ones(len(self), bool) if self.loss_mask is None else self.loss_mask

    @property
    def num_sampled(self) -> int:
        """Tokens that were drawn from the policy."""
        return len(self) if self.loss_mask is None else int(self.loss_mask.sum())

    @property
    def open_turn(self) -> list[int]:
        """The tokens sampled after the last one that was not."""
        others = np.flatnonzero(~self.mask)
        start = int(others[-1]) + 1 if len(others) else 0
        tokens: list[int] = self.token_ids[start:].tolist()
        return tokens

    @property
    def sampled_by_version(self) -> list[tuple[int, int]]:
        """(version, tokens that it sampled) of each span that has any."""
        counts = [
            (span.version, int(self.mask[span.start : span.stop].sum())) for span in self.spans
        ]
        return [(version, count) for version, count in counts if count]

    @property
    def last_turn(self) -> int:
        """Index of the first token of the model's last turn."""
        return 0 if self.episode is None else self.episode.turns[-1]

    @property
    def oldest_version(self) -> int:
        """The oldest version among the tokens'; 0 without tokens."""
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
