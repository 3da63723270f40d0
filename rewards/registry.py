"""Rewards by name: the built-in ones, installed entry points, and functions of a package or file."""

from __future__ import annotations

from typing import Any

from .inputs import Reward
from .maths import MathReward


def load_reward(
    name: str,
    *,
    style: str | None = None,
    timeout: float | None = None,
    concurrency: int | None = None,
    isolation: str | None = None,
    options: dict[str, Any] | None = None,
) -> Reward:
    """`load_reward("math")`. Raises ValueError if there is no such reward or it does not fit."""
    keywords: dict[str, Any] = dict(options or {})
    if timeout is not None:
        keywords["timeout"] = timeout
    if concurrency is not None:
        keywords["concurrency"] = concurrency
    if name == "math":
        return MathReward(**keywords)
    raise ValueError(f"unknown reward {name!r}")
