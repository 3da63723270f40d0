"""The simulator of `emberl plan`: emberl's schedule on devices that do not exist.

Admission, waiting, eviction and dealing are not modelled: `rollout.schedule.Schedule` and
`rollout.schedule.Dispatch`, which real runs use, decide here too, and keep the same books.
Simulated are the engines (`simulated_worker`), marking, the learners' steps, the publication of
weights, and lost workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import simpy

from ...rollout.schedule import QUEUE_DEPTH, Dispatch, Schedule
from .settings import Scenario, lognormal
from .simulated_worker import SimGroup, SimWorker, Waits

Figures = dict[str, Any]
HOUR = 3600


class StepRecord(NamedTuple):
    """One simulated step; the first four are times on the simulation's clock."""

    begun: float
    taken: float  # the learners have their groups
    trained: float
    end: float  # the new weights are published
    answer_tokens: int
    lags: Mapping[int, float]  # versions behind the one that is trained -> tokens of answers
    usage: tuple[float, ...]  # `SimWorker.usage` of all workers, at its end


def simulate(scenario: Scenario, tell: Callable[[int], None] = lambda done: None) -> Simulation:
    """Runs the scenario to its last step; deterministic in its seed. tell: how many steps are
    done, after each."""
    simulation = Simulation(scenario)
    simulation.env.run(until=simulation.env.process(simulation.learn(tell)))
    return simulation


class Simulation:
    """A run that was simulated: its `steps`, the schedule's own books, and workers `lost`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.env = scenario, simpy.Environment()
        asked, workers = scenario.schedule, range(scenario.workers)
        self._schedule: Schedule[SimGroup] = Schedule(
            groups_per_step=asked.prompts_per_step,
            max_staleness=asked.max_staleness,
            overdue="evict" if asked.oversample > 1 else asked.overdue,
            oversample=asked.oversample,
        )
        self.counts = self._schedule.counts
        queue = QUEUE_DEPTH * scenario.slots if asked.max_staleness else None
        self._dispatch: Dispatch[SimGroup] = Dispatch(scenario.workers, queue)
        self._workers = [SimWorker(self.env, scenario, partial(self._decoded, i)) for i in workers]
        self.steps: list[StepRecord] = []
        self._admitted = self._served = self.lost = 0
        self._marked = self.env.event()  # the next time that a group is
        self._graders = simpy.Resource(self.env, scenario.reward.graders)
        self._lengths, failures, self._rewards = (
            np.random.default_rng([scenario.seed, i]) for i in range(3)
        )
        if np.isfinite(scenario.failures.mtbf):
            for i in workers:
                self.env.process(self._fail(i, np.random.default_rng(failures.integers(1 << 62))))

    def learn(self, tell: Callable[[int], None]) -> Waits:
        """The loop of `rl/trainer.py`."""
        scenario, env = self.scenario, self.env
        for version in range(scenario.steps):
            begun = env.now
            self._close(version)
            self._admit()
            while (groups := self._schedule.take(scenario.schedule.prompts_per_step)) is None:
                yield self._marked
                self._admit()
            taken = env.now
            answers = sum(int(group.lengths.sum()) for group in groups)
            tokens = answers + sum(group.prompt * group.samples for group in groups)
            yield env.timeout(scenario.learner_fixed + scenario.learner_per_token * tokens)
            trained = env.now
            yield from self._publish(version + 1)
            lags: defaultdict[int, float] = defaultdict(float)
            for group in groups:
                for sampled_by, count in group.tokens.items():
                    lags[version - sampled_by] += count
            usage = tuple(map(sum, zip(*(w.usage() for w in self._workers), strict=True)))
            self.steps.append(StepRecord(begun, taken, trained, env.now, answers, lags, usage))
            tell(len(self.steps))
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
        cost, asked = self.scenario.publication, self.scenario.schedule
        yield self.env.timeout(cost.encode)
        self._served = version  # what a replacement gets
        if asked.in_flight == "finish" and asked.max_staleness:
            for worker in self._up():
                self.env.process(worker.finish_and_install(version, cost))
            return
        if not cost.staged:
            for worker in self._up():
                worker.hold()
        yield self.env.timeout(cost.transfer)
        for worker in self._up():
            # where workers would finish answers first, none is left at max_staleness=0
            worker.install(version, cost.commit, parked=asked.in_flight == "park")
        yield self.env.timeout(cost.commit)

    def _up(self) -> list[SimWorker]:
        """The workers that are there."""
        return [w for w, up in zip(self._workers, self._dispatch.up, strict=True) if up]

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
        self.env.process(self._mark(group))

    def _mark(self, group: SimGroup) -> Waits:
        reward = self.scenario.reward
        with self._graders.request() as turn:
            yield turn
            z = self._rewards.standard_normal()
            yield self.env.timeout(float(lognormal(reward.seconds, reward.cv, z)))
        self._schedule.finish(group.number, group, min(group.tokens))
        self._marked.succeed()
        self._marked = self.env.event()

    def _fail(self, i: int, rng: np.random.Generator) -> Waits:
        """Loses worker i now and then, and replaces it; what it had is asked for again, unless it
        is too old by then."""
        failures, worker, jobs = self.scenario.failures, self._workers[i], self._dispatch.jobs[i]
        while True:
            yield self.env.timeout(rng.exponential(failures.mtbf * HOUR))
            self._dispatch.set_up(i, False)
            self.lost += 1
            worker.remove(lambda group: True)
            worker.hold()
            lost = self._dispatch.remove(jobs.__contains__).get(i, [])
            yield self.env.timeout(failures.restart)
            worker.install(self._served)
            self._dispatch.set_up(i, True)
            wanted = set(self._schedule.open)
            for group in lost:
                if group.number in wanted:
                    self._schedule.reissue(group.number)
                    self._dispatch.backlog.append(replace(group))
            self._deal()


def figures(trace: Simulation) -> Figures:
    """Means over the steps after the warm-up; seconds, tokens, shares of 1."""
    scenario, counts = trace.scenario, trace.counts
    steps = trace.steps[scenario.warmup :]
    used = np.array(steps[-1].usage)
    if scenario.warmup:
        used -= trace.steps[scenario.warmup - 1].usage
    idle, held, slot_seconds, decoded = used.tolist()
    seconds = steps[-1].end - steps[0].begun
    worker_seconds = scenario.workers * seconds
    tokens = sum(step.answer_tokens for step in steps)
    lags: defaultdict[int, float] = defaultdict(float)
    for step in steps:
        for lag, count in step.lags.items():
            lags[lag] += count
    total = sum(lags.values())
    return {
        "step_s": seconds / len(steps),
        "tokens_per_s": tokens / seconds,
        "rollout_idle": idle / worker_seconds,
        "slots_used": slot_seconds / worker_seconds / scenario.slots,
        "learner_idle": sum(step.taken - step.begun for step in steps) / seconds,
        "learner_busy": sum(step.trained - step.taken for step in steps) / seconds,
        "sync_exposed_learner_s": sum(step.end - step.trained for step in steps) / len(steps),
        "sync_exposed_rollout_s": held / scenario.workers / len(steps),
        "staleness": {str(lag): lags[lag] / total for lag in sorted(lags)},
        "staleness_mean": sum(lag * count for lag, count in lags.items()) / total,
        "staleness_max": max(lags),
        "evicted_groups": (counts.cut + counts.stale) / len(trace.steps),
        "wasted_tokens": max(0.0, 1 - tokens / decoded),
        "workers_lost": trace.lost,
        "groups_reissued": counts.reissued,
    }
