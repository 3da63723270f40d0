"""The order of a run's problems as a pure function of a seed and a state: shares of sources, pass
rates of problems, levels of difficulty. No clock, no files, no tokens.

A pool is what problems are drawn from: a source, or one level of it. A finite pool numbers its
problems from 0; of an endless one every draw is new.

Shape legend: N problems of a pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.curriculum import CurriculumConfig

LEAST = 0.01
"""Weight of a problem of pass rate 0 or 1 with pick=rate, where an even one has 0.25."""
BINS = ("unknown", "never", "hard", "medium", "easy", "always")
"""Bins of pass rates: none known, 0, up to 1/4, up to 3/4, below 1, 1."""


WHY = ("new", "order", "rate", "thompson", "hard", "revisit", "exhausted")
"""Reasons for a draw: `new` ones are of endless pools, and `exhausted` is a pool all of whose other
problems are dropped or outside the stage."""


def bin_of(rate: float | None) -> str:
    if rate is None:
        return "unknown"
    if rate in (0.0, 1.0):
        return "never" if rate == 0 else "always"
    return "hard" if rate <= 0.25 else "medium" if rate <= 0.75 else "easy"


@dataclass(frozen=True, slots=True)
class Choice:
    """A problem that was drawn, and the reason."""

    source: int
    level: int
    index: int
    times: int
    """How often it was drawn before."""
    why: str
    """One of `WHY`."""
    rate: float | None
    """Its pass rate as it was known then."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """A named share of the draws."""

    name: str
    weight: float
    sizes: Sequence[int | None]
    """Number of problems in each level's pool; None: endless."""
    rates: NDArray[np.float64] | None = None
    """[N] pass rates known beforehand, NaN where not; of a source of one level."""


@dataclass(slots=True, eq=False)
class Pool:
    """The records of a pool's problems."""

    size: int | None
    drawn: int = 0
    cursor: int = 0
    """Places passed in the epochs' orders, over all epochs."""
    hard: int = 0
    """Draws of hard problems, and of others where there was none."""
    rates: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[N] pass rates, NaN where none is known."""
    last: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[N] the last group's alone."""
    tried: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] answers of the last group."""
    step: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] the RL step in which it was measured."""
    times: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] draws."""
    waiting: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N] draws that have not come back."""

    @staticmethod
    def of(size: int | None, rates: NDArray[np.float64] | None = None) -> Pool:
        n = size or 0
        return Pool(
            size=size,
            rates=np.full(n, np.nan) if rates is None else np.array(rates, np.float64),
            last=np.full(n, np.nan),
            tried=np.zeros(n, np.int64),
            step=np.zeros(n, np.int64),
            times=np.zeros(n, np.int64),
            waiting=np.zeros(n, np.int64),
        )

    def extreme(self) -> NDArray[np.bool_]:
        """[N] whether the last group always or never solved it."""
        extreme: NDArray[np.bool_] = (self.last == 0) | (self.last == 1)
        return extreme

    def measure(self, index: int, solved: int, tried: int, step: int) -> None:
        rate, before = solved / tried, self.rates[index]
        first = np.isnan(self.last[index])
        self.rates[index] = rate if first else (before + rate) / 2
        self.last[index] = rate
        self.tried[index] = tried
        self.step[index] = step


@dataclass(slots=True)
class Progress:
    """A source's current level, and its success there so far."""

    level: int = 0
    solved: int = 0
    tried: int = 0
    """Answers at this level."""


class Curriculum:
    """The state of the draws: `at` draws, `observe` takes in measured success. Two with the same
    settings, sources, seed and history draw the same."""

    def __init__(self, settings: CurriculumConfig, sources: Sequence[Source], seed: int) -> None:
        self.settings = settings
        self.sources = tuple(sources)
        self.seed = seed
        self.step = 0
        """RL steps done."""
        self.next = 0
        """The first position that is not drawn yet."""
        self.plan: dict[int, Choice] = {}
        """Position -> draw, of the draws that have not come back."""
        self.progress = [Progress() for _ in sources]
        self.pools = self._new_pools()
        # streams of their own: 1 for the orders of epochs, 0 (in `at`) for the draws
        self._order = lru_cache(maxsize=4)(
            lambda source, level, size, epoch: np.random.default_rng(
                [seed, 1, source, level, epoch]
            ).permutation(size)
        )

    def _new_pools(self) -> list[list[Pool]]:
        return [[Pool.of(size, s.rates) for size in s.sizes] for s in self.sources]

    def at(self, position: int) -> Choice | None:
        """The draw of a position; a new one is made after all before it. None for a draw that has
        come back and is forgotten."""
        while self.next <= position:
            self.plan[self.next] = self._choose(np.random.default_rng([self.seed, 0, self.next]))
            self.next += 1
        return self.plan.get(position)

    def _choose(self, rng: np.random.Generator) -> Choice:
        """The next draw: of the source that lacks most of its share, so that counts are never off
        by one or more."""
        drawn = [sum(pool.drawn for pool in pools) for pools in self.pools]
        lacking = [
            s.weight * (sum(drawn) + 1) - d for s, d in zip(self.sources, drawn, strict=True)
        ]
        source = int(np.argmax(lacking))
        level = self.progress[source].level
        pool = self.pools[source][level]
        if pool.size is None:
            index, why, rate, times = pool.drawn, "new", None, 0
        else:
            index, why = self._pick(pool, source, level, rng)
            known = float(pool.rates[index])
            rate, times = None if np.isnan(known) else known, int(pool.times[index])
            pool.times[index] += 1
            pool.waiting[index] += 1
        pool.drawn += 1
        return Choice(source, level, index, times, why, rate)

    def _pick(
        self, pool: Pool, source: int, level: int, rng: np.random.Generator
    ) -> tuple[int, str]:
        settings = self.settings
        open_ = self._open(pool)
        free = open_ & (pool.waiting == 0)
        if free.any():
            open_ = free
        hard = open_ & (pool.rates > 0) & (pool.rates <= settings.hard_below)
        if settings.hard_share * (pool.drawn + 1) - pool.hard >= 1:
            # also without one: a debt paid later would make whole steps of hard problems alone
            pool.hard += 1
            if hard.any():
                return int(rng.choice(np.flatnonzero(hard))), "hard"
        if settings.pick == "order" or not open_.any():
            index = self._next_in_order(pool, open_, source, level)
        else:
            index = int(np.flatnonzero(open_)[self._weighed(pool, open_, rng)])
        if not open_[index]:
            return index, "exhausted"
        if settings.drop and pool.extreme()[index]:
            return index, "revisit"
        return index, settings.pick

    def _open(self, pool: Pool) -> NDArray[np.bool_]:
        """[N] neither dropped nor outside the stage."""
        low, high = self.stage
        open_ = np.isnan(pool.rates) | ((pool.rates >= low) & (pool.rates <= high))
        return open_ & ~self._dropped(pool)

    def _dropped(self, pool: Pool) -> NDArray[np.bool_]:
        if not self.settings.drop:
            return np.zeros(len(pool.last), bool)
        revisit = self.settings.revisit or np.inf
        return pool.extreme() & (self.step - pool.step < revisit)

    @property
    def stage(self) -> tuple[float, float]:
        """The pass rates of this step's stage."""
        ends = np.cumsum([stage.steps for stage in self.settings.stages])
        at = min(int(np.searchsorted(ends, self.step, side="right")), len(ends) - 1)
        return self.settings.stages[at].rates if len(ends) else (0.0, 1.0)

    def _next_in_order(self, pool: Pool, open_: NDArray[np.bool_], source: int, level: int) -> int:
        assert pool.size is not None
        while True:
            epoch, at = divmod(pool.cursor, pool.size)
            index = int(self._order(source, level, pool.size, epoch)[at])
            pool.cursor += 1
            if open_[index] or not open_.any():
                return index

    def _weighed(self, pool: Pool, open_: NDArray[np.bool_], rng: np.random.Generator) -> int:
        """The index, among the open problems, of one drawn by its pass rate."""
        rates = np.nan_to_num(pool.rates[open_], nan=0.5)
        if self.settings.pick == "thompson":
            tried = pool.tried[open_]
            rates = rng.beta(1 + rates * tried, 1 + (1 - rates) * tried)
            return int(np.argmax(rates * (1 - rates)))
        weights = np.maximum(rates * (1 - rates), LEAST)
        return int(rng.choice(len(weights), p=weights / weights.sum()))

    def observe(self, results: Iterable[tuple[Choice, int, int]], step: int) -> None:
        """Updates pass rates and levels from the groups of RL step `step`.

        results: (draw, correct answers, answers) of each group, in their order.
        """
        self.step = step
        for choice, solved, tried in results:
            if not tried:
                continue
            pool = self.pools[choice.source][choice.level]
            if pool.size is not None:
                pool.measure(choice.index, solved, tried, step)
            at = self.progress[choice.source]
            if choice.level != at.level:
                continue
            at.solved += solved
            at.tried += tried
            if at.tried >= self.settings.raise_after:
                last = at.level == len(self.pools[choice.source]) - 1
                raised = not last and at.solved >= self.settings.raise_at * at.tried
                at.level += raised
                at.solved = 0
                at.tried = 0

    def forget(self, before: int, pending: Iterable[int]) -> None:
        """Drops the draws of positions below `before` that nobody waits for."""
        kept = set(pending)
        for position in [p for p in self.plan if p < before and p not in kept]:
            choice = self.plan.pop(position)
            pool = self.pools[choice.source][choice.level]
            if pool.size is not None:
                pool.waiting[choice.index] -= 1

    def metrics(self, choices: Sequence[Choice]) -> dict[str, float]:
        """`sched/*` metrics: a step's draws counted by source, by difficulty as known then and by
        reason, and how many problems are dropped now."""
        metrics = {f"sched/source/{source.name}": 0.0 for source in self.sources}
        metrics |= {f"sched/difficulty/{name}": 0.0 for name in BINS}
        metrics |= {f"sched/picked/{name}": 0.0 for name in WHY}
        for choice in choices:
            metrics[f"sched/source/{self.sources[choice.source].name}"] += 1
            metrics[f"sched/difficulty/{bin_of(choice.rate)}"] += 1
            metrics[f"sched/picked/{choice.why}"] += 1
        pools = [pool for pools in self.pools for pool in pools]
        for name, rate in (("always_solved", 1), ("never_solved", 0)):
            dropped = [(self._dropped(pool) & (pool.last == rate)).sum() for pool in pools]
            metrics[f"sched/dropped/{name}"] = float(sum(dropped))
        for source, at in zip(self.sources, self.progress, strict=True):
            if len(source.sizes) > 1:
                metrics[f"sched/level/{source.name}"] = float(at.level)
        return metrics

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON values."""
        return {
            "step": self.step,
            "next": self.next,
            "plan": {str(p): dataclasses.astuple(choice) for p, choice in self.plan.items()},
            "progress": [asdict(at) for at in self.progress],
            "pools": [[_packed(pool) for pool in pools] for pools in self.pools],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the state to that of `state()`. Raises ValueError if that is of other data."""
        sizes = [[pool["size"] for pool in pools] for pools in state["pools"]]
        if sizes != [list(source.sizes) for source in self.sources]:
            raise ValueError(
                f"the checkpoint's curriculum is of sources with {sizes} problems, the data have"
                f" {[list(source.sizes) for source in self.sources]}; give the data it was of"
            )
        self.step = state["step"]
        self.next = state["next"]
        self.plan = {int(p): Choice(*choice) for p, choice in state["plan"].items()}
        self.progress = [Progress(**at) for at in state["progress"]]
        self.pools = self._new_pools()  # `_unpack` sets drawn problems only; the rest must be new
        for pools, saved in zip(self.pools, state["pools"], strict=True):
            for pool, columns in zip(pools, saved, strict=True):
                _unpack(pool, columns)
        for choice in self.plan.values():
            pool = self.pools[choice.source][choice.level]
            if pool.size is not None:
                pool.waiting[choice.index] += 1


_COLUMNS = ("rates", "last", "tried", "step", "times")


def _packed(pool: Pool) -> dict[str, Any]:
    """A pool's counts, and its columns for the problems that were drawn, as JSON values."""
    seen = np.flatnonzero(pool.times)
    columns = {name: getattr(pool, name)[seen].tolist() for name in _COLUMNS}
    columns |= {
        name: [None if np.isnan(x) else x for x in columns[name]] for name in ("rates", "last")
    }
    counts = {name: getattr(pool, name) for name in ("size", "drawn", "cursor", "hard")}
    return {**counts, "seen": seen.tolist(), **columns}


def _unpack(pool: Pool, saved: Mapping[str, Any]) -> None:
    pool.drawn = saved["drawn"]
    pool.cursor = saved["cursor"]
    pool.hard = saved["hard"]
    for name in _COLUMNS:
        column = getattr(pool, name)
        values = [np.nan if x is None else x for x in saved[name]]
        column[saved["seen"]] = np.array(values, column.dtype)
