"""Loads rewards by name: built-in ones, installed entry points (group `emberl.rewards`), and
functions of a package or file."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from .inputs import Reward
from .plugins.loading import resolve
from .plugins.reward import PluginReward

GROUP = "emberl.rewards"
BUILT_IN = {
    "math": ".math_answers.reward:MathReward",
    "code": ".code_tests.reward:CodeReward",
    "gym": ".gym:GymReward",
    "environment": ".episode:EnvironmentReward",
    "judge": ".judge_model:JudgeReward",
    "format": ".shaping:FormatReward",
    "language": ".shaping:LanguageReward",
    "overlong": ".shaping:OverlongReward",
    "repetition": ".shaping:RepetitionReward",
}


def load_reward(
    use: str,
    *,
    style: str | None = None,
    timeout: float | None = None,
    concurrency: int | None = None,
    isolation: str | None = None,
    options: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Reward:
    """The reward that `use` names, e.g. `load_reward("math")` or
    `load_reward("./mine.py:score", style="verl")`.

    `options` are the reward's own keywords; `timeout` (s per sample or call) and `concurrency`
    (processes) go to rewards that have them; `style`, `isolation` and `kwargs` (given to every call
    of the function) are for functions of a user's own. Raises ValueError that says what is wrong:
    no such reward, an import that fails, a signature of no known style, an option that does not
    exist.
    """
    limits = {"timeout": timeout, "concurrency": concurrency}
    keywords = dict(options or {}) | {
        key: value for key, value in limits.items() if value is not None
    }
    plugin = {"style": style, "isolation": isolation, "kwargs": kwargs or None}
    plugin = {key: value for key, value in plugin.items() if value is not None}
    if use in BUILT_IN:
        if plugin:
            raise ValueError(
                f"{use!r} is built in and takes no {' or '.join(plugin)}; its keywords are options"
            )
        return _construct(use, keywords)
    target = resolve(use, GROUP, tuple(BUILT_IN))
    try:
        return PluginReward(target, **_checked(PluginReward, keywords | plugin, use))
    except UnknownOption as error:
        raise ValueError(f"{error}; keywords of your function itself go into kwargs") from error


class UnknownOption(ValueError):
    """A reward was given an option that it does not have."""


def _construct(name: str, keywords: dict[str, Any]) -> Reward:
    module, _, attribute = BUILT_IN[name].partition(":")
    kind = getattr(importlib.import_module(module, __package__), attribute)
    options = kind.Options or kind  # whose keywords are the options
    for limit in ("timeout", "concurrency"):  # a shaping reward takes microseconds and has neither
        if limit not in inspect.signature(options).parameters:
            keywords.pop(limit, None)
    reward: Reward = kind(**_checked(options, keywords, name))
    return reward


def _checked(factory: Any, keywords: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    if unknown := sorted(set(keywords) - set(parameters)):
        known = ", ".join(p for p in parameters if p != "target") or "none"
        raise UnknownOption(f"{name!r} has no option {', '.join(unknown)}; it takes {known}")
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.name not in (*keywords, "target")
    ]
    if missing:
        raise ValueError(f"{name!r} needs the option {', '.join(missing)}")
    return keywords
