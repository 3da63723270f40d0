"""Text to token ids, the only places where that happens: prompts, and worked solutions for supervised learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..rollout.samples import Prompt


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def render(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text that the model continues: by the chat template, or the plain contents where there is none."""
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    conversation = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def prompt_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a rendered prompt. A chat template writes its own special tokens; plain text gets the tokenizer's."""
    return _encode(text, tokenizer, add_special_tokens=tokenizer.chat_template is None)


def supervised_ids(prompt: Prompt, solution: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt, the solution and the end token; the first `len(prompt.token_ids)` of them are not learnt."""
    ids = _encode(solution, tokenizer, add_special_tokens=False)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer of model.path has no eos_token, so a solution could never end; set one in it")
    return (*prompt.token_ids, *ids, int(tokenizer.eos_token_id))


def _encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> tuple[int, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encode = tokenizer.encode if backend is None else backend.encode  # the wrapper would cost more than the work
    try:
        encoded = encode(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # tokenizers raises nothing more precise, and the text is whatever a file holds
        raise ValueError(f"the tokenizer cannot encode {text[:200]!r}: {error}") from error
    return tuple(encoded if backend is None else encoded.ids)


__all__ = ["Tokenizer", "prompt_ids", "render", "supervised_ids"]
