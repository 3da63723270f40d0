"""Calls reward functions of other trainers in the way their trainers do.

The style is recognised by the names of the parameters: **verl** `compute_score(data_source,
solution_str, ground_truth, extra_info)` and its batched form, **TRL** `f(prompts, completions,
**columns)`, **OpenRLHF** `reward_func(queries, prompts, labels)`, **slime** `f(args, sample)`,
**verifiers** `f(prompt, completion, answer, ...)` and its form for groups, and **native** functions
of `RewardInput`, marked by `@reward`. One style has no signature of its own: `verl_full` is verl's
with the prompt before the completion in `solution_str`, as in its old forks (TinyZero, Logic-RL). A
class, or a function that returns a reward function, is called once with the keywords.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..inputs import MARK, Reward, RewardInput
from .loading import Function
from .results import batch_results, result

_ANSWERS = ("answer", "answers", "solution", "solutions")
_TRUTHS = ("ground_truth", "label", "labels", "target")
"""Names by which TRL functions ask for the reference if the rows have no such column."""
_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call by name and by position, and columns for parameters without a
    default."""

    arguments: dict[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A function of any style, called with inputs and returning one result for each (see
    `results.py`)."""

    function: Function
    style: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Given to every call of the function; they override the arguments of the style."""

    @property
    def batched(self) -> bool:
        """Whether one call of the function takes the whole batch."""
        return self.style in _MANY

    def __call__(self, batch: Sequence[RewardInput]) -> list[dict[str, Any]]:
        """Raises the errors of the function, and ValueError for a wrong number of results."""
        if not self.batched:
            return [result(_awaited(self._call(_ONE[self.style](row)))) for row in batch]
        logs = _Logs(len(batch))
        call = _MANY[self.style](batch)
        if self.style == "trl":
            call.arguments.update(log_metric=logs.metric, log_extra=logs.extra)
        return batch_results(_awaited(self._call(call)), len(batch), logs.columns)

    def _call(self, call: Call) -> Any:
        """Calls the function with the arguments that it has parameters for, or all if it has
        `**kwargs`."""
        parameters = _parameters(self.function)[len(call.positional) :]
        needed = [p.name for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]
        given = {name: value for name, value in call.columns.items() if name in needed}
        given |= call.arguments
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        given |= self.keywords
        if missing := [name for name in needed if name not in given]:
            raise ValueError(
                f"takes {', '.join(missing)}, which style {self.style} does not give and no column"
                " of the row is; reward.parts.<name>.kwargs are given to every call"
            )
        only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in given]
        positional = [*call.positional, *(given.pop(name) for name in only)]
        return self.function(*positional, **given)


def adapt(
    function: Function, style: str | None = None, keywords: Mapping[str, Any] | None = None
) -> Adapted:
    """The function as an `Adapted`. Raises ValueError if the style is unknown or not recognisable,
    or for a keyword that the function does not take."""
    if style is not None and style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    if not callable(function):
        raise ValueError(f"{function!r} is no function")
    given = dict(keywords or {})
    if isinstance(function, type) or (style is None and _is_factory(function, given)):
        function, given = _made(function, given), {}
    taken = _parameters(function)
    names = [p.name for p in taken]
    if not any(p.kind is p.VAR_KEYWORD for p in taken) and (
        wrong := sorted(set(given) - set(names))
    ):
        raise ValueError(
            f"kwargs has {', '.join(wrong)}, but the function takes {', '.join(names)}"
        )
    return Adapted(function, style or recognise(function), given)


def recognise(function: Function) -> str:
    """The style of a function, by its mark or its parameters. Raises ValueError."""
    if (style := _style_of(function)) is not None:
        return style
    names = [p.name for p in _parameters(function)]
    raise ValueError(
        f"no known style has the parameters ({', '.join(sorted(names))}): mark a function of"
        " RewardInput with @reward (from emberl.rewards import reward), or give style= one of"
        f" {', '.join(STYLES)}"
    )


def _style_of(function: Function) -> str | None:
    if (mark := getattr(function, MARK, None)) is not None:
        return str(mark)
    if isinstance(function, Reward):
        return "native_batch"
    names = {p.name for p in _parameters(function)}
    # before TRL, whose functions have `completions` too
    if "completions" in names and names & {"states", "infos", "tasks"}:
        return "verifiers_batch"
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
    return None


def _is_factory(function: Function, keywords: Mapping[str, Any]) -> bool:
    """Whether a function of no known style can be called with only the keywords, and so may return
    a function with one."""
    parameters = _parameters(function)
    named = [p for p in parameters if p.kind not in _VARIADIC]
    needed = {p.name for p in named if p.default is p.empty}
    only_variadic = bool(parameters) and not named
    return _style_of(function) is None and not only_variadic and needed <= set(keywords)


def _made(factory: Function, keywords: Mapping[str, Any]) -> Function:
    """The reward function or object that a factory returns. Raises ValueError if it returns
    none."""
    name = getattr(factory, "__name__", repr(factory))
    try:
        made = factory(**keywords)
    except Exception as error:  # a user's constructor
        raise ValueError(
            f"{name} cannot be called with kwargs ({', '.join(keywords) or 'none'}) to give a"
            f" reward function: {type(error).__name__}: {error}"
        ) from error
    if not callable(made):
        raise ValueError(
            f"{name} returned {type(made).__name__} instead of a reward function; if it is one,"
            " give style="
        )
    function: Function = made
    return function


def _parameters(function: Function) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"the signature of {function!r} cannot be read: {error}") from error


class _Logs:
    """The values that a TRL function logs while it runs: metrics of the batch, and columns with a
    value for each sample."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        self.columns[str(name)] = [value] * self._count

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns[str(column)] = list(values)


def _awaited(value: Any) -> Any:
    return asyncio.run(_finish(value)) if inspect.isawaitable(value) else value


async def _finish(value: Any) -> Any:
    return await value


def ground_truth(row: RewardInput) -> Any:
    """The reference as the row has it: a mapping or list if it is one, else the answer."""
    nested = row.columns.get("reward_model")
    given = row.columns.get("ground_truth")
    if given is None and isinstance(nested, Mapping):
        given = nested.get("ground_truth")
    return row.answer if given is None or (isinstance(given, str) and row.answer) else given


def _messages(row: RewardInput) -> tuple[Any, Any]:
    """Prompt and completion as messages if the row has messages, else as texts."""
    if row.messages:
        return [dict(m) for m in row.messages], [{"role": "assistant", "content": row.completion}]
    return row.prompt, row.completion


def _as_in_the_row(row: RewardInput) -> tuple[Any, Any]:
    """Prompt and completion as TRL passes them: as texts if the prompt of the row is a text, else
    as messages."""
    return _messages(row) if row.plain_prompt is None else (row.plain_prompt, row.completion)


def _native(row: RewardInput) -> Call:
    return Call(positional=(row,))


def _native_batch(batch: Sequence[RewardInput]) -> Call:
    return Call(positional=(list(batch),))


def _verl(row: RewardInput) -> Call:
    arguments = {
        "data_source": row.source,
        "solution_str": row.completion,
        "ground_truth": ground_truth(row),
        "extra_info": row.columns.get("extra_info", dict(row.columns)),
    }
    return Call(arguments, columns=row.columns)


def _verl_full(row: RewardInput) -> Call:
    call = _verl(row)
    call.arguments["solution_str"] = row.prompt + row.completion
    return call


def _verl_batch(batch: Sequence[RewardInput]) -> Call:
    rows = [_verl(row).arguments for row in batch]
    names = ("data_source", "solution_str", "ground_truth", "extra_info")
    return Call({f"{name}s": [row[name] for row in rows] for name in names})


def _trl(batch: Sequence[RewardInput]) -> Call:
    pairs = [_as_in_the_row(row) for row in batch]
    arguments: dict[str, Any] = {name: [row.answer for row in batch] for name in _ANSWERS}
    arguments |= {name: [ground_truth(row) for row in batch] for name in _TRUTHS}
    for name in {name for row in batch for name in row.columns}:
        arguments[name] = [row.columns.get(name) for row in batch]
    first = batch[0]
    return Call(
        arguments
        | {
            "prompts": [prompt for prompt, _ in pairs],
            "completions": [completion for _, completion in pairs],
            "completion_ids": [list(row.token_ids) for row in batch],
            "trainer_state": SimpleNamespace(global_step=first.step, max_steps=first.max_steps),
        }
    )


def _openrlhf(batch: Sequence[RewardInput]) -> Call:
    return Call(
        {
            "queries": [row.prompt + row.completion for row in batch],
            "prompts": [row.prompt for row in batch],
            "labels": [row.columns.get("label", ground_truth(row)) for row in batch],
        }
    )


def _slime_sample(row: RewardInput) -> SimpleNamespace:
    prompt, _ = _messages(row)
    return SimpleNamespace(
        prompt=prompt,
        response=row.completion,
        label=row.columns.get("label", ground_truth(row)),
        metadata=dict(row.columns),
        tokens=list(row.token_ids),
        response_length=len(row.token_ids),
        index=0,
        group_index=0,
        reward=None,
        status="truncated" if row.finish_reason == "length" else "completed",
    )


def _slime(row: RewardInput) -> Call:
    return Call(positional=(SimpleNamespace(reward_key=None), _slime_sample(row)))


def _slime_batch(batch: Sequence[RewardInput]) -> Call:
    return Call(positional=(SimpleNamespace(reward_key=None), [_slime_sample(r) for r in batch]))


class _Parser:
    """The methods of `parser` that a verifiers function may call."""

    def parse(self, text: str) -> str:
        return text

    def parse_answer(self, completion: Any) -> str:
        return str(completion if isinstance(completion, str) else completion[-1]["content"])


def _verifiers(row: RewardInput) -> Call:
    prompt, completion = _messages(row)
    arguments = {
        "prompt": prompt,
        "completion": completion,
        "answer": row.answer or ground_truth(row),
        "task": row.source,
        "info": row.columns.get("info", dict(row.columns)),
    }
    state = arguments | {"responses": [], "turn": 1, "timing": {}}
    return Call(arguments | {"state": state, "parser": _Parser()}, columns=row.columns)


def _verifiers_batch(batch: Sequence[RewardInput]) -> Call:
    rows = [_verifiers(row).arguments for row in batch]
    names = ("prompt", "completion", "answer", "task", "info", "state")
    return Call({f"{name}s": [row[name] for row in rows] for name in names} | {"parser": _Parser()})


_ONE: dict[str, Callable[[RewardInput], Call]] = {
    "native": _native,
    "verl": _verl,
    "verl_full": _verl_full,
    "slime": _slime,
    "verifiers": _verifiers,
}
_MANY: dict[str, Callable[[Sequence[RewardInput]], Call]] = {
    "native_batch": _native_batch,
    "verl_batch": _verl_batch,
    "trl": _trl,
    "openrlhf": _openrlhf,
    "slime_batch": _slime_batch,
    "verifiers_batch": _verifiers_batch,
}
STYLES = (*_ONE, *_MANY)
