"""The decision when engines have to prove again, by a canary, that they decode with the weights
that they were sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

WOKEN_SHARE = 0.05
"""Share of a run's time that canaries may take of engines that sleep and wake at every step."""


class CanaryDue:
    """Decides whether a canary is due: engines may have captured graphs or packed copies anew since
    the last one, or it was long ago."""

    def __init__(self, *, every: int, sleeps: bool, tell: Callable[[str], None]) -> None:
        """every: `sync.canary_every`. sleeps: whether engines wake at every step. tell: is called
        about wakes without a canary."""
        self._every = every
        self._sleeps = sleeps
        self._tell = tell
        self.why: str | None = "start"
        self._started = time.monotonic()
        self._version = 0
        self._engine_restarts = 0
        self._pool_restarts = 0
        self._woken: list[int] = []  # versions for which engines woke without a canary

    def check(self, version: int, *, pool_restarts: int, spent: float) -> bool:
        """Whether a canary is due at this version. spent: seconds that canaries have taken so
        far."""
        if pool_restarts != self._pool_restarts:
            self.why = "a worker was replaced"
        if self._every and version - self._version >= self._every:
            self.why = f"{self._every} versions"
        if self.why is not None or not self._sleeps:
            return self.why is not None
        # colocated engines wake at every step: a canary each time would take too much of the run
        if spent <= WOKEN_SHARE * (time.monotonic() - self._started):
            return True
        if not self._woken:
            self._tell(
                f"version {version}: the engines woke without a canary, since canaries have taken"
                f" {spent:.3g} s, more than {WOKEN_SHARE:.0%} of the run's time; the next comes"
                " when that is less"
            )
        if version not in self._woken[-1:]:
            self._woken.append(version)
        return False

    def proved(self, version: int, *, pool_restarts: int) -> None:
        if len(self._woken) > 1:
            self._tell(f"version {version}: a canary after {len(self._woken)} wakes without one")
        self._woken = []
        self.why = None
        self._version = version
        self._pool_restarts = pool_restarts

    def note(self, reports: Sequence[Mapping[str, float]]) -> None:
        """Takes in the workers' reports of an update: a restarted engine makes a canary due."""
        restarts = sum(int(report.get("engine_restarts", 0)) for report in reports)
        if restarts != self._engine_restarts:
            self._engine_restarts = restarts
            self.why = "an engine was started anew"
