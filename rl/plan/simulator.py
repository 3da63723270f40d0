"""The simulator of `emberl plan`: emberl's schedule on devices that do not exist.

Admission, waiting and eviction are not modelled: `rollout.schedule.Schedule`, which real runs use,
decides here too, and keeps the same books. Simulated are the engines (`plan_worker`), the pool that
deals groups to them, marking, the learners' steps, the publication of weights, and lost workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from ...rollout.schedule import Schedule
from .scenario import Scenario, StepRecord, Trace, Usage
from .worker import SimGroup, SimWorker

UNLIMITED = 1 << 20
"""Answers that no worker reaches."""

Waits = Generator[simpy.Event, Any, None]


def simulate(scenario: Scenario) -> Trace:
    """Runs the scenario to its last step; deterministic in its seed."""
    return _Simulation(scenario).run()


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.env = simpy.Environment()
        lengths, failures = (np.random.default_rng([scenario.seed, i]) for i in range(2))
        self._lengths = lengths
        self._rewards = np.random.default_rng([scenario.seed, 2])
        self.schedule: Schedule[SimGroup] = Schedule(
            groups_per_step=scenario.prompts_per_step,
            max_staleness=scenario.max_staleness,
            overdue=scenario.overdue,
            oversample=scenario.oversample,
        )
        self.workers = [
            SimWorker(self.env, scenario.table, scenario.slots, self._decoded)
            for _ in range(scenario.workers)
        ]
        count = scenario.workers
        self._groups: list[dict[int, SimGroup]] = [{} for _ in range(count)]  # what each worker has
        self._load = np.zeros(count)
        self._samples = np.zeros(count, np.int64)
        self._up = np.ones(count, np.bool_)
        self._most = scenario.given or UNLIMITED
        self._expected = scenario.lengths.mean
        self._backlog: deque[SimGroup] = deque()
        self._admitted = self._served = self._lost = self._reissued = 0
        self._changed = self.env.event()
        self._graders = simpy.Resource(self.env, scenario.reward.graders)
        if np.isfinite(scenario.failures.mtbf):
            for i in range(count):
                self.env.process(self._fail(i, np.random.default_rng(failures.integers(1 << 62))))

    def run(self) -> Trace:
        steps: list[StepRecord] = []
        usage = [self._usage()]
        self.env.run(until=self.env.process(self._learn(steps, usage)))
        return Trace(
            scenario=self.scenario,
            steps=tuple(steps),
            usage=tuple(usage),
            counts=self.schedule.counts,
            lost=self._lost,
            reissued=self._reissued,
        )

    # The learners

    def _learn(self, steps: list[StepRecord], usage: list[Usage]) -> Waits:
        """The loop of `rl/trainer.py`."""
        scenario, schedule = self.scenario, self.schedule
        for version in range(scenario.steps):
            start = self.env.now
            self._stop(schedule.close(version))
            schedule.check()
            while True:
                self._admit()
                if (groups := schedule.take(scenario.prompts_per_step)) is not None:
                    break
                self._changed = self.env.event()
                yield self._changed
            trained_from = self.env.now
            tokens = sum(group.all_tokens for group in groups)
            yield self.env.timeout(scenario.learner_fixed + scenario.learner_per_token * tokens)
            published_from = self.env.now
            yield from self._publish(version + 1)
            steps.append(
                StepRecord(
                    start=start,
                    trained_from=trained_from,
                    published_from=published_from,
                    end=self.env.now,
                    answer_tokens=sum(group.answer_tokens for group in groups),
                    tokens=tokens,
                    lags=_lags(groups, version),
                )
            )
            usage.append(self._usage())
        self._stop(schedule.close(scenario.steps))
        schedule.check()

    def _publish(self, version: int) -> Waits:
        """Gives the new weights to every worker, and waits until all serve them; but not for
        answers that are finished with the old ones first."""
        cost, in_flight = self.scenario.publication, self.scenario.in_flight
        yield self.env.timeout(cost.encode)
        self._served = version  # what a replacement gets
        if in_flight == "finish" and self.scenario.max_staleness:
            for i in np.flatnonzero(self._up):
                self.env.process(self._install_drained(self.workers[i], version))
            return
        if not cost.staged:
            for i in np.flatnonzero(self._up):
                self.workers[i].hold()
        yield self.env.timeout(cost.transfer)
        for i in np.flatnonzero(self._up):
            self.workers[i].install(
                version, cost.commit, in_flight="update" if in_flight == "finish" else in_flight
            )
        yield self.env.timeout(cost.commit)

    def _install_drained(self, worker: SimWorker, version: int) -> Waits:
        cost = self.scenario.publication
        if cost.staged:
            yield self.env.timeout(cost.transfer)
        yield worker.drain()
        if not cost.staged:
            yield self.env.timeout(cost.transfer)
        worker.install(version, cost.commit, "finish")

    # The pool

    def _admit(self) -> None:
        """Asks for as many groups as the schedule has room for."""
        if self.scenario.max_staleness == 0 and self.schedule.running:
            return
        for _ in range(self.schedule.room):
            source, rng = self.scenario.lengths, self._lengths
            problem = source.problem(rng)
            lengths = source.answers(problem, rng, self.scenario.group_size)
            group = SimGroup(number=self._admitted, problem=problem, lengths=lengths)
            self._admitted += 1
            self.schedule.admit(group.number)
            self._backlog.append(group)
        if self._backlog:
            self._dispatch()

    def _dispatch(self) -> None:
        """To the workers that have the least to do, as the pool does."""
        shares: dict[int, list[SimGroup]] = {}
        tokens = self.scenario.group_size * self._expected
        load = np.where(
            self._up & ((self._samples < self._most) | (self._samples == 0)), self._load, np.inf
        )
        while self._backlog and np.isfinite(load[i := int(load.argmin())]):
            group = self._backlog.popleft()
            group.worker = i
            self._groups[i][group.number] = group
            shares.setdefault(i, []).append(group)
            self._load[i] += tokens
            self._samples[i] += len(group.lengths)
            load[i] = self._load[i] if self._samples[i] < self._most else np.inf
        for i, groups in shares.items():
            self.workers[i].submit(groups)

    def _leave(self, group: SimGroup) -> None:
        i = group.worker
        del self._groups[i][group.number]
        self._samples[i] -= len(group.lengths)
        self._load[i] = len(self._groups[i]) * self.scenario.group_size * self._expected

    def _decoded(self, group: SimGroup) -> None:
        self._leave(group)
        if self._backlog:
            self._dispatch()
        if self.scenario.reward.seconds == 0:
            self._marked(group)
        else:
            self.env.process(self._mark(group))

    def _mark(self, group: SimGroup) -> Waits:
        with self._graders.request() as turn:
            yield turn
            yield self.env.timeout(self.scenario.reward.draw(self._rewards))
        self._marked(group)

    def _marked(self, group: SimGroup) -> None:
        self.schedule.finish(group.number, group, min(group.tokens))
        if not self._changed.triggered:
            self._changed.succeed()

    def _stop(self, cut: list[int]) -> None:
        """Ends the answers of evicted groups."""
        numbers = set(cut)
        for i, groups in enumerate(self._groups):
            if found := numbers & groups.keys():
                for group in [groups[number] for number in found]:
                    self._leave(group)
                self.workers[i].remove(found)
        self._backlog = deque(group for group in self._backlog if group.number not in numbers)

    def _fail(self, i: int, rng: np.random.Generator) -> Waits:
        """Loses worker i now and then, and replaces it; what it had is asked for again."""
        failures, worker = self.scenario.failures, self.workers[i]
        while True:
            yield self.env.timeout(rng.exponential(failures.mtbf))
            self._up[i], self._lost = False, self._lost + 1
            worker.lose()
            lost = list(self._groups[i].values())
            for group in lost:
                self._leave(group)
            yield self.env.timeout(failures.restart)
            worker.restore(self._served)
            self._up[i] = True
            for group in lost:
                self.schedule.reissue(group.number)
                self._backlog.append(
                    SimGroup(number=group.number, problem=group.problem, lengths=group.lengths)
                )
            self._reissued += len(lost)
            self._dispatch()

    def _usage(self) -> Usage:
        each = [worker.usage() for worker in self.workers]
        names = ("idle", "held", "slot_seconds", "decoded")
        return Usage(
            time=self.env.now, **{name: sum(getattr(u, name) for u in each) for name in names}
        )


def _lags(groups: list[SimGroup], version: int) -> dict[int, float]:
    lags: dict[int, float] = {}
    for group in groups:
        for sampled_by, tokens in group.tokens.items():
            lag = version - sampled_by
            lags[lag] = lags.get(lag, 0.0) + tokens
    return lags
