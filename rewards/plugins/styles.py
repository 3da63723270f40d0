"""Reward functions written for other trainers, called as they are called at home.

The style is recognised from the names of the parameters: **verl** `compute_score(data_source, solution_str,
ground_truth, extra_info)` and its batched form, **TRL** `f(prompts, completions, **columns)`, **OpenRLHF**
`reward_func(queries, prompts, labels)`, **slime** `f(args, sample)`, **verifiers** `f(prompt, completion, answer, ...)`,
and **native** functions of `RewardInput`, marked by `@reward`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ..inputs import RewardInput
from ..verdict import Verdict

Function = Callable[..., Any]
STYLES = ("native", "native_batch", "verl", "verl_batch", "trl", "openrlhf", "slime", "slime_batch", "verifiers")
_BATCHED = frozenset(("native_batch", "verl_batch", "trl", "openrlhf", "slime_batch"))
_ANSWER_NAMES = frozenset(("answer", "answers", "solution", "solutions", "ground_truth", "label", "labels", "target"))
_MARK = "__emberl_reward__"


def reward(function: Function | None = None, *, batched: bool = False) -> Any:
    """Marks a native reward function: `RewardInput -> float | bool | Verdict`, or lists of them with `batched=True`.

    It may be `async`. Use it as `@reward` or `@reward(batched=True)`.
    """

    def mark(inner: Function) -> Function:
        setattr(inner, _MARK, "native_batch" if batched else "native")
        return inner

    return mark if function is None else mark(function)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A function of some style behind one call: inputs in, one result for each out (see `result`)."""

    function: Function
    style: str

    @property
    def batched(self) -> bool:
        """Whether one call of the function takes the whole batch."""
        return self.style in _BATCHED

    def __call__(self, batch: Sequence[RewardInput]) -> list[dict[str, Any]]:
        """Raises what the function raises, and ValueError for the wrong number of results."""
        found = _CALLS[self.style](self.function, batch) if self.batched else None
        if found is None:
            return [result(_await(_CALLS[self.style](self.function, row))) for row in batch]
        return [result(value) for value in _many(_await(found), len(batch))]


def adapt(function: Function, style: str | None = None) -> Adapted:
    """Raises ValueError if the style is unknown or cannot be told from the signature."""
    if style is not None and style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if not callable(function):
        raise ValueError(f"{function!r} is no function")
    return Adapted(function, style or recognise(function))


def recognise(function: Function) -> str:
    """The style of a function by its mark or its parameters. Raises ValueError."""
    if (mark := getattr(function, _MARK, None)) is not None:
        return str(mark)
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the signature of {function!r} cannot be read ({error}); give style=") from error
    for style, needed in (
        ("verl_batch", {"solution_strs"}),
        ("verl", {"solution_str"}),
        ("openrlhf", {"queries"}),
        ("trl", {"completions"}),
        ("trl", {"completion_ids"}),
        ("slime_batch", {"args", "samples"}),
        ("slime", {"args", "sample"}),
        ("verifiers", {"completion"}),
        ("verifiers", {"state"}),
    ):
        if needed <= names:
            return style
    raise ValueError(
        f"no known style has the parameters ({', '.join(sorted(names))}): mark a native function with @reward, or give "
        f"style= one of {', '.join(STYLES)}"
    )


def import_function(target: str) -> Function:
    """`package.module:function` or `./file.py:function`. Raises ValueError that says what is missing."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"{target!r} must be package.module:function or ./file.py:function")
    try:
        module = _import_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a plugin's import may fail in any way
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found := getattr(module, name, None)):
        raise ValueError(f"{place} has no function {name!r}")
    function: Function = found
    return function


def _import_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"_emberl_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # a plugin may import its neighbours
    spec.loader.exec_module(module)
    return module


def serve(target: str, style: str | None) -> Callable[[Any], Any]:
    """For worker processes: answers "describe" with what the function is, and a batch with its results."""
    adapted = adapt(import_function(target), style)

    def answer(task: str | list[RewardInput]) -> Any:
        if isinstance(task, str):
            return {"style": adapted.style, "batched": adapted.batched, "pid": os.getpid()}
        return adapted(task)

    return answer


def result(value: Any) -> dict[str, Any]:
    """What a function returned for one completion: `{"score", "parts", ...}`, or `{"error"}` if that is no score."""
    if isinstance(value, Verdict):
        return {
            "status": value.status.value,
            "score": value.score,
            "parts": dict(value.parts),
            "message": value.message,
        }
    parts: dict[str, float] = {}
    if isinstance(value, Mapping):
        parts = {str(k): number for k, v in value.items() if k != "score" and (number := _number(v)) is not None}
        key = next((key for key in ("score", "reward") if key in value), None)
        if key is None:
            return {"error": f"returned a mapping without 'score': {_short(value)}"}
        value = value[key]
    if (number := _number(value)) is None:
        return {"error": f"returned {_short(value)}, which is no finite number"}
    return {"score": number, "parts": parts}


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    try:
        return f"{type(value).__name__} {value!r}"[:200]
    except Exception:  # a plugin's __repr__
        return type(value).__name__


def _many(values: Any, count: int) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise ValueError(f"returned {_short(values)} instead of a list of {count} scores")
    if len(values) != count:
        raise ValueError(f"returned {len(values)} scores for {count} completions")
    return list(values)


def _await(value: Any) -> Any:
    return asyncio.run(_finish(value)) if inspect.isawaitable(value) else value


async def _finish(value: Any) -> Any:
    return await value


def _accepted(function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes: all if it has `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def _conversation(row: RewardInput) -> tuple[Any, Any]:
    """Prompt and completion as a trainer of its data would hand them: messages if the row has them, else texts."""
    if row.messages:
        return [dict(m) for m in row.messages], [{"role": "assistant", "content": row.completion}]
    return row.prompt, row.completion


def _native(function: Function, row: RewardInput) -> Any:
    return function(row)


def _native_batch(function: Function, batch: Sequence[RewardInput]) -> Any:
    return function(list(batch))


def _verl(function: Function, row: RewardInput) -> Any:
    arguments = {
        "data_source": row.source,
        "solution_str": row.completion,
        "ground_truth": row.columns.get("ground_truth", row.answer),
        "extra_info": row.columns.get("extra_info", dict(row.columns)),
    }
    return function(**_accepted(function, arguments))


def _verl_batch(function: Function, batch: Sequence[RewardInput]) -> Any:
    arguments = {
        "data_sources": [row.source for row in batch],
        "solution_strs": [row.completion for row in batch],
        "ground_truths": [row.columns.get("ground_truth", row.answer) for row in batch],
        "extra_infos": [row.columns.get("extra_info", dict(row.columns)) for row in batch],
    }
    return function(**_accepted(function, arguments))


def _trl(function: Function, batch: Sequence[RewardInput]) -> Any:
    pairs = [_conversation(row) for row in batch]
    columns = {name: [row.columns.get(name) for row in batch] for row in batch for name in row.columns}
    named = {p for p in inspect.signature(function).parameters if p in _ANSWER_NAMES} | {"answer"}
    answers = {name: [row.answer for row in batch] for name in named if name not in columns}
    arguments = answers | columns | {
        "prompts": [prompt for prompt, _ in pairs],
        "completions": [completion for _, completion in pairs],
        "completion_ids": [list(row.token_ids) for row in batch],
        "trainer_state": None,
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }  # fmt: skip
    return function(**_accepted(function, arguments))


def _openrlhf(function: Function, batch: Sequence[RewardInput]) -> Any:
    arguments = {
        "queries": [row.prompt + row.completion for row in batch],
        "prompts": [row.prompt for row in batch],
        "labels": [row.columns.get("label", row.answer) for row in batch],
    }
    found = function(**_accepted(function, arguments))
    if isinstance(found, Mapping):
        if (scores := found.get("rewards", found.get("scores"))) is None:
            raise ValueError("returned a mapping without 'rewards'")
        return scores
    return found


def _slime_sample(row: RewardInput) -> SimpleNamespace:
    prompt, _ = _conversation(row)
    return SimpleNamespace(
        prompt=prompt, response=row.completion, label=row.columns.get("label", row.answer), metadata=dict(row.columns),
        tokens=list(row.token_ids), response_length=len(row.token_ids), index=0, group_index=0, reward=None,
        status="truncated" if row.finish_reason == "length" else "completed",
    )  # fmt: skip


def _slime(function: Function, row: RewardInput) -> Any:
    return function(SimpleNamespace(reward_key=None), _slime_sample(row))


def _slime_batch(function: Function, batch: Sequence[RewardInput]) -> Any:
    return function(SimpleNamespace(reward_key=None), [_slime_sample(row) for row in batch])


class _Parser:
    """What a verifiers function may ask of `parser`."""

    def parse(self, text: str) -> str:
        return text

    def parse_answer(self, completion: Any) -> str:
        return str(completion if isinstance(completion, str) else completion[-1]["content"])


def _verifiers(function: Function, row: RewardInput) -> Any:
    prompt, completion = _conversation(row)
    info = row.columns.get("info", dict(row.columns))
    arguments = {"prompt": prompt, "completion": completion, "answer": row.answer, "task": row.source, "info": info}
    state = arguments | {"responses": [], "turn": 1, "timing": {}}
    return function(**_accepted(function, arguments | {"state": state, "parser": _Parser()}))


_CALLS: dict[str, Callable[[Function, Any], Any]] = {
    "native": _native, "native_batch": _native_batch, "verl": _verl, "verl_batch": _verl_batch, "trl": _trl,
    "openrlhf": _openrlhf, "slime": _slime, "slime_batch": _slime_batch, "verifiers": _verifiers,
}  # fmt: skip
