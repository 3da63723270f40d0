"""From a prompt to what reward functions see of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..rewards.inputs import RewardInput
from ..rollout.samples import Prompt


def conversation(prompt: Prompt, tokenizer: Any) -> tuple[Mapping[str, str], ...]:
    """The messages that reward functions see; none where the model reads plain text, since without
    a chat template peers hand their functions texts. `tokenizer` is None before one is loaded,
    where a template is assumed."""
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
