"""`Schedule` decides which groups may start, which are ready to train on, and which are too old;
`Dispatch` decides which worker decodes which group. Pure bookkeeping, without Ray and without a
clock: `emberl plan` simulates runs with the same objects.

A step trains B groups on weights of some version v and publishes version v + 1. With
`max_staleness` k a token sampled by version w may train up to version w + k, its group's
*deadline*. Three rules keep that for every token, at every k:

- *Room.* At most (k + 1) B groups are open (admitted and not trained yet), so one that starts now
  can be used in time if groups are used in their order (AReaL's rule, arXiv 2505.24298, section
  5.1); B fewer for each version that workers are behind.
- *Waiting.* Groups become ready in another order than they start, so that rule alone lets a slow
  one grow older than k. `take` therefore hands out ready groups only if those left behind can still
  all be used in time: for each deadline d, at most B (d - v) of them may be due by d. With k = 0
      this waits for all B: the synchronous loop is the special case.
- *Eviction* (`overdue="evict"`). Nobody is waited for; what is past its deadline is thrown away.

The group's age is counted from the version at which it was handed to a worker, and once it is
finished from the oldest of its tokens, which is what the bound is about.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Generic, Literal, Protocol, TypeVar

T = TypeVar("T")

Overdue = Literal["wait", "evict"]

QUEUE_DEPTH = 4
"""Answers that a worker is given for each of its slots when rollouts run ahead. A group counts
whole until its last answer is there, by when most of a long-tailed group's slots are long free: at
1 two thirds of them would stand empty."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """Groups since the schedule began. Each issue ends in one of four ways; each finished group in
    one of four others."""

    issued: int = 0
    """Handed to a worker, again after a loss included."""
    finished: int = 0
    reissued: int = 0
    """Lost with their worker, and issued again."""
    cut: int = 0
    """Thrown away while they were decoded."""
    trained: int = 0
    dropped: int = 0
    """Finished, but left out: no signal under dynamic sampling."""
    stale: int = 0
    """Finished, but too old to train."""


class Schedule(Generic[T]):
    """The groups from admission to training, by number (the order of admission); T is the type of a
    finished group.

    Not thread-safe.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        overdue: Overdue = "wait",
        oversample: float = 1.0,
    ) -> None:
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.overdue = overdue
        self.width = ceil(groups_per_step * oversample) + groups_per_step * max_staleness
        """Open groups at most."""
        self.version = self.served = 0
        """The version that learners train, and the one with which a group admitted now may start,
        which is older while workers finish running groups before an update."""
        self.counts = Counts()
        self._started: dict[int, int] = {}  # number -> version at which a worker got it
        # number -> (version of the oldest token, the group)
        self._ready: dict[int, tuple[int, T]] = {}
        self._training: list[int] = []

    @property
    def running(self) -> int:
        """Number of groups that are being decoded or graded."""
        return len(self._started)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def room(self) -> int:
        """Number of groups that may be admitted now."""
        behind = self.groups_per_step * (self.version - self.served)
        return max(
            0, self.width - behind - len(self._started) - len(self._ready) - len(self._training)
        )

    @property
    def open(self) -> list[int]:
        """Numbers of the groups that were admitted and not taken yet, ascending."""
        return sorted([*self._started, *self._ready])

    def admit(self, number: int) -> None:
        assert self.room > 0, f"group {number} was admitted to a full schedule"
        assert number not in self._started and number not in self._ready, (
            f"group {number} was admitted twice"
        )
        self._started[number] = self.served
        self.counts.issued += 1

    def reissue(self, number: int) -> None:
        """Records that a group starts again, with the newest weights, after its worker was lost."""
        if number in self._started:
            self._started[number] = self.served
            self.counts.reissued += 1
            self.counts.issued += 1

    def finish(self, number: int, group: T, oldest_version: int) -> None:
        """Records a finished group as ready, or as stale if it is past its deadline; ignores one
        that was thrown away meanwhile."""
        if number not in self._started:
            return
        del self._started[number]
        self.counts.finished += 1
        if oldest_version + self.max_staleness < self.version:
            self.counts.stale += 1
        else:
            self._ready[number] = (oldest_version, group)

    def drop(self, number: int) -> None:
        """Removes a ready group that will not train."""
        if self._ready.pop(number, None) is not None:
            self.counts.dropped += 1

    def take(self, wanted: int) -> list[T] | None:
        """The `wanted` ready groups that are due first, in order of admission, to train on the
        present version; None while there are fewer, or while the learner has to wait for one that
        is due."""
        wait = self.overdue == "wait"
        if len(self._ready) < wanted or (wait and not self._in_time(())):
            return None
        chosen = sorted(self._ready, key=lambda number: (self._ready[number][0], number))[:wanted]
        taken = set(chosen)
        left = [oldest for number, (oldest, _) in self._ready.items() if number not in taken]
        if wait and not self._in_time(left):
            return None
        chosen.sort()
        self._training = chosen
        return [self._ready.pop(number)[1] for number in chosen]

    def _in_time(self, left: Iterable[int]) -> bool:
        """Whether all running groups, and ready ones of the versions `left`, can train by their
        deadlines, B in each step from the next version on. Waiting cannot help surplus ready
        groups; they may go stale."""
        running, ready = Counter(self._started.values()), Counter(left)
        before = self.version - self.max_staleness
        due_running, due = (
            sum(c[version] for version in c if version < before) for c in (running, ready)
        )
        for ahead in range(self.max_staleness + 1):
            due_running += running[before + ahead]
            due += ready[before + ahead]
            if due_running and due_running + due > self.groups_per_step * ahead:
                return False
        return True

    def close(self, version: int, served: int | None = None) -> list[int]:
        """Ends the step whose groups were taken: the learners are at `version` from now on, and,
        unless `served` is older, so are the workers. Returns the running groups that are now too
        old, for their workers to stop."""
        assert version >= self.version, f"the version went from {self.version} to {version}"
        self.counts.trained += len(self._training)
        self._training = []
        self.version = version
        self.served = version if served is None else served
        late = [
            number
            for number, (oldest, _) in self._ready.items()
            if oldest + self.max_staleness < version
        ]
        for number in late:
            del self._ready[number]
        self.counts.stale += len(late)
        cut = [
            number
            for number, started in self._started.items()
            if started + self.max_staleness < version
        ]
        for number in cut:
            del self._started[number]
        self.counts.cut += len(cut)
        return cut

    def check(self) -> None:
        """The books must balance: no group is lost, and none is counted twice."""
        counts, running = self.counts, len(self._started)
        ended = counts.finished + counts.reissued + counts.cut
        assert counts.issued == ended + running, (
            f"{counts} with {running} running: issues and their ends differ"
        )
        kept = len(self._ready) + len(self._training)
        ended = counts.trained + counts.dropped + counts.stale
        assert counts.finished == ended + kept, (
            f"{counts} with {kept} kept: finished groups and their ends differ"
        )


class Decodable(Protocol):
    """A group that a worker can be given; neither figure changes while it has it."""

    @property
    def samples(self) -> int:
        """Answers that are to be decoded."""
        ...

    @property
    def cost(self) -> float:
        """Tokens that these are expected to have."""
        ...


J = TypeVar("J", bound=Decodable)


class Dispatch(Generic[J]):
    """Assigns groups to the worker with the fewest tokens to decode, the first of equal ones. So
    equal groups go round, and the same groups go to the same workers in the same order."""

    def __init__(self, workers: int, max_samples: int | None = None) -> None:
        """max_samples: a worker that has so many answers gets no further group; None: all."""
        self.backlog: deque[J] = deque()
        """Groups that no worker may take yet."""
        self.jobs: list[dict[J, None]] = [{} for _ in range(workers)]
        """Each worker's groups, in the order in which they were given."""
        self.up = [True] * workers
        """Whether each worker may be given anything."""
        self._max_samples = max_samples
        self._samples = [0] * workers
        self._load = [0.0] * workers
        # (load, worker) of all that are free, and of some that were: those are skipped
        self._free = [(0.0, i) for i in range(workers)]

    def deal(self) -> dict[int, list[J]]:
        """Gives groups of the backlog to workers, as many as these may take: the new ones by
        worker."""
        shares: dict[int, list[J]] = {}
        while self.backlog and (worker := self._least()) is not None:
            job = self.backlog.popleft()
            self.jobs[worker][job] = None
            self._samples[worker] += job.samples
            self._load[worker] += job.cost
            self._changed(worker)
            shares.setdefault(worker, []).append(job)
        return shares

    def release(self, worker: int, job: J) -> None:
        """Takes a group from its worker."""
        del self.jobs[worker][job]
        self._samples[worker] -= job.samples
        # exactly 0 without jobs: what rounding leaves would decide between idle workers
        self._load[worker] = self._load[worker] - job.cost if self.jobs[worker] else 0.0
        self._changed(worker)

    def set_up(self, worker: int, up: bool) -> None:
        self.up[worker] = up
        self._changed(worker)

    def remove(self, unwanted: Callable[[J], bool]) -> dict[int, list[J]]:
        """Takes these groups out of the backlog and from their workers: the latter by worker."""
        self.backlog = deque(job for job in self.backlog if not unwanted(job))
        removed = {i: [job for job in jobs if unwanted(job)] for i, jobs in enumerate(self.jobs)}
        for worker, jobs in removed.items():
            for job in jobs:
                self.release(worker, job)
        return {worker: jobs for worker, jobs in removed.items() if jobs}

    def clear(self) -> Iterable[J]:
        """Takes all groups out."""
        everything = [*self.backlog, *(job for jobs in self.jobs for job in jobs)]
        self.remove(lambda _: True)
        return everything

    def _takes(self, worker: int) -> bool:
        limit = self._max_samples
        room = limit is None or not self.jobs[worker] or self._samples[worker] < limit
        return self.up[worker] and room

    def _changed(self, worker: int) -> None:
        if len(self._free) > 8 * len(self.jobs):
            self._free = [(self._load[i], i) for i in range(len(self.jobs)) if self._takes(i)]
            heapq.heapify(self._free)
        elif self._takes(worker):
            heapq.heappush(self._free, (self._load[worker], worker))

    def _least(self) -> int | None:
        while self._free:
            load, worker = self._free[0]
            if self._takes(worker) and load == self._load[worker]:
                return worker
            heapq.heappop(self._free)
        return None
