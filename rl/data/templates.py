"""Text to token ids, the only places where that happens: prompts, and worked solutions for supervised learning."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from ...rollout.samples import Prompt
from ..config.data import DataConfig


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> Any: ...


def render(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None
) -> str:
    """The text that the model continues: by the chat template, or the plain contents where there is none.

    arguments: of the template, as in `data.template_args`. ValueError where the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    conversation = [dict(message) for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **(arguments or {}))
        )
    except Exception as error:  # jinja's own, and whatever a template raises: it is code that came with the model
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template of the model refuses messages of {roles}: {error}") from error


def framing_ids(tokenizer: Any) -> frozenset[int]:
    """The special tokens that only frame a conversation: the beginning, the end, padding, and those of the chat template.

    A pair of tags such as `<think>` and `</think>` is part of what was said, special or not.
    """
    added = {token.content: (id, token.special) for id, token in tokenizer.added_tokens_decoder.items()}
    template = tokenizer.chat_template or ""
    framing = [
        id
        for text, (id, special) in added.items()
        if special and str(text) in str(template) and not _is_tag(text, added)
    ]
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(framing) | {id for id in roles if id is not None}


def _is_tag(text: str, others: Collection[str]) -> bool:
    """Whether this is one of two tags that open and close something."""
    name = text.strip("</>")
    return text in (f"<{name}>", f"</{name}>") and {f"<{name}>", f"</{name}>"} <= set(others)


def prompt_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a rendered prompt. A chat template writes its own special tokens; plain text gets the tokenizer's."""
    return _encode(text, tokenizer, add_special_tokens=tokenizer.chat_template is None)


def supervised_ids(prompt: Prompt, solution: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt, the solution and the end token; the first `len(prompt.token_ids)` of them are not learnt."""
    ids = _encode(solution, tokenizer, add_special_tokens=False)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer of model.path has no eos_token, so a solution could never end; set one in it")
    return (*prompt.token_ids, *ids, int(tokenizer.eos_token_id))


class PromptWriter:
    """Makes a `Prompt` of a question or of messages, with the template, system prompt and limit of the settings."""

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer

    def question(self, question: str, *, id: str, answer: str, source: str, columns: Mapping[str, Any]) -> Prompt:
        """A single user's message: the question, or `data.prompt_template` filled with the columns."""
        template = self._settings.prompt_template
        content = question if template is None else fill(template, columns)
        return self.conversation(
            ({"role": "user", "content": content},), id=id, answer=answer, source=source, columns=columns
        )

    def conversation(
        self, messages: Sequence[Mapping[str, str]], *, id: str, answer: str, source: str, columns: Mapping[str, Any]
    ) -> Prompt:
        system = self._settings.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        text = render(messages, self._tokenizer, self._settings.template_args)
        ids = prompt_ids(text, self._tokenizer)
        return Prompt(id=id, token_ids=ids, answer=answer, source=source, messages=tuple(messages), columns=columns)

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.token_ids) <= self._settings.max_prompt_length

    def too_long(self, what: str, length: int | None) -> str:
        """The error for a prompt that does not fit."""
        has = "fits" if length is None else f"has {length} tokens, more than"
        return f"{what} {has} data.max_prompt_length={self._settings.max_prompt_length}; raise it" + (
            "" if self._settings.overlong == "drop" else ", or set data.overlong=drop"
        )


_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """Puts columns into a template: `{name}`, with `{{` and `}}` for braces; `\\boxed{}` stays as it is."""

    def value(match: re.Match[str]) -> str:
        return match.group()[0] if match.group(1) is None else str(column(columns, match.group(1)))

    return _FIELD.sub(value, template)


def fields(template: str) -> list[str]:
    """The columns that a template names."""
    return [name for name in _FIELD.findall(template) if name]


def column(row: Mapping[str, Any], path: str) -> Any:
    """The value at `reward_model.ground_truth` and the like; KeyError says what is there instead."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(missing(path, value if isinstance(value, Mapping) else row))
        value = value[part]
    return value


def missing(name: str, columns: Collection[str]) -> str:
    """`there is no column 'x'; ...` with the columns that exist and the nearest."""
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(columns), n=1)
    return f"there is no column {name!r}, only {', '.join(columns) or 'none at all'}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


def _encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> tuple[int, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return tuple(backend.encode(text, add_special_tokens=add_special_tokens).ids)  # the wrapper costs 12 us more
    except Exception as error:  # tokenizers raises nothing more precise, and the text is whatever a file holds
        raise ValueError(f"the tokenizer of the model cannot encode {text[:200]!r}: {error}") from error


__all__ = [
    "PromptWriter",
    "Tokenizer",
    "column",
    "fields",
    "fill",
    "framing_ids",
    "missing",
    "prompt_ids",
    "render",
    "supervised_ids",
]
