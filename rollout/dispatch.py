"""Which worker decodes which group: the policy of the pool, without Ray and without a clock.

`emberl plan` simulates runs with the same object.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar


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
    """Groups go to the worker with the fewest tokens to decode, the first of equal ones, so equal
    groups are dealt in turn and the same groups go to the same workers in the same order."""

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
        """The worker has it no longer."""
        del self.jobs[worker][job]
        self._samples[worker] -= job.samples
        # not what rounding leaves of it: a tie must be one
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
