"""reasoning-gym's tasks as a source of prompts (`pip install 'emberl[gym]'`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .arithmetic import is_heldout
from .rows import GYM
from .templates import PromptWriter, Tokenizer

_CHUNK = 256
"""Items of one generator. Some tasks lay all of them out when they are made, so it must be
finite."""
_TRIES = 400


def task_of(settings: DataConfig) -> str:
    """The task's name. Raises ValueError if reasoning-gym or the task is missing, or if the task
    refuses `data.gym`."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"data.source={settings.source!r} needs reasoning-gym: pip install 'emberl[gym]' (one"
            f" of its dependencies is built with a C compiler); {error}"
        ) from error
    task = str(settings.source).removeprefix(GYM)
    if task not in DATASETS:
        near = difflib.get_close_matches(task, list(DATASETS), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?"
            if near
            else f"; it has {len(DATASETS)}, such as chain_sum"
        )
        raise ValueError(
            f"data.source={settings.source!r}: reasoning-gym has no task {task!r}{hint}"
        )
    _make(task, settings.gym, 0)
    return task


def _make(task: str, options: Mapping[str, Any], seed: int) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, size=_CHUNK, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.gym={dict(options)} does not suit the task {task}: {error}"
        ) from error


class GymSource:
    """`data.source: reasoning_gym:<task>`. The hash of a question decides whether it is held out,
    as for arithmetic."""

    size = None

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._task = task_of(settings)
        self.name = settings.name or self._task
        self.notes: Sequence[str] = ()
        self._seed = seed
        self._writer = PromptWriter(settings, tokenizer)
        self._chunk = lru_cache(maxsize=8)(
            lambda seed, chunk, attempt: _make(
                self._task, settings.gym, Random(f"{seed}/{chunk}/{attempt}").getrandbits(31)
            )
        )
        self.heldout: Sequence[Prompt] = self._heldout(settings)

    def train(self, i: int) -> Prompt:
        chunk, at = divmod(i, _CHUNK)
        for attempt in range(_TRIES):
            prompt = self._prompt(self._chunk(self._seed, chunk, attempt)[at], f"{self.name}/{i}")
            if not is_heldout(prompt.columns["question"]) and self._writer.fits(prompt):
                return prompt
        raise ValueError(self._writer.too_long(f"none of {_TRIES} problems of {self._task}", None))

    def examples(self) -> Sequence[Prompt]:
        return self.heldout

    def solution(self, prompt: Prompt) -> str | None:
        return None

    def _prompt(self, item: Mapping[str, Any], name: str) -> Prompt:
        return self._writer.question(
            item["question"],
            id=name,
            answer=str(item["answer"]),
            source=self.name,
            columns={**item, "task": self._task},
        )

    def _candidates(self) -> Iterator[Mapping[str, Any]]:
        """Held-out items, each question once, the same for every seed; ends after 16 chunks without
        a new one."""
        seen, misses, chunk = set[str](), 0, 0
        while misses < 16 * _CHUNK:
            items = self._chunk("heldout", chunk, 0)
            for at in range(_CHUNK):
                item, misses = items[at], misses + 1
                if is_heldout(item["question"]) and item["question"] not in seen:
                    seen.add(item["question"])
                    misses = 0
                    yield item
            chunk += 1

    def _heldout(self, settings: DataConfig) -> list[Prompt]:
        prompts = self._writer.first_fitting(
            self._candidates(),
            settings.heldout,
            lambda item, i: self._prompt(item, f"{self.name}/heldout/{i}"),
            lambda _: f"a problem of {self._task}",
        )
        if len(prompts) == settings.heldout:
            return prompts
        raise ValueError(
            f"data.heldout={settings.heldout}, but {self._task} gives only {len(prompts)} held-out"
            " problems; make it harder with data.gym, or lower data.heldout"
        )
