"""Control of a model's thoughts: on or off, and ended by force at a budget of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ...rollout.samples import Completion, Prompt, Span, merge_spans
from ...rollout.stops import StopMatcher, token_bytes
from ..config.data import DataConfig
from ..config.sampling import ThinkingConfig

VARIABLES = ("enable_thinking", "thinking")
"""Names of the switch in chat templates: the first in those of Qwen3, GLM and SmolLM3, the second
in DeepSeek's."""
D = TypeVar("D", bound=DataConfig)


def in_mode(settings: D, thinking: ThinkingConfig, template: str | None) -> D:
    """The prompts' settings with `thinking.mode` applied. Raises ValueError if that needs a
    beginning of the answers, and the settings have one already."""
    if thinking.mode == "template":
        return settings
    slow = thinking.mode == "slow"
    for name in VARIABLES:
        if template is not None and re.search(rf"\b{name}\b", template):
            given = {**settings.chat_template_kwargs, name: slow}
            return settings.model_copy(update={"chat_template_kwargs": given})
    if settings.assistant_prefix:
        raise ValueError(
            f"thinking.mode={thinking.mode} sets how answers begin, since the chat template has no"
            f" {' or '.join(VARIABLES)}, but assistant_prefix={settings.assistant_prefix!r} does"
            " so, too; leave one of them out"
        )
    begin = thinking.open if slow else f"{thinking.open}{thinking.close}"
    return settings.model_copy(update={"assistant_prefix": begin})


class Thoughts:
    """Measures the thoughts in the tokens of answers, and ends them at a budget.

    Tokens count one by one, as the engine drew them: a thought of 64 tokens has its closing tag
    among them, and one that is cut at 64 is the first 64 tokens and then `ending`.
    """

    def __init__(self, settings: ThinkingConfig, tokenizer: Any) -> None:
        """Raises ValueError if the tokenizer cannot spell the tags."""
        self.settings = settings
        self._tokenizer = tokenizer
        self._close = StopMatcher((settings.close,), token_bytes(tokenizer))
        text = settings.close if settings.ending is None else settings.ending
        try:
            self.ending: list[int] = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"thinking.ending={text!r} cannot be tokenised ({error}); set another"
            ) from error

    def length(self, prompt: Prompt, token_ids: Sequence[int]) -> int:
        """Tokens of the thoughts at the beginning of an answer, closing tag included: all tokens if
        they are not closed, 0 if they are not opened."""
        return self._measured(prompt, token_ids)[0]

    def _measured(self, prompt: Prompt, token_ids: Sequence[int]) -> tuple[int, bool]:
        """(`length`, whether the thoughts are still open at the end of the answer)."""
        if not self._opened(prompt, token_ids):
            return 0, False
        tail = b""
        for count, token in enumerate(token_ids, 1):
            after = self._close.step(tail, token)
            if after is None:
                return count, False
            tail = after
        return len(token_ids), True

    def _opened(self, prompt: Prompt, token_ids: Sequence[int]) -> bool:
        opening = self.settings.open.strip()
        if not opening:
            return True
        begin = self._tokenizer.decode(list(token_ids[: len(opening) + 1]))
        before = self._tokenizer.decode(list(prompt.token_ids[-len(opening) - 1 :]))
        return bool(begin.lstrip().startswith(opening) or before.rstrip().endswith(opening))

    def cut(self, prompt: Prompt, whole: Completion, budget: int) -> Completion | None:
        """The answer with its thoughts ended at `budget` tokens, for an engine to continue; None if
        they end within the budget by themselves."""
        length, still_open = self._measured(prompt, whole.token_ids.tolist())
        goes_on = length == budget and still_open and whole.finish_reason == "length"
        if length <= budget and not goes_on:
            return None
        count, ending = len(self.ending), np.array(self.ending, np.int32)
        spans = [
            Span(span.version, span.start, min(span.stop, budget))
            for span in whole.spans
            if span.start < budget
        ]
        spans.append(Span(spans[-1].version, budget, budget + count))
        return replace(
            whole,
            prompt_id=prompt.id,
            token_ids=np.concatenate([whole.token_ids[:budget], ending]),
            logprobs=np.concatenate([whole.logprobs[:budget], np.zeros(count, np.float32)]),
            loss_mask=np.concatenate([np.ones(budget, bool), np.zeros(count, bool)]),
            spans=merge_spans(spans),
            finish_reason="abort",
        )


def split(text: str, settings: ThinkingConfig, *, opened: bool = False) -> tuple[str, str]:
    """(thoughts, answer) of the text of an answer, tags left out. opened: the prompt opened
    them."""
    begin, said = settings.open.strip(), text.lstrip()
    if not (opened or said.startswith(begin)) or (not begin and settings.close not in text):
        return "", text
    thought, closed, answer = said.removeprefix(begin).partition(settings.close)
    return thought.strip("\n"), answer.lstrip("\n") if closed else ""
