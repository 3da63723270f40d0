"""Prompts and sampled answers as text for graders and people, and the grading of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..rewards.episode import EPISODE
from ..rewards.inputs import RewardInput
from ..rewards.suite import RewardSuite
from ..rewards.verdict import verifier_error
from ..rollout.samples import Completion, FinishReason, Prompt
from ..rollout.stops import cut
from .config.sampling import RolloutConfig
from .data.templates import framing_ids
from .groups import Group


def conversation(prompt: Prompt, tokenizer: Any) -> tuple[Mapping[str, str], ...]:
    """The messages that reward functions see; () for a model without a chat template, to whose
    reward functions other trainers pass text. `tokenizer` None: not loaded yet; a template is
    assumed."""
    return prompt.messages if tokenizer is None or tokenizer.chat_template is not None else ()


def reward_input(prompt: Prompt, tokenizer: Any, completion: str) -> RewardInput:
    """A problem as rewards see it before its answer is sampled."""
    return RewardInput(
        completion=completion,
        answer=prompt.answer,
        messages=conversation(prompt, tokenizer),
        plain_prompt=plain_prompt(prompt),
        source=prompt.source,
        columns=prompt.columns,
    )


def plain_prompt(prompt: Prompt) -> str | None:
    """The prompt of a row that holds a text; None for a row of messages, or where there is no
    conversation."""
    if not prompt.messages or any(_is_conversation(value) for value in prompt.columns.values()):
        return None
    return prompt.messages[-1]["content"]


def _is_conversation(value: Any) -> bool:
    """Whether a column holds messages, of OpenAI's form or ShareGPT's."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


@dataclass(frozen=True, kw_only=True)
class AnswerReader:
    """Reads the answers of one model under one configuration."""

    tokenizer: Any
    rollout: RolloutConfig
    stop_token_ids: tuple[int, ...]
    """As `model_files.stop_tokens` finds them."""

    def grade(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        suite: RewardSuite,
        *,
        max_tokens: int,
        step: int = 0,
        max_steps: int = 0,
    ) -> Group:
        """The group of these completions with their verdicts. Of an episode the last turn is
        graded, with the earlier ones as part of its prompt; an episode that its environment broke
        has no verdict. max_tokens, step, max_steps: as in `RewardInput`."""
        unmarked = replace(
            self.asked(prompt), max_tokens=max_tokens, step=step, max_steps=max_steps
        )
        sound = [c for c in completions if c.episode is None or not c.episode.failed]
        inputs = [self.marked(unmarked, prompt, completion) for completion in sound]
        graded = iter(suite.grade(inputs))
        verdicts = [
            (
                verifier_error(f"rollout.environment, {c.episode.status}: {c.episode.message}")
                if c.episode is not None and c.episode.failed
                else next(graded)
            )
            for c in completions
        ]
        return Group(prompt=prompt, completions=tuple(completions), verdicts=tuple(verdicts))

    def asked(self, prompt: Prompt) -> RewardInput:
        """The grader's input for a problem, without an answer."""
        whole = self.tokenizer.decode(list(prompt.token_ids)).removesuffix(prompt.prefix)
        return replace(reward_input(prompt, self.tokenizer, ""), prompt=whole)

    def marked(self, asked: RewardInput, prompt: Prompt, completion: Completion) -> RewardInput:
        """The grader's input `asked` with an answer; of an episode, its last turn after the
        others."""
        start, episode = completion.last_turn, completion.episode
        answered = replace(
            asked,
            completion=self.text(prompt, completion),
            token_ids=tuple(completion.token_ids[start:].tolist()),
            finish_reason=completion.finish_reason,
            max_tokens=asked.max_tokens - start,
        )
        if episode is None:
            return answered
        before = [*prompt.token_ids, *completion.token_ids[:start].tolist()]
        told = {"reward": episode.reward, "turns": len(episode.turns), "status": episode.status}
        earlier = episode.messages[:-1] if self.tokenizer.chat_template is not None else ()
        return replace(
            answered,
            prompt=self.tokenizer.decode(before) if start else asked.prompt,
            messages=(*asked.messages, *earlier),
            columns={**asked.columns, EPISODE: told},
        )

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """An answer as text for graders and people: the prompt's prefix of it, then the sampled
        text; of an episode its last turn."""
        if completion.episode is not None:
            return completion.episode.messages[-1]["content"]
        return prompt.prefix + self.said(completion.token_ids.tolist(), completion.finish_reason)

    def said(self, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
        """Sampled tokens as text, without the end token and other tokens of the chat template, up
        to a stop string (`rollout.include_stop`)."""
        rollout = self.rollout
        stopped = finish_reason == "stop"
        by_string = stopped and rollout.stop and token_ids[-1] not in self.stop_token_ids
        if stopped and not by_string:
            token_ids = token_ids[:-1]
        text: str = self.tokenizer.decode([t for t in token_ids if t not in self._framing])
        return cut(text, rollout.stop, keep=rollout.include_stop) if by_string else text

    def problem(self, prompt: Prompt) -> str:
        """The question for a person: the last message, without the chat template's additions."""
        if prompt.messages:
            return prompt.messages[-1]["content"]
        text: str = self.tokenizer.decode([t for t in prompt.token_ids if t not in self._framing])
        return text

    @cached_property
    def _framing(self) -> frozenset[int]:
        return framing_ids(self.tokenizer)
