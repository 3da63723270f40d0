"""Text to token ids: prompts by the chat template, and worked solutions for supervised learning.
Nothing else tokenises."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .columns import fill

T = TypeVar("T")
ASSISTANTS = ("assistant", "model", "gpt", "bot")
"""The names that data sets give to the role that answers."""
TOOLS = ("tool", "function", "ipython", "observation")
"""Roles whose messages some templates write in another form."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: Any,
        tokenize: bool,
        add_generation_prompt: bool,
        **arguments: Any,
    ) -> Any: ...


def template_of(settings: DataConfig, tokenizer: Tokenizer) -> str | None:
    """The text of the chat template that `data.template` and `data.chat_template` choose; None:
    prompts are plain text.

    Raises ValueError if there is none, or if it does not use one of the arguments."""
    if settings.template in ("none", "raw"):
        return None
    template, given = tokenizer.chat_template, settings.chat_template
    if given is not None:
        template = given if "{%" in given or "{{" in given else _template_file(given)
    if isinstance(template, Mapping):  # of a model that has several
        name = "tool_use" if "tools" in settings.chat_template_kwargs else "default"
        template = template.get(name, template.get("default"))
    if template is None and settings.template == "chat":
        raise ValueError(
            "data.template=chat, but the tokenizer of model.path has no chat template; give one in"
            " data.chat_template, or set data.template=none"
        )
    for name in settings.chat_template_kwargs:
        if template is None or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"data.chat_template_kwargs: the chat template of the model uses no {name}, so it"
                " would change nothing; leave it out, or give a template that does in"
                " data.chat_template"
            )
    return None if template is None else str(template)


def _template_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.chat_template={name[:200]!r} is no Jinja template (it has no {{{{ }}}} or {{%"
            f" %}}), and no file that can be read: {error}"
        ) from error


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    template: str | None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text that the model continues: by the chat template, or without one the contents, one
    below the other.

    arguments: the template's, as in `data.chat_template_kwargs`. Raises ValueError if the template
    refuses the messages, or leaves out one that is not the assistant's or a tool's.
    """
    if template is None:
        return "\n".join(message["content"] for message in messages)
    conversation = [dict(message) for message in messages]
    merge = "; for a template without a system role set data.merge_system=true"
    hint = merge if messages[0]["role"] == "system" else ""
    try:
        text = str(
            tokenizer.apply_chat_template(
                conversation,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **(arguments or {}),
            )
        )
    # anything: jinja's errors, and those of the template, which is code that came with the model
    except Exception as error:
        line = f"line {number}: " if (number := getattr(error, "lineno", None)) else ""
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses messages of {roles}: {line}{error}{hint}"
        ) from error
    for role, content in ((message["role"], message["content"].strip()) for message in messages):
        if role not in ASSISTANTS + TOOLS and content not in text:
            raise ValueError(
                f"the chat template leaves out the {role}'s message {content[:80]!r}{hint}"
            )
    return text


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the token with which the chat template ends an assistant's turn; None if it has
    none, or if there is no template."""
    if tokenizer.chat_template is None:
        return None
    answer = "Here it ends."
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # anything: some templates refuse these turns, by errors of their own
        return None
    rest = text.rpartition(answer)[2].lstrip() if answer in text else ""
    added = {str(token.content): int(id) for id, token in tokenizer.added_tokens_decoder.items()}
    ends = [content for content in added if rest.startswith(content)]
    return added[max(ends, key=len)] if ends else None


def end_token(tokenizer: Any) -> int:
    """The id of the token that ends a worked solution: the end of a turn, or the tokenizer's end
    token. Raises ValueError if it has neither."""
    end = end_of_turn(tokenizer)
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "the tokenizer of model.path has no eos_token, so a solution could never end; set one"
            " in it"
        )
    return int(end)


def framing_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of special tokens that only frame a conversation: beginning, end, padding, and those
    of the chat template.

    A pair of tags such as `<think>` and `</think>` belongs to the content, special or not.
    """
    added = {
        token.content: (id, token.special) for id, token in tokenizer.added_tokens_decoder.items()
    }
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


def prompt_ids(text: str, tokenizer: Tokenizer, *, chat: bool) -> tuple[int, ...]:
    """The ids of a rendered prompt. A chat template writes its own special tokens; plain text gets
    the tokenizer's beginning token, unless it has it already, and no end token, after which the
    model would not continue."""
    ids = _encode(text, tokenizer, add_special_tokens=not chat)
    if chat:
        return ids
    begin, end = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    if begin is not None and ids[:2] == (begin, begin):
        ids = ids[1:]
    if (
        end is not None
        and ids[-1:] == (end,)
        and not text.endswith(str(getattr(tokenizer, "eos_token", "")))
    ):
        ids = ids[:-1]
    return ids


def supervised_ids(
    prompt: Prompt, solution: str, tokenizer: Tokenizer, end: int
) -> tuple[int, ...]:
    """The ids of the prompt, the solution and the end token. The first `len(prompt.token_ids)` are
    not learnt. The beginning of the solution that the prompt has already is not repeated."""
    begun = prompt.prefix.strip()
    if begun and solution.lstrip().startswith(begun):
        solution = solution.lstrip()[len(begun) :]
        if prompt.prefix.endswith("\n"):
            solution = solution.removeprefix("\n")
    ids = _encode(solution, tokenizer, add_special_tokens=False)
    return (*prompt.token_ids, *ids, end)


class PromptWriter:
    """Makes a `Prompt` of a question or of messages, with the template, system prompt and limit of
    the settings."""

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._template = template_of(settings, tokenizer)

    def question(
        self, question: str, *, id: str, answer: str, source: str, columns: Mapping[str, Any]
    ) -> Prompt:
        """A single user's message: the question, or `data.prompt_template` filled with the
        columns."""
        template = self._settings.prompt_template
        content = question if template is None else fill(template, columns)
        return self.conversation(
            ({"role": "user", "content": content},),
            id=id,
            answer=answer,
            source=source,
            columns=columns,
        )

    def conversation(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        id: str,
        answer: str,
        source: str,
        columns: Mapping[str, Any],
    ) -> Prompt:
        settings = self._settings
        messages, prefix, continued = self._open(messages)
        if settings.system_prompt is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": settings.system_prompt}, *messages)
        if settings.merge_system:
            messages = _merged(messages)
        if settings.template == "raw" and len(messages) > 1:
            raise ValueError(
                "data.template=raw takes a text, but here are several messages; set"
                " data.template=chat"
            )
        text = render(messages, self._tokenizer, self._template, settings.chat_template_kwargs)
        if continued and self._template is None:
            text += "\n"
        text, prefix = with_prefix(text, prefix)
        token_ids = prompt_ids(text, self._tokenizer, chat=self._template is not None)
        if not token_ids:
            raise ValueError(f"the model's tokenizer makes no token of the prompt {text[:80]!r}")
        return Prompt(
            id=id,
            token_ids=token_ids,
            answer=answer,
            source=source,
            messages=tuple(messages),
            prefix=prefix,
            columns=columns,
        )

    def _open(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[Sequence[Mapping[str, str]], str, bool]:
        """The messages before the answer to be sampled, the text that it begins with, and whether
        that text is the row's last message."""
        prefix, asked = self._settings.assistant_prefix, len(messages)
        while asked and messages[asked - 1]["role"] in ASSISTANTS:
            asked -= 1
        if not asked:
            raise ValueError(
                "the conversation is the assistant's alone, so nothing is asked; remove the row"
            )
        if asked == len(messages):
            return messages, prefix, False
        if self._settings.final_answer == "continue":
            return messages[:-1], messages[-1]["content"] or prefix, True
        return messages[:asked], prefix, False

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.token_ids) <= self._settings.max_prompt_length

    def first_fitting(
        self,
        problems: Iterable[T],
        count: int,
        write: Callable[[T, int], Prompt],
        name: Callable[[T], str],
    ) -> list[Prompt]:
        """The first `count` prompts that fit, or fewer if the problems run out. Raises ValueError
        for one that does not fit, unless `data.overlong` is drop.

        write: makes the prompt of a problem, the i-th that fits. name: of a problem, for the error.
        """
        prompts: list[Prompt] = []
        if count == 0:
            return prompts
        for problem in problems:
            prompt = write(problem, len(prompts))
            if self.fits(prompt):
                prompts.append(prompt)
            elif self._settings.overlong == "error":
                raise ValueError(self.too_long(name(problem), len(prompt.token_ids)))
            if len(prompts) == count:
                break
        return prompts

    def too_long(self, what: str, length: int | None) -> str:
        """The error message for a prompt that does not fit."""
        has = "fits" if length is None else f"has {length} tokens, more than"
        return (
            f"{what} {has} data.max_prompt_length={self._settings.max_prompt_length}; raise it"
            + ("" if self._settings.overlong == "drop" else ", or set data.overlong=drop")
        )


def _merged(messages: Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The messages with the system message, if any, put before the first user's, in one message.
    Raises ValueError if another role follows the system's."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    if first["role"] != "user":
        raise ValueError(
            "data.merge_system=true, but the system's message is followed by one of"
            f" {first['role']}"
        )
    return ({**first, "content": f"{system['content']}\n\n{first['content']}"}, *others)


def with_prefix(text: str, prefix: str) -> tuple[str, str]:
    """A rendered prompt with the beginning of the answer appended, and that beginning as it stands
    there: some templates write it themselves."""
    begun = prefix.strip()
    if begun and text.rstrip().endswith(begun):
        return text, text[text.rindex(begun) :]
    return text + prefix, prefix


def _encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> tuple[int, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        # past transformers' wrapper, which costs 12 us more
        return tuple(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    # tokenizers raises plain Exception, and the text is any that a file holds
    except Exception as error:
        raise ValueError(
            f"the tokenizer of the model cannot encode {text[:200]!r}: {error}"
        ) from error
