"""A rollout worker of the simulator: an engine with slots, without an event per token.

All running answers advance together, so the worker keeps one number, its *mark*: tokens that every
running answer has decoded since the simulation began. An answer that starts at mark m and has n
tokens ends at mark m + n, and between two changes of the running set time follows from the decode
table. One event per finished answer is all it takes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import inf, sqrt
from typing import Any, ClassVar, NamedTuple

import simpy

from .devices import Floats
from .settings import Publication, Scenario

Waits = Generator[simpy.Event, Any, None]
EPSILON = 1e-6  # tokens: what rounding may do to a mark


@dataclass(slots=True, eq=False)
class SimGroup:
    """A prompt and its answers on their way. `dataclasses.replace` gives it as it was before it was
    sampled."""

    number: int
    prompt: int  # tokens
    lengths: Floats  # [G] tokens of the answers
    cost: ClassVar[float] = 1.0  # the pool expects the same of all groups
    finished: int = field(init=False, default=0)  # answers
    tokens: dict[int, float] = field(init=False, default_factory=dict)  # by the version they are of
    prefilled: int = field(init=False, default=0)  # the worker's updates when its prompt was read

    @property
    def samples(self) -> int:
        return len(self.lengths)


class Answer(NamedTuple):
    """One that is decoded: its marks, and a number that tells answers with equal ends apart."""

    end: float
    number: int
    start: float
    group: SimGroup


class SimWorker:
    """Decodes answers; `finished` is called with each group whose last answer is there."""

    def __init__(
        self, env: simpy.Environment, scenario: Scenario, finished: Callable[[SimGroup], None]
    ) -> None:
        self._env, self._finished, self._slots = env, finished, scenario.slots
        self._rows, self._prefill = scenario.table.rows(scenario.slots), scenario.table.prefill
        self._contexts: list[float] = scenario.table.context.tolist()
        self._running: list[Answer] = []  # a heap
        self._waiting: deque[tuple[SimGroup, float]] = deque()  # a group, an answer's length
        self._numbers = count()
        self._mark = 0.0
        self._context = 0.0  # tokens that all running answers read
        self._since = 0.0  # the time of these two
        self._stalled = 0.0  # until then nothing is decoded (prefill, commit)
        self._held = False
        self._updates = 0  # that wait for what is running
        self._late: list[SimGroup] = []  # submitted meanwhile
        self._drained = env.event()  # the next time that nothing runs
        self._planned: simpy.Event | None = None  # wake-ups that were planned earlier are void
        self._first, self._slope = 1.0, 0.0  # seconds of the next token, and their growth with each
        self._changes = [(0.0, 0)]  # (mark, version) of each update
        self._idle = self._stood = self._slot_seconds = self._decoded = 0.0  # see `usage`

    def submit(self, groups: Sequence[SimGroup]) -> None:
        if self._updates:
            self._late.extend(groups)
            return
        self._advance()
        self._waiting.extend((group, float(n)) for group in groups for n in group.lengths)
        self._admit_and_plan()

    def remove(self, unwanted: Callable[[SimGroup], bool]) -> None:
        """Stops all answers of these groups."""
        self._advance()
        kept = [answer for answer in self._running if not unwanted(answer.group)]
        if len(kept) < len(self._running):
            self._running = kept
            heapq.heapify(self._running)
            self._context = sum(a.group.prompt + self._mark - a.start for a in kept)
        self._waiting = deque(item for item in self._waiting if not unwanted(item[0]))
        self._late = [group for group in self._late if not unwanted(group)]
        self._admit_and_plan()

    def hold(self) -> None:
        """Decoding stands still until `install`."""
        self._advance()
        self._held = True
        self._planned = None

    def finish_and_install(self, version: int, cost: Publication) -> Waits:
        """Serves these weights once all that is here is finished; new groups wait until the last
        of several such updates is in."""
        if cost.staged:
            yield self._env.timeout(cost.transfer)
        self._updates += 1
        drained = self._drained
        if not self._running:
            self._plan()
        yield drained
        if not cost.staged:
            yield self._env.timeout(cost.transfer)
        self.install(version, cost.commit)
        self._updates -= 1
        if not self._updates:
            late, self._late = self._late, []
            self.submit(late)

    def install(self, version: int, seconds: float = 0.0, *, parked: bool = False) -> None:
        """Serves these weights after `seconds` in which nothing is decoded; what is running goes on
        with them, after its text was read again if it was parked."""
        self._advance()
        if parked:
            seconds += self._prefill * self._context
        if self._running:
            self._stood += seconds
        self._stalled = max(self._stalled, self._env.now) + seconds
        self._changes.append((self._mark, version))
        self._held = False
        self._plan()

    def usage(self) -> tuple[float, float, float, float]:
        """Since the beginning: seconds with nothing to decode, and seconds in which running answers
        stood still for new weights; seconds of all slots in use; tokens, thrown away ones too."""
        self._advance()
        return self._idle, self._stood, self._slot_seconds, self._decoded

    def _step_seconds(self, row: Sequence[float], context: float) -> float:
        grid = self._contexts
        i = bisect_right(grid, context)
        if i == 0 or i == len(grid):
            return row[max(0, i - 1)]
        share = (context - grid[i - 1]) / (grid[i] - grid[i - 1])
        return row[i - 1] + share * (row[i] - row[i - 1])

    def _advance(self) -> None:
        """Brings the mark to the present."""
        n, now = len(self._running), self._env.now
        span = now - self._since
        if n == 0:
            self._idle += span
        elif self._held:
            self._stood += span
        elif span:
            decoding = max(0.0, now - max(self._since, self._stalled))
            a, b = self._first, self._slope
            if abs(b) < 1e-15:
                tokens = decoding / a
            else:
                tokens = (sqrt(max(0.0, a * a + 2 * b * decoding)) - a) / b
            self._mark += tokens
            self._first += b * tokens
            self._context += n * tokens
            self._decoded += n * tokens
        self._slot_seconds += n * span
        self._since = now

    def _admit_and_plan(self) -> None:
        """Fills free slots; the first answer of a group, or after an update, pays for reading
        its prompt."""
        while self._waiting and len(self._running) < self._slots:
            group, length = self._waiting.popleft()
            if group.prefilled < len(self._changes):
                group.prefilled = len(self._changes)
                reading = self._prefill * group.prompt
                self._stalled = max(self._stalled, self._env.now) + reading
            answer = Answer(self._mark + length, next(self._numbers), self._mark, group)
            heapq.heappush(self._running, answer)
            self._context += group.prompt
        self._plan()

    def _plan(self) -> None:
        """Sets the clock for the next answer that ends."""
        self._planned = None
        n = len(self._running)
        if n == 0:
            self._drained.succeed()
            self._drained = self._env.event()
        if n == 0 or self._held:
            return
        tokens = max(0.0, self._running[0].end - self._mark)
        row, context = self._rows[n], self._context / n
        self._first = self._step_seconds(row, context)
        last = self._step_seconds(row, context + tokens)
        self._slope = (last - self._first) / tokens if tokens > EPSILON else 0.0
        wait = max(0.0, self._stalled - self._env.now) + tokens * (self._first + last) / 2
        self._planned = self._env.timeout(wait)
        assert self._planned.callbacks is not None
        self._planned.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event is not self._planned:
            return
        self._advance()
        end = self._running[0].end
        self._context += len(self._running) * (end - self._mark)
        self._mark = end
        complete = []
        while self._running and self._running[0].end <= end + EPSILON:
            answer = heapq.heappop(self._running)
            group = answer.group
            self._context -= group.prompt + end - answer.start
            self._note(answer)
            group.finished += 1
            if group.finished == group.samples:
                complete.append(group)
        self._admit_and_plan()
        for group in complete:
            self._finished(group)

    def _note(self, answer: Answer) -> None:
        """Counts its tokens under the versions that sampled them."""
        tokens = answer.group.tokens
        first = bisect_right(self._changes, (answer.start, inf)) - 1
        for (mark, version), (next_mark, _) in pairwise([*self._changes[first:], (inf, -1)]):
            start, stop = max(mark, answer.start), min(next_mark, self._mark)
            if stop > start:
                tokens[version] = tokens.get(version, 0.0) + stop - start
