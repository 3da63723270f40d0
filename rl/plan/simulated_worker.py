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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import inf, sqrt
from typing import ClassVar, NamedTuple

import simpy

from .scenario import Floats, InFlight, Scenario, Usage

EPSILON = 1e-6
"""Tokens: what rounding may do to a mark."""


@dataclass(slots=True, eq=False)
class SimGroup:
    """A prompt and its answers on their way. `dataclasses.replace` gives it as it was before it was
    sampled."""

    number: int
    prompt: int
    """Tokens."""
    lengths: Floats
    """[G] tokens of the answers."""
    cost: ClassVar[float] = 1.0
    """The pool expects the same of all groups."""
    left: int = field(init=False, default=0)
    """Answers that are not finished."""
    tokens: dict[int, float] = field(init=False, default_factory=dict)
    """Version -> tokens that it sampled."""
    prefilled: bool = field(init=False, default=False)

    @property
    def samples(self) -> int:
        return len(self.lengths)

    @property
    def answer_tokens(self) -> int:
        return int(self.lengths.sum())


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
        self._env = env
        self._slots = scenario.slots
        self._finished = finished
        self._rows = scenario.table.rows(scenario.slots)
        self._contexts = [float(c) for c in scenario.table.context]
        self._prefill = scenario.table.prefill
        self._running: list[Answer] = []  # a heap
        # (group, an answer's length), while all slots are taken
        self._waiting: deque[tuple[SimGroup, float]] = deque()
        self._numbers = count()
        self._mark = 0.0
        self._context = 0.0  # tokens that all running answers read
        self._since = 0.0  # the time of these two
        self._stalled = 0.0  # until then nothing is decoded (prefill, commit)
        self._held = False
        self._late: list[SimGroup] = []  # submitted while an update waits for what is running
        self._drained: list[simpy.Event] = []
        self._updates = 0  # that wait for this
        self._planned: simpy.Event | None = None  # wake-ups that were planned earlier are void
        # seconds of the next token, and how they grow with each token
        self._first = 1.0
        self._slope = 0.0
        self._changes = [(0.0, 0)]  # (mark, version) of each update
        self._idle = self._stood = self._slot_seconds = self._decoded = 0.0

    def submit(self, groups: Sequence[SimGroup]) -> None:
        if self._updates:
            self._late.extend(groups)
            return
        self._advance()
        for group in groups:
            group.left = group.samples
            self._waiting.extend((group, float(length)) for length in group.lengths)
        self._admit()
        self._plan()

    def remove(self, unwanted: Callable[[SimGroup], bool]) -> None:
        """Stops all answers of these groups."""
        self._advance()
        kept = [answer for answer in self._running if not unwanted(answer.group)]
        if len(kept) < len(self._running):
            self._running = kept
            heapq.heapify(self._running)
            self._context = sum(map(self._read, kept))
        self._waiting = deque(item for item in self._waiting if not unwanted(item[0]))
        self._late = [group for group in self._late if not unwanted(group)]
        self._admit()
        self._plan()
        self._tell_drained()

    def hold(self) -> None:
        """Decoding stands still until `install`."""
        self._advance()
        self._held = True
        self._plan()

    def drain(self) -> simpy.Event:
        """New groups wait for the next `install`; the event comes when those that are here are
        finished."""
        self._updates += 1
        drained = self._env.event()
        self._drained.append(drained)
        self._tell_drained()
        return drained

    def install(self, version: int, seconds: float, in_flight: InFlight) -> None:
        """Serves these weights after `seconds` in which nothing is decoded; what is running goes on
        with them, after its text was read again where it had been parked."""
        self._advance()
        if in_flight == "park":
            seconds += self._prefill * self._context
        if self._running:
            self._stood += seconds
        self._stall(seconds)
        self._changes.append((self._mark, version))
        self._held = False
        for group, _ in self._waiting:
            group.prefilled = False
        self._plan()
        if in_flight == "finish":
            self._updates -= 1
            if not self._updates:
                late, self._late = self._late, []
                self.submit(late)

    def usage(self) -> Usage:
        self._advance()
        return Usage(self._idle, self._stood, self._slot_seconds, self._decoded)

    def _tell_drained(self) -> None:
        if not self._running:
            for event in self._drained:
                event.succeed()
            self._drained = []

    def _read(self, answer: Answer) -> float:
        return answer.group.prompt + self._mark - answer.start

    def _step_seconds(self, row: Sequence[float], context: float) -> float:
        grid = self._contexts
        i = bisect_right(grid, context)
        if i == 0 or i == len(grid):
            return row[max(0, i - 1)]
        share = (context - grid[i - 1]) / (grid[i] - grid[i - 1])
        return row[i - 1] + share * (row[i] - row[i - 1])

    def _advance(self) -> None:
        """Brings the mark to the present."""
        n, span = len(self._running), self._env.now - self._since
        if span == 0:
            return
        if n == 0:
            self._idle += span
        elif self._held:
            self._stood += span
        else:
            decoding = max(0.0, self._env.now - max(self._since, self._stalled))
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
        self._since = self._env.now

    def _admit(self) -> None:
        """Fills free slots; the first answer of a group pays for reading its prompt."""
        while self._waiting and len(self._running) < self._slots:
            group, length = self._waiting.popleft()
            if not group.prefilled:
                group.prefilled = True
                self._stall(self._prefill * group.prompt)
            answer = Answer(self._mark + length, next(self._numbers), self._mark, group)
            heapq.heappush(self._running, answer)
            self._context += group.prompt

    def _stall(self, seconds: float) -> None:
        self._stalled = max(self._stalled, self._env.now) + seconds

    def _plan(self) -> None:
        """Sets the clock for the next answer that ends."""
        n = len(self._running)
        if n == 0 or self._held:
            self._planned = None
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
        end = self._running[0].end
        self._advance()
        self._context += len(self._running) * (end - self._mark)
        self._mark = end
        complete = []
        while self._running and self._running[0].end <= end + EPSILON:
            answer = heapq.heappop(self._running)
            self._context -= self._read(answer)
            self._note(answer)
            answer.group.left -= 1
            if answer.group.left == 0:
                complete.append(answer.group)
        self._admit()
        self._plan()
        self._tell_drained()
        for group in complete:
            self._finished(group)

    def _note(self, answer: Answer) -> None:
        """Which version sampled how many of its tokens."""
        tokens = answer.group.tokens
        first = bisect_right(self._changes, (answer.start, inf)) - 1
        for (mark, version), (next_mark, _) in pairwise([*self._changes[first:], (inf, -1)]):
            start, stop = max(mark, answer.start), min(next_mark, self._mark)
            if stop > start:
                tokens[version] = tokens.get(version, 0.0) + stop - start
