"""Rewards by name: the built-in ones, installed entry points (group `emberl.rewards`), and functions of a package or file."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from .inputs import Reward
from .plugins.reward import PluginReward

GROUP = "emberl.rewards"
BUILT_IN = {
    "math": ".math_answers.reward:MathReward",
    "code": ".code_tests.reward:CodeReward",
    "gym": ".gym:GymReward",
    "environment": ".episode:EnvironmentReward",
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
) -> Reward:
    """The reward that `use` names, e.g. `load_reward("math")` or `load_reward("./mine.py:score", style="verl")`.

    `options` are the reward's own keywords; `timeout` (s per sample or call) and `concurrency` (processes) go to
    rewards that have them; `style` and `isolation` are for functions of others. Raises ValueError that says what is
    wrong: no such reward, an import that fails, a signature of no known style, an option that does not exist.
    """
    limits = {"timeout": timeout, "concurrency": concurrency}
    keywords = dict(options or {}) | {key: value for key, value in limits.items() if value is not None}
    plugin = {key: value for key, value in (("style", style), ("isolation", isolation)) if value is not None}
    if use in BUILT_IN:
        if plugin:
            raise ValueError(f"{use!r} is built in and takes no {' or '.join(plugin)}")
        return _construct(use, keywords)
    target = use if ":" in use else _entry_point(use)
    return PluginReward(target, **_checked(PluginReward, keywords | plugin, use))


def _entry_point(name: str) -> str:
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    if name in found:
        return found[name]
    known = sorted({*BUILT_IN, *found})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no reward {name!r}{hint} (known: {', '.join(known)}; or name package.module:function or ./file.py:function)"
    )


def _construct(name: str, keywords: dict[str, Any]) -> Reward:
    module, _, attribute = BUILT_IN[name].partition(":")
    factory = getattr(importlib.import_module(module, __package__), attribute)
    for limit in ("timeout", "concurrency"):  # a shaping reward takes microseconds and has neither
        if limit not in inspect.signature(factory).parameters:
            keywords.pop(limit, None)
    reward: Reward = factory(**_checked(factory, keywords, name))
    return reward


def _checked(factory: Any, keywords: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return keywords
    if unknown := sorted(set(keywords) - set(parameters)):
        raise ValueError(f"{name!r} has no option {', '.join(unknown)}; it takes {', '.join(parameters) or 'none'}")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in (*keywords, "target")]
    if missing:
        raise ValueError(f"{name!r} needs the option {', '.join(missing)}")
    return keywords
