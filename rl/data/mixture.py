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
    """The sources of `data.mixture`, or the one of `data.source`, each at its levels, in the order
    of the curriculum's draws. A position keeps its problem until its group has come back; measured
    success affects only positions that were not drawn yet. Safe to share between threads."""

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
        """The curriculum, made when first needed: its sizes must count what `leave_out` left."""
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
            if choice is None:  # it has come back: any problem will do, e.g. for a probe
                return self._levels[0][0].train(i)
            prompt = self._levels[choice.source][choice.level].train(choice.index)
            if len(self._levels[choice.source]) > 1:
                prompt = replace(prompt, id=f"{prompt.id}/level{choice.level}")
            # the id also seeds the sampling: the same one would draw the same answers again
            if choice.times:
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
        """Updates the curriculum with the groups of RL step `step`, in their order; returns its
        metrics. position, pending: as in the run's progress after them."""
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
        """Sets the state to that of `state()`. Raises ValueError if that is of other data."""
        with self._lock:
            self._curriculum.restore(state)
            self._by_id = {}

    def examples(self) -> Iterator[Prompt]:
        for levels in self._levels:
            for source in levels:
                yield from source.examples()

    def solution(self, prompt: Prompt) -> str | None:
        """The worked solution, by the source that the prompt names, or by the only one."""
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
    """The settings of each level. Only the last, whose problems are the goal, holds any out."""
    levels = settings.at_levels
    return [*(level.model_copy(update={"heldout": 0}) for level in levels[:-1]), levels[-1]]


def _rates(source: PromptSource, column: str) -> NDArray[np.float64]:
    """[N] float64 pass rates in a column; NaN where a row has none."""
    assert isinstance(source, TableSource)
    values = source.column(column)
    return np.array([np.nan if v is None else float(v) for v in values], np.float64)
