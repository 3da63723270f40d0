"""What a configuration holds that nobody else is to read: keys of services, and whatever came out of
the environment. It stays in memory; files, trackers and messages have it masked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters of a value that is looked for in every text: shorter ones are no secrets."""
NAMED = re.compile(
    r"(^|_)(api|access|secret|private|auth)_?key$|^(key|token)$"
    r"|(auth|access|api|bearer|hf|secret|refresh|_?id)_token$"
    r"|(secret|passwd|password|credentials?|authorization)$",
    re.IGNORECASE,
)
"""Names of keys whose texts are masked."""
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""user:password of a URL."""
_known: dict[str, str] = {}


def _environment(name: str, *default: Any) -> Any:
    """omegaconf's `oc.env`, which also remembers what it gave."""
    from omegaconf.resolvers import oc

    value = oc.env(name, *default)
    if name in os.environ and len(os.environ[name]) >= SHORTEST:
        _known[os.environ[name]] = f"${{oc.env:{name}}}"
    return value


def watch_environment() -> None:
    """From now on what an interpolation takes from the environment is known, and hidden."""
    from omegaconf import OmegaConf  # not where nothing but messages is looked at

    new_name = getattr(OmegaConf, "register_resolver", None)  # of omegaconf 2.4
    (new_name or OmegaConf.register_new_resolver)("oc.env", _environment, replace=True)


def remember(tree: Any) -> None:
    """The values of a configuration that the names of their keys say are secret."""
    for name, value in _leaves(tree, ""):
        if isinstance(value, str) and len(value) >= SHORTEST and NAMED.search(name):
            _known.setdefault(value, MASK)


def hidden(text: str) -> str:
    """The text without secrets: what came from the environment as the interpolation that it was."""
    for value, instead in sorted(_known.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, instead)
    return IN_URL.sub(MASK, text)


def masked(value: Any, name: str = "") -> Any:
    """A tree without secrets."""
    if isinstance(value, Mapping):
        return {key: masked(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name) for each in value]
    if not isinstance(value, str):
        return value
    text = hidden(value)
    return MASK if text == value and value and NAMED.search(name) else text


def _leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, each in value.items() for leaf in _leaves(each, str(key))]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _leaves(each, name)]
    return [(name, value)]


__all__ = ["MASK", "hidden", "masked", "remember", "watch_environment"]
