"""A function's result as plain values that go through a socket: a score with further numbers, or
why there is none.

A result is `{"score", "parts", "message"}` and perhaps `status` or `right`; `{"none": True}` where
the function does not apply to the sample; or `{"error"}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..verdict import Status, Verdict

SCORES = ("score", "reward", "scores", "rewards")
"""Keys under which a mapping has its score, the first of them that is there."""
_RIGHT = ("acc", "scores")
"""Keys of verl and OpenRLHF for whether the answer is right, where the reward is shaped by more
than that."""
_LONGEST = 200
_LOGS = "extra_logs"


def result(value: Any, extras: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A function's result for one completion. `extras`: what it logged of it by other ways."""
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
    """A function's result for a batch: a list, array or tensor of results, or a mapping that has
    one under `rewards` or `scores`, with further values of each sample or of the batch. `logged`:
    the same by other ways.

    Raises ValueError for another number of results.
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
    """A finite number out of Python's, numpy's or torch's, one-element arrays included; None if it
    is none."""
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        plain = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return plain if math.isfinite(plain) else None


def short(value: Any) -> str:
    """A value as a message shows it."""
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
    """Numbers, which are logged, and texts, which a person may read. Anything else is left out."""
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
    """One value for each sample: of a list of as many, else the same for all."""
    listed = _listed(given)
    return listed if listed is not None and len(listed) == count else [given] * count
