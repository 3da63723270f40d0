"""What `emberl plan` says on stderr while it simulates: a bar on a terminal, elsewhere lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..watch.console import duration, say

FIRST, EVERY = 3.0, 15.0
"""Seconds until the first line that has an estimate, and between two more, off a terminal."""


class PlanProgress:
    """`watch` follows one simulation after another, in the context of `bar`."""

    def __init__(self, console: Console | None) -> None:
        """console: None says nothing."""
        self._console = console
        self._begun = time.monotonic()
        self._next = self._begun + FIRST
        self._at, self._total = -1, 1
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self.bar.add_task("preparing", total=None, left="")

    def expect(self, simulations: int) -> None:
        """So many at the least, with those that are done."""
        self._total = max(simulations, self._at + 1)

    def watch(self, what: str, steps: int) -> Callable[[int], None]:
        """Another simulation begins; what is returned is told how many of its steps are done."""
        self._at += 1
        self.expect(self._total)
        self._show(what, 0.0)
        return lambda done: self._show(what, done / steps)

    def _show(self, what: str, part: float) -> None:
        done, now = self._at + part, time.monotonic()
        text, left = f"simulating {what}", ""
        if self._total > 1:
            text += f" ({self._at + 1} of about {self._total})"
        if done:
            seconds = (now - self._begun) * (self._total - done) / done
            left = f"{duration(seconds)} left"
        self.bar.update(self._task, description=text, left=left, completed=done, total=self._total)
        if self.bar.disable and self._console is not None and (not done or now >= self._next):
            self._next = now + (EVERY if done else FIRST)
            line = "  ".join(filter(None, [time.strftime("%H:%M:%S"), text, left]))
            say(self._console, line)
