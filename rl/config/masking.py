"""Masks the secrets of a configuration, API keys and values from the environment: they stay in
memory, and never reach files, trackers or messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters of a value that is looked for in every text: shorter ones would be found in words."""
NAMED = re.compile(
    r"(^|_)((api|access|secret|private|auth|signing)_?key|passwd|password|passphrase|pwd|secret"
    r"|credentials?|authorization|cookie)$"
    r"|^(key|token)$|(auth|access|api|bearer|hf|secret|refresh|id)_token$"
)
"""Names, as `_plain` writes them, of keys whose texts are masked."""
OFTEN = re.compile(r"_(key|token|pass|pat)$")
"""Names of keys that may hold a secret as well as the name of a column or a token: masked only
where the text looks `RANDOM`."""
RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.~-]{16,}")
IN_URL = re.compile(r"(?<=://)[^/\s]+(?=@)|(?<=[?&]key=)[^&\s]+|(?<=token=)[^&\s]+")
"""user:password of a URL, and keys in its query."""
ISSUED = re.compile(
    r"\b(sk-(?=[\w-]*\d)[\w-]{16,}|hf_[A-Za-z0-9]{30,}|gh[opsu]_\w{30,}|github_pat_\w{30,}"
    r"|glpat-[\w-]{16,}|xox[abp]-[\w-]{16,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)|(?<=Bearer )(?=\S*\d)[\w+/=.~-]{8,}"
)
"""Keys in the formats that services issue, whatever the setting is called."""
_known: dict[str, str] = {}
"""secret value -> the text that replaces it."""
_kept: dict[tuple[str, str], str] = {}
"""(key, value) -> the text with the interpolation that the value came from."""


def _environment(name: str, *default: Any) -> Any:
    """OmegaConf's `oc.env`, which also remembers the value as a secret. Paths are not remembered:
    they are no secrets, and stand in many texts."""
    from omegaconf.resolvers import oc

    value = oc.env(name, *default)
    given = os.environ.get(name, "")
    if len(given) >= SHORTEST and not given.startswith(("/", "~", ".")):
        _known[given] = f"${{oc.env:{name}}}"
    return value


def watch_environment() -> None:
    """From now on, values that interpolations take from the environment are hidden."""
    from omegaconf import OmegaConf  # here: `hidden` and `masked` do without it

    new_name = getattr(OmegaConf, "register_resolver", None)  # of omegaconf 2.4
    (new_name or OmegaConf.register_new_resolver)("oc.env", _environment, replace=True)


def remember(written: Any, resolved: Any) -> None:
    """Registers the secrets of a configuration: values whose keys are named like secrets, and
    values that `written` interpolates from the environment."""
    for name, text, value in _leaves("", written, resolved):
        if not isinstance(value, str) or not value:
            continue
        if isinstance(text, str) and "${oc.env:" in text:
            _kept[name, value] = text
        elif len(value) >= SHORTEST and _secret(name, value):
            _known.setdefault(value, MASK)


def hidden(text: str) -> str:
    """The text without secrets; values from the environment become interpolations again."""
    # the longest first: a secret that contains another one is replaced as a whole
    for value, instead in sorted(_known.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, instead)
    return ISSUED.sub(MASK, IN_URL.sub(MASK, text))


def masked(value: Any, name: str = "") -> Any:
    """A copy of a tree without secrets. name: the key that holds `value`."""
    if isinstance(value, Mapping):
        return {key: masked(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name) for each in value]
    if isinstance(value, bool | None):
        return value
    if not isinstance(value, str):
        return MASK if _secret(name, str(value)) and len(str(value)) >= SHORTEST else value
    if (name, value) in _kept:
        return _kept[name, value]
    text = hidden(value)
    return MASK if text == value and value and _secret(name, value) else text


def _secret(name: str, value: str) -> bool:
    name = _plain(name)
    return bool(NAMED.search(name) or (OFTEN.search(name) and RANDOM.fullmatch(value)))


def _plain(name: str) -> str:
    """`X-Api-Key` and `apiKey` as `x_api_key` and `api_key`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


def _leaves(name: str, written: Any, resolved: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, as written, as resolved) of every value; as written is None for a value that is in no
    file, e.g. one of a group that an interpolation gave as a whole."""
    if isinstance(resolved, Mapping):
        there = written if isinstance(written, Mapping) else {}
        for key, each in resolved.items():
            yield from _leaves(str(key), there.get(key), each)
    elif isinstance(resolved, list | tuple):
        same = isinstance(written, list | tuple) and len(written) == len(resolved)
        for i, each in enumerate(resolved):
            yield from _leaves(name, written[i] if same else None, each)
    else:
        yield name, written, resolved
