"""The simulator of `emberl plan`: emberl's schedule on devices that do not exist.

Admission, waiting and eviction are not modelled: `rollout.schedule.Schedule`, which real runs use,
decides here too, and keeps the same books. Simulated are the engines (`plan_worker`), the pool that
deals groups to them, marking, the learners' steps, the publication of weights, and lost workers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from ...rollout.dispatch import Dispatch
from ...rollout.schedule import Schedule
from .scenario import Scenario, StepRecord, Trace, Usage
from .simulated_worker import SimGroup, SimWorker

Waits = Generator[simpy.Event, Any, None]


def simulate(scenario: Scenario, tell: Callable[[int], None] | None = None) -> Trace:
    """Runs the scenario to its last step; deterministic in its seed. tell: how many steps are
    done, after each."""
    return _Simulation(scenario, tell).run()


class _Simulation:
    def __init__(self, scenario: Scenario, tell: Callable[[int], None] | None) -> None:
        self.scenario = scenario
        self._tell = tell
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
        self._dispatch: Dispatch[SimGroup] = Dispatch(count, scenario.given)
        self._cost = round(scenario.group_size * scenario.lengths.mean)
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
            if self._tell is not None:
                self._tell(len(steps))
        self._stop(schedule.close(scenario.steps))
        schedule.check()

    def _publish(self, version: int) -> Waits:
        """Gives the new weights to every worker, and waits until all serve them; but not for
        answers that are finished with the old ones first."""
        cost, in_flight = self.scenario.publication, self.scenario.in_flight
        yield self.env.timeout(cost.encode)
        self._served = version  # what a replacement gets
        if in_flight == "finish" and self.scenario.max_staleness:
            for i in self._up:
                self.env.process(self._install_drained(self.workers[i], version))
            return
        if not cost.staged:
            for i in self._up:
                self.workers[i].hold()
        yield self.env.timeout(cost.transfer)
        for i in self._up:
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
            number, cost = self._admitted, self._cost
            group = SimGroup(number=number, problem=problem, lengths=lengths, cost=cost)
            self._admitted += 1
            self.schedule.admit(group.number)
            self._dispatch.backlog.append(group)
        self._deal()

    def _deal(self) -> None:
        for i, groups in self._dispatch.deal().items():
            for group in groups:
                group.worker = i
            self.workers[i].submit(groups)

    @property
    def _up(self) -> list[int]:
        """The workers that are there."""
        return [i for i, up in enumerate(self._dispatch.up) if up]

    def _decoded(self, group: SimGroup) -> None:
        self._dispatch.release(group.worker, group)
        self._deal()
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
        if numbers:
            for i, groups in self._dispatch.remove(lambda group: group.number in numbers).items():
                self.workers[i].remove({group.number for group in groups})

    def _fail(self, i: int, rng: np.random.Generator) -> Waits:
        """Loses worker i now and then, and replaces it; what it had is asked for again."""
        failures, worker = self.scenario.failures, self.workers[i]
        while True:
            yield self.env.timeout(rng.exponential(failures.mtbf))
            self._dispatch.set_up(i, False)
            self._lost += 1
            worker.lose()
            lost = list(self._dispatch.jobs[i])
            for group in lost:
                self._dispatch.release(i, group)
            yield self.env.timeout(failures.restart)
            worker.restore(self._served)
            self._dispatch.set_up(i, True)
            for group in lost:
                self.schedule.reissue(group.number)
                self._dispatch.backlog.append(group.anew())
            self._reissued += len(lost)
            self._deal()

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
