"""The simulator of `emberl plan`: emberl's schedule on devices that do not exist.

Admission, waiting, eviction and dealing are not modelled: `rollout.schedule.Schedule` and
`rollout.schedule.Dispatch`, which real runs use, decide here too, and keep the same books.
Simulated are the engines (`simulated_worker`), marking, the learners' steps, the publication of
weights, and lost workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import simpy

from ...rollout.schedule import QUEUE_DEPTH, Dispatch, Schedule
from .scenario import Scenario, StepRecord, Usage
from .simulated_worker import SimGroup, SimWorker

Waits = Generator[simpy.Event, Any, None]
HOUR = 3600


def simulate(scenario: Scenario, tell: Callable[[int], None] = lambda done: None) -> Simulation:
    """Runs the scenario to its last step; deterministic in its seed. tell: how many steps are
    done, after each."""
    return Simulation(scenario, tell).run()


class Simulation:
    """A run that was simulated: its `steps`, the schedule's own books, and workers `lost`."""

    def __init__(self, scenario: Scenario, tell: Callable[[int], None]) -> None:
        self.scenario = scenario
        self._tell = tell
        self._env = simpy.Environment()
        asked, workers = scenario.schedule, scenario.workers
        self._schedule: Schedule[SimGroup] = Schedule(
            groups_per_step=asked.prompts_per_step,
            max_staleness=asked.max_staleness,
            overdue="evict" if asked.oversample > 1 else asked.overdue,
            oversample=asked.oversample,
        )
        self.counts = self._schedule.counts
        self._workers = [
            SimWorker(self._env, scenario, partial(self._decoded, i)) for i in range(workers)
        ]
        self._dispatch: Dispatch[SimGroup] = Dispatch(
            workers, QUEUE_DEPTH * scenario.slots if asked.max_staleness else None
        )
        self.steps: list[StepRecord] = []
        self._admitted = self._served = self.lost = 0
        self._changed = self._env.event()
        self._graders = simpy.Resource(self._env, scenario.reward.graders)
        self._lengths, failures, self._rewards = (
            np.random.default_rng([scenario.seed, i]) for i in range(3)
        )
        if np.isfinite(scenario.failures.mtbf):
            for i in range(workers):
                self._env.process(self._fail(i, np.random.default_rng(failures.integers(1 << 62))))

    def run(self) -> Simulation:
        self._env.run(until=self._env.process(self._learn()))
        return self

    # The learners

    def _learn(self) -> Waits:
        """The loop of `rl/trainer.py`."""
        scenario = self.scenario
        for version in range(scenario.steps):
            start = self._env.now
            self._close(version)
            while True:
                self._admit()
                if (groups := self._schedule.take(scenario.schedule.prompts_per_step)) is not None:
                    break
                self._changed = self._env.event()
                yield self._changed
            trained_from = self._env.now
            answer_tokens = sum(group.answer_tokens for group in groups)
            tokens = answer_tokens + sum(group.prompt * group.samples for group in groups)
            yield self._env.timeout(scenario.learner_fixed + scenario.learner_per_token * tokens)
            published_from = self._env.now
            yield from self._publish(version + 1)
            self.steps.append(
                StepRecord(
                    end=self._env.now,
                    waited=trained_from - start,
                    trained=published_from - trained_from,
                    published=self._env.now - published_from,
                    answer_tokens=answer_tokens,
                    lags=_lags(groups, version),
                    usage=Usage(*map(sum, zip(*(w.usage() for w in self._workers), strict=True))),
                )
            )
            self._tell(len(self.steps))
        self._close(scenario.steps)

    def _close(self, version: int) -> None:
        """The learners are at this version; ends the answers of groups that are too old for it."""
        if cut := set(self._schedule.close(version)):
            for i in self._dispatch.remove(lambda group: group.number in cut):
                self._workers[i].remove(lambda group: group.number in cut)
        self._schedule.check()

    def _publish(self, version: int) -> Waits:
        """Gives the new weights to every worker, and waits until all serve them; but not for
        answers that are finished with the old ones first."""
        cost, in_flight = self.scenario.publication, self.scenario.schedule.in_flight
        yield self._env.timeout(cost.encode)
        self._served = version  # what a replacement gets
        if in_flight == "finish":
            if self.scenario.schedule.max_staleness:
                for worker in self._up():
                    self._env.process(self._install_drained(worker, version))
                return
            in_flight = "update"  # nothing is in flight
        if not cost.staged:
            for worker in self._up():
                worker.hold()
        yield self._env.timeout(cost.transfer)
        for worker in self._up():
            worker.install(version, cost.commit, in_flight)
        yield self._env.timeout(cost.commit)

    def _install_drained(self, worker: SimWorker, version: int) -> Waits:
        cost = self.scenario.publication
        if cost.staged:
            yield self._env.timeout(cost.transfer)
        yield worker.drain()
        if not cost.staged:
            yield self._env.timeout(cost.transfer)
        worker.install(version, cost.commit, "finish")

    def _up(self) -> list[SimWorker]:
        """The workers that are there."""
        return [w for w, up in zip(self._workers, self._dispatch.up, strict=True) if up]

    # The pool

    def _admit(self) -> None:
        """Asks for as many groups as the schedule has room for."""
        scenario = self.scenario
        if scenario.schedule.max_staleness == 0 and self._schedule.running:
            return
        for _ in range(self._schedule.room):
            prompt, lengths = scenario.lengths.draw(self._lengths, scenario.schedule.group_size)
            self._schedule.admit(self._admitted)
            self._dispatch.backlog.append(SimGroup(self._admitted, prompt, lengths))
            self._admitted += 1
        self._deal()

    def _deal(self) -> None:
        for i, groups in self._dispatch.deal().items():
            self._workers[i].submit(groups)

    def _decoded(self, worker: int, group: SimGroup) -> None:
        self._dispatch.release(worker, group)
        self._deal()
        self._env.process(self._mark(group))

    def _mark(self, group: SimGroup) -> Waits:
        with self._graders.request() as turn:
            yield turn
            yield self._env.timeout(self.scenario.reward.draw(self._rewards))
        self._schedule.finish(group.number, group, min(group.tokens))
        if not self._changed.triggered:
            self._changed.succeed()

    def _fail(self, i: int, rng: np.random.Generator) -> Waits:
        """Loses worker i now and then, and replaces it; what it had is asked for again, unless it
        is too old by then."""
        failures, worker = self.scenario.failures, self._workers[i]
        while True:
            yield self._env.timeout(rng.exponential(failures.mtbf * HOUR))
            self._dispatch.set_up(i, False)
            self.lost += 1
            worker.remove(lambda group: True)
            worker.hold()
            lost = list(self._dispatch.jobs[i])
            for group in lost:
                self._dispatch.release(i, group)
            yield self._env.timeout(failures.restart)
            worker.install(self._served, 0.0, "update")
            self._dispatch.set_up(i, True)
            wanted = set(self._schedule.open)
            for group in lost:
                if group.number in wanted:
                    self._schedule.reissue(group.number)
                    self._dispatch.backlog.append(replace(group))
            self._deal()


def _lags(groups: list[SimGroup], version: int) -> dict[int, float]:
    lags: defaultdict[int, float] = defaultdict(float)
    for group in groups:
        for sampled_by, tokens in group.tokens.items():
            lags[version - sampled_by] += tokens
    return lags
