"""Prompts as data sets hold them: text, messages in several spellings, content parts, and any of
these as JSON text."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Message = Mapping[str, str]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
}
_USUAL = ("user", "assistant", "system", "tool", "function")
"""A role close to one of these is taken for a typing error; any other may be a template's own."""
_SIDES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "input", "question", "prompt", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "output", "answer", "response"), "assistant"),
}


def read_messages(value: Any) -> str | tuple[Message, ...]:
    """A text as it is, or a conversation as messages `{"role", "content"}`, with the roles user,
    assistant, system and others.

    Raises ValueError if the value is neither; its message is the end of a sentence.
    """
    if isinstance(value, str):
        opened = _opened(value)
        if opened is None:
            return value
        value = opened
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("messages", "conversations") if key in value), [value])
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if (
        not isinstance(value, Sequence)
        or not value
        or not all(isinstance(message, Mapping) for message in value)
    ):
        raise ValueError(
            f"must be text or a list of messages with role and content, got {value!r:.80}"
        )
    return tuple(_message(each) for message in value for each in _turns(message))


def _turns(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The messages of an exchange whose keys are its sides, e.g. `{"human", "assistant"}` or
    `{"system", "input", "output"}`; any other message unchanged."""
    if "role" in message or "from" in message:
        return [message]
    said = [
        {"role": _SIDES[key], "content": text}
        for key, text in sorted(
            message.items(),
            key=lambda item: list(_SIDES).index(item[0]) if item[0] in _SIDES else 99,
        )
        if key in _SIDES and isinstance(text, str) and text.strip()
    ]
    return said if any(turn["role"] == "user" for turn in said) else [message]


def split_off_reply(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """The conversation up to the last message that is not the assistant's, and the text of those
    after it."""
    kept = list(messages)
    reply: list[str] = []
    while kept and kept[-1]["role"] == "assistant":
        reply.insert(0, kept.pop()["content"])
    return tuple(kept), "\n".join(reply)


def _message(message: Mapping[str, Any]) -> Message:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise ValueError(
            f"must be text or a list of messages with role and content, got {message!r:.80}"
        )
    role = _ROLES.get(role.lower(), role.lower())
    if role not in _USUAL and (near := get_close_matches(role, _USUAL, n=1, cutoff=0.75)):
        raise ValueError(f"has a message of role {role!r}; is {near[0]!r} meant?")
    return {"role": role, "content": _text(content, message)}


def _text(content: Any, message: Mapping[str, Any]) -> str:
    if isinstance(content, str):
        return content
    if content is None and "ground_truth" in message:  # Open-Reasoner-Zero's last turn
        return ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        parts = [
            part.get("text") if part.get("type", "text") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(str(part) for part in parts)
        kinds = ", ".join(sorted({str(part.get("type")) for part in content}))
        raise ValueError(f"has messages with parts of {kinds}; only text can be used")
    raise ValueError(
        f"must be text or a list of messages with role and content, got {message!r:.80}"
    )


def _opened(text: str) -> Any:
    """The messages that a text spells as JSON or as Python prints them; None for an ordinary
    text."""
    start = text.lstrip()[:2]
    if start[:1] not in ("[", "{") or not (
        '"role"' in text or "'role'" in text or '"from"' in text
    ):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    turns = value if isinstance(value, list) else [value]
    return (
        value
        if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
        else None
    )
