"""Converts a function's results to plain values that can be sent through a socket.

A result is `{"score", "parts", "message"}`, perhaps with `status` or `right`; `{"none": True}` if
the function does not apply to the sample; or `{"error"}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..verdict import Status, Verdict

SCORES = ("score", "reward", "scores", "rewards")
"""Keys of the score in a mapping; the first one present counts."""
_RIGHT = ("acc", "scores")
"""Keys by which verl and OpenRLHF say whether the answer is right, if the reward contains more than
that."""
_LONGEST = 200
_LOGS = "extra_logs"


def result(value: Any, extras: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A function's result for one completion. `extras`: values that it logged otherwise."""
    if isinstance(value, Verdict):
        return _of_verdict(value, extras or {})
    given = dict(extras or {})
    if isinstance(value, Mapping):
        key = next((key for key in SCORES if key in value), None)
        if key is None:
            return {"error": f"returned a mapping without 'score': {short(value)}"}
        given |= {str(k): v for k, v in value.items() if k != key}
        value = value[key]
    parts, texts = _sorted_out(given)
    if value is None:
        return {"none": True, "parts": parts}
    if (score := number(value)) is None:
        return {"error": f"returned {short(value)}, which is no finite number"}
    plain = {"score": score, "parts": parts, "message": ", ".join(texts)}
    right = next((parts[name] >= 1 for name in _RIGHT if name in parts), None)
    return plain if right is None else plain | {"right": right}


def batch_results(
    values: Any, count: int, logged: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """A function's results for a batch: from a list, array or tensor of results, or a mapping with
    one under `rewards` or `scores` and further values of each sample or of the batch. `logged`:
    such values that it logged otherwise.

    Raises ValueError if the number of results is wrong.
    """
    extras: dict[str, Any] = dict(logged)
    if isinstance(values, Mapping):
        key = next((key for key in ("rewards", "reward", "score", "scores") if key in values), None)
        if key is None:
            raise ValueError(f"returned a mapping without 'rewards': {short(values)}")
        logs = values.get(_LOGS)
        extras |= {str(k): v for k, v in values.items() if k not in (key, _LOGS)}
        extras |= {str(k): v for k, v in logs.items()} if isinstance(logs, Mapping) else {}
        values = values[key]
    listed = _listed(values)
    if listed is None:
        raise ValueError(f"returned {short(values)} instead of a list of {count} scores")
    if len(listed) != count:
        raise ValueError(f"returned {len(listed)} scores for {count} completions")
    columns = {name: _column(given, count) for name, given in extras.items()}
    return [
        result(value, {name: c[i] for name, c in columns.items()}) for i, value in enumerate(listed)
    ]


def number(value: Any) -> float | None:
    """The finite float of a number of Python, numpy or torch, also in an array of one element; None
    for other values."""
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        plain = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return plain if math.isfinite(plain) else None


def short(value: Any) -> str:
    """A value as it is shown in messages."""
    try:
        return f"{type(value).__name__} {value!r}"[:_LONGEST]
    except Exception:  # a user's __repr__
        return type(value).__name__


def _of_verdict(verdict: Verdict, extras: Mapping[str, Any]) -> dict[str, Any]:
    if verdict.status is Status.NOT_APPLICABLE:
        return {"none": True, "parts": dict(verdict.parts)}
    parts = {name: number(value) for name, value in extras.items()}
    return {
        "status": verdict.status.value,
        "score": verdict.score,
        "parts": (
            {name: value for name, value in parts.items() if value is not None}
            | dict(verdict.parts)
        ),
        "message": verdict.message,
    }


def _sorted_out(given: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The numbers, which are logged, and the texts, which go into the message. Other values are
    dropped."""
    parts = {name: plain for name, value in given.items() if (plain := number(value)) is not None}
    texts = [
        f"{name}: {value[:_LONGEST]}"
        for name, value in given.items()
        if isinstance(value, str) and value
    ]
    return parts, texts


def _listed(values: Any) -> list[Any] | None:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return None
    try:
        return list(values)  # not tolist(): elements of shape [1] are numbers too
    except TypeError:  # a tensor without dimensions
        return None


def _column(given: Any, count: int) -> list[Any]:
    """A value for each sample: the items of a list of that length, else the same value for all."""
    listed = _listed(given)
    return listed if listed is not None and len(listed) == count else [given] * count
