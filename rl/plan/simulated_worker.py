"""A rollout worker of the simulator: an engine with slots, without an event per token.

All running answers advance together, so the worker keeps one number, its *mark*: tokens that every
running answer has decoded since the simulation began. An answer that starts at mark m and has n
tokens ends at mark m + n, and between two changes of the running set time follows from the decode
table. One event per finished answer is all it takes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import sqrt
from typing import cast

import simpy

from .scenario import DecodeTable, Floats, InFlight, Problem, Usage

EPSILON = 1e-6
"""Tokens: what rounding may do to a mark."""


@dataclass(slots=True, eq=False)
class SimGroup:
    """A prompt and its answers on their way."""

    number: int
    problem: Problem
    lengths: Floats
    """[G] tokens of the answers."""
    cost: float
    """Tokens that the pool expects."""
    left: int = 0
    """Answers that are not finished."""
    worker: int = -1
    tokens: dict[int, float] = field(default_factory=dict)
    """Version -> tokens that it sampled."""
    prefilled: bool = False

    @property
    def samples(self) -> int:
        return len(self.lengths)

    def anew(self) -> SimGroup:
        """The same group before it was sampled."""
        return SimGroup(
            number=self.number, problem=self.problem, lengths=self.lengths, cost=self.cost
        )

    @property
    def answer_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def all_tokens(self) -> int:
        return self.answer_tokens + self.problem.prompt * len(self.lengths)


@dataclass(slots=True, eq=False)
class _Answer:
    group: SimGroup
    length: float
    start: float = 0.0
    """The worker's mark at which it began."""


class SimWorker:
    """Decodes answers; `finished` is called with each group whose last answer is there."""

    def __init__(
        self,
        env: simpy.Environment,
        table: DecodeTable,
        slots: int,
        finished: Callable[[SimGroup], None],
    ) -> None:
        self._env = env
        self._slots = slots
        self._finished = finished
        self._rows = table.rows(slots)
        self._contexts = [float(c) for c in table.context]
        self._prefill = table.prefill
        # a heap by the mark at which an answer ends
        self._running: list[tuple[float, int, _Answer]] = []
        self._waiting: deque[_Answer] = deque()
        self._numbers = count()
        self._mark = 0.0
        self._context = 0.0  # tokens that all running answers read
        self._since = 0.0  # the time of these two
        self._stalled = 0.0  # until then nothing is decoded (prefill, commit)
        self._held = False
        self._late: list[SimGroup] = []  # submitted while an update waits for what is running
        self._drained: list[simpy.Event] = []
        self._updates = 0  # that wait for this
        self._turn = 0  # wake-ups of earlier turns are void
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
            group.left = len(group.lengths)
            self._waiting.extend(_Answer(group, float(length)) for length in group.lengths)
        self._admit()
        self._plan()

    def remove(self, groups: set[int]) -> None:
        """Stops all answers of these groups."""
        self._advance()
        kept = [item for item in self._running if item[2].group.number not in groups]
        if len(kept) < len(self._running):
            self._running = kept
            heapq.heapify(self._running)
            self._context = sum(self._read(item[2]) for item in kept)
        self._waiting = deque(
            answer for answer in self._waiting if answer.group.number not in groups
        )
        self._late = [group for group in self._late if group.number not in groups]
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
        self._drained.append(self._env.event())
        drained = self._drained[-1]
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
        for answer in self._waiting:
            answer.group.prefilled = False
        self._plan()
        if in_flight == "finish":
            self._updates -= 1
            if not self._updates:
                late, self._late = self._late, []
                self.submit(late)

    def lose(self) -> None:
        """The process is gone, with all that it was decoding."""
        self._advance()
        self._running = []
        self._context = 0.0
        self._held = True
        self._waiting.clear()
        self._late.clear()
        self._plan()
        self._tell_drained()

    def restore(self, version: int) -> None:
        """Its replacement, with these weights."""
        self._advance()
        self._held = False
        self._changes.append((self._mark, version))
        self._plan()

    def usage(self) -> Usage:
        self._advance()
        return Usage(
            time=self._env.now,
            idle=self._idle,
            held=self._stood,
            slot_seconds=self._slot_seconds,
            decoded=self._decoded,
        )

    def _tell_drained(self) -> None:
        if not self._running and not self._waiting:
            for event in self._drained:
                event.succeed()
            self._drained = []

    def _read(self, answer: _Answer) -> float:
        return answer.group.problem.prompt + self._mark - answer.start

    def _step_seconds(self, row: Sequence[float], context: float) -> float:
        grid = self._contexts
        i = bisect_right(grid, context)
        if i == 0 or i == len(grid):
            return row[max(0, i - 1)]
        share = (context - grid[i - 1]) / (grid[i] - grid[i - 1])
        return row[i - 1] + share * (row[i] - row[i - 1])

    def _advance(self) -> None:
        """Brings the mark to the present."""
        now, n = self._env.now, len(self._running)
        if now == self._since:
            return
        span = now - self._since
        if n == 0:
            self._idle += 0.0 if self._waiting else span
        elif self._held:
            self._stood += span
        else:
            decoding = max(0.0, now - max(self._since, self._stalled))
            a, b = self._first, self._slope
            tokens = (
                decoding / a
                if abs(b) < 1e-15
                else (sqrt(max(0.0, a * a + 2 * b * decoding)) - a) / b
            )
            self._mark += tokens
            self._first += b * tokens
            self._context += n * tokens
            self._decoded += n * tokens
        self._slot_seconds += n * span
        self._since = now

    def _admit(self) -> None:
        """Fills free slots; the first answer of a group pays for reading its prompt."""
        while self._waiting and len(self._running) < self._slots:
            answer = self._waiting.popleft()
            if not answer.group.prefilled:
                answer.group.prefilled = True
                if self._prefill:
                    self._stall(self._prefill * answer.group.problem.prompt)
            answer.start = self._mark
            heapq.heappush(self._running, (self._mark + answer.length, next(self._numbers), answer))
            self._context += answer.group.problem.prompt

    def _stall(self, seconds: float) -> None:
        self._stalled = max(self._stalled, self._env.now) + seconds

    def _plan(self) -> None:
        """Sets the clock for the next answer that ends."""
        self._turn += 1
        n = len(self._running)
        if n == 0 or self._held:
            return
        end = self._running[0][0]
        tokens = max(0.0, end - self._mark)
        row, context = self._rows[n], self._context / n
        self._first = self._step_seconds(row, context)
        last = self._step_seconds(row, context + tokens)
        self._slope = (last - self._first) / tokens if tokens > EPSILON else 0.0
        wait = max(0.0, self._stalled - self._env.now) + tokens * (self._first + last) / 2
        wake = self._env.timeout(wait, (self._turn, end))
        assert wake.callbacks is not None
        wake.callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        turn, end = cast("tuple[int, float]", event.value)
        if turn != self._turn:
            return
        self._advance()
        self._context += len(self._running) * (end - self._mark)
        self._mark = end
        complete = []
        while self._running and self._running[0][0] <= end + EPSILON:
            answer = heapq.heappop(self._running)[2]
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

    def _note(self, answer: _Answer) -> None:
        """Which version sampled how many of its tokens."""
        changes, tokens = self._changes, answer.group.tokens
        i = bisect_right(changes, (answer.start, 1 << 60)) - 1
        start = answer.start
        for j in range(i, bisect_left(changes, (self._mark, -1))):
            stop = changes[j + 1][0] if j + 1 < len(changes) else self._mark
            stop = min(stop, self._mark)
            if stop > start:
                tokens[changes[j][1]] = tokens.get(changes[j][1], 0.0) + stop - start
            start = stop
