"""The environment of `rollout.environment` for the pool: the user's class, and its observations as
tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..rewards.plugins.loading import describe, import_function
from ..rollout.environments import Episodes
from .config.data import DataConfig
from .config.load import Config
from .data.templates import render, with_prefix

_TURN, _OBSERVATION = "THE TURN", "THE OBSERVATION"


def load_environment(name: str) -> Callable[[], Any]:
    """The class `package.module:Class` or `./file.py:Class`. Raises ValueError if it cannot be
    loaded, made, or has not the methods of an environment."""
    try:
        make: Callable[[], Any] = import_function(name)
    except ValueError as error:
        raise ValueError(f"rollout.environment={name}: {error}") from error
    try:
        environment = make()
    except Exception as error:  # a user's code may fail in any way
        raise ValueError(f"rollout.environment={name}: {describe(error)}") from error
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise ValueError(f"rollout.environment={name} has no method {method}; give it one")
    return make


def episodes_of(config: Config, tokenizer: Any, text: Callable[..., str]) -> Episodes | None:
    """The loop over turns; None without an environment. Raises ValueError if the class cannot be
    used, or the chat template shows no message of its role. text: turns a turn's tokens and finish
    reason into text."""
    rollout = config.rollout
    if rollout.environment is None:
        return None
    make = load_environment(rollout.environment)
    role = str(getattr(make, "role", "user"))
    return Episodes(
        make,
        text=text,
        observe=observer(tokenizer, role, config.data),
        role=role,
        prefix=config.data.assistant_prefix,
        max_turns=rollout.max_turns,
        timeout=rollout.environment_timeout,
    )


def observer(tokenizer: Any, role: str, settings: DataConfig) -> Callable[[str, int], list[int]]:
    """A function (observation, last token of the turn before) -> the tokens between that turn and
    the next.

    The text is the chat template's, end of the turn included, without the end token that the model
    sampled itself, followed by the beginning of every answer (`data.assistant_prefix`); without a
    template it is the observation and that beginning. It is tokenised by itself, so no token of an
    earlier turn can change. Raises ValueError if the template shows no message of this role."""
    before = after = ""
    if tokenizer.chat_template is not None:
        problem, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}
        observed = {"role": role, "content": _OBSERVATION}
        shown = render(
            [problem, answer, observed],
            tokenizer,
            tokenizer.chat_template,
            settings.chat_template_kwargs,
        )
        before, seen, after = shown.rpartition(_TURN)[2].partition(_OBSERVATION)
        if _TURN not in shown or not seen:
            raise ValueError(
                f"the chat template of the model shows no message of the role {role!r} after an"
                " answer; set the environment's `role` to one that it knows"
            )

    after, _ = with_prefix(after, settings.assistant_prefix)

    def observe(observation: str, last: int) -> list[int]:
        text = before.removeprefix(tokenizer.decode([last])) + observation + after
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises nothing more precise, for any text
            shown = repr(observation[:200])
            raise ValueError(
                f"the tokenizer cannot encode the observation {shown}: {error}"
            ) from error
        return ids

    return observe
