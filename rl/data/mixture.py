"""Several sources as one, in the order of a curriculum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...rewards.verdict import Status, Verdict
from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .curriculum import Choice, Curriculum, Source
from .table import TableSource

if TYPE_CHECKING:
    from .sources import PromptSource


class MixtureSource:
    """The sources of `data.mixture`, or the one of `data.source`, each at its levels, as the
    curriculum draws from them. A position keeps its problem for as long as anybody may ask for it
    again; what is measured changes those that were not asked for yet. Threads may share it."""

    def __init__(
        self, settings: DataConfig, open_one: Callable[[DataConfig], PromptSource], seed: int
    ) -> None:
        self._settings = settings.curriculum
        self._seed = seed
        self._weights = [weight for weight, _ in settings.parts.values()]
        self._levels = [
            [open_one(level) for level in _levels(p)] for _, p in settings.parts.values()
        ]
        self._names = tuple(settings.mixture) or (self._levels[0][0].name,)
        self.name = settings.name or "+".join(self._names)
        self.heldout: Sequence[Prompt] = [p for s in self._levels for p in s[-1].heldout]
        self.notes: Sequence[str] = tuple(
            f"{name}: {note}" if settings.mixture else note
            for name, levels in zip(self._names, self._levels, strict=True)
            for note in levels[-1].notes
        )
        self._by_id: dict[str, Choice] = {}
        self._lock = threading.Lock()

    @property
    def size(self) -> int | None:
        sizes = [source.size for levels in self._levels for source in levels]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @cached_property
    def _curriculum(self) -> Curriculum:
        """Made when it is first needed: problems may be left out before."""
        column = self._settings.rate_column
        sources = [
            Source(
                name=name,
                weight=weight,
                sizes=[source.size for source in levels],
                rates=None if column is None else _rates(levels[0], column),
            )
            for name, weight, levels in zip(self._names, self._weights, self._levels, strict=True)
        ]
        return Curriculum(self._settings, sources, self._seed)

    def train(self, i: int) -> Prompt:
        with self._lock:
            choice = self._curriculum.at(i)
            if choice is None:  # it has come back: whoever asks wants some problem, as a probe does
                return self._levels[0][0].train(i)
            prompt = self._levels[choice.source][choice.level].train(choice.index)
            if len(self._levels[choice.source]) > 1:
                prompt = replace(prompt, id=f"{prompt.id}/level{choice.level}")
            if choice.times:  # ids must not meet, nor may the same answers be drawn again
                prompt = replace(prompt, id=f"{prompt.id}@{choice.times}")
            self._by_id[prompt.id] = choice
            return prompt

    def observe(
        self,
        graded: Sequence[tuple[Prompt, Sequence[Verdict]]],
        step: int,
        position: int,
        pending: Sequence[tuple[int, int]],
    ) -> dict[str, float]:
        """Takes in the groups of RL step `step`, in their order; returns what was sampled and why.
        position, pending: as in the run's progress after them."""
        with self._lock:
            observed = [
                (
                    self._by_id[prompt.id],
                    sum(v.status == Status.CORRECT for v in verdicts if v.trains),
                    sum(v.trains for v in verdicts),
                )
                for prompt, verdicts in graded
                if prompt.id in self._by_id
            ]
            curriculum = self._curriculum
            curriculum.observe(observed, step)
            curriculum.forget(position, [p for p, _ in pending])
            waiting = set(curriculum.plan.values())
            self._by_id = {name: c for name, c in self._by_id.items() if c in waiting}
            return curriculum.metrics([choice for choice, _, _ in observed])

    def state(self) -> dict[str, Any]:
        with self._lock:
            return self._curriculum.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """ValueError where the state is of other data."""
        with self._lock:
            self._curriculum.restore(state)
            self._by_id = {}

    def examples(self) -> Iterator[Prompt]:
        for levels in self._levels:
            for source in levels:
                yield from source.examples()

    def solution(self, prompt: Prompt) -> str | None:
        """Of the source that has the prompt's name, or of the only one."""
        named = dict(zip(self._names, self._levels, strict=True))
        return named.get(prompt.source, self._levels[0])[0].solution(prompt)

    def leave_out(self, ids: Set[str]) -> None:
        """Drops problems of tables by their ids, before the first is used."""
        for levels in self._levels:
            for source in levels:
                if isinstance(source, TableSource):
                    source.leave_out(ids)
        self.heldout = [prompt for prompt in self.heldout if prompt.id not in ids]


def _levels(settings: DataConfig) -> list[DataConfig]:
    """The settings of each level; problems are held out by the last alone, which is the aim."""
    levels = settings.at_levels
    return [*(level.model_copy(update={"heldout": 0}) for level in levels[:-1]), levels[-1]]


def _rates(source: PromptSource, column: str) -> NDArray[np.float64]:
    """[N] NaN where a row has no number."""
    assert isinstance(source, TableSource)
    values = source.column(column)
    return np.array([np.nan if v is None else float(v) for v in values], np.float64)
