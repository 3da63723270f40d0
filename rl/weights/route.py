"""The mode and transport of versions to the engines, chosen by measurements if `sync.mode` or
`sync.transport` is auto."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from ...rollout.actors import cause
from ...rollout.pool import RolloutPool
from ...rollout.vllm_backend.compat import transfer_backend
from ...rollout.weights.engine_transfer import Broadcast, BroadcastGroup
from ..config.load import Config
from ..learner.group import LearnerGroup
from ..learner.publisher import Published
from .choice import Measured, Mode, Transport, choose, choose_transport, guessed_ratio

BROADCAST_TIMEOUT = 60.0
"""Most seconds that a worker waits for a broadcast before it fetches the version from Ray's object
store."""


class Route:
    """The current mode and transport of a run, and the measurements behind them."""

    def __init__(
        self,
        config: Config,
        learners: LearnerGroup,
        pool: RolloutPool,
        *,
        fabric: bool,
        tell: Callable[[str], None],
    ) -> None:
        """As of `WeightSync`."""
        self._settings = settings = config.sync
        # the weight-transfer engine of vLLM by which an engine's processes receive broadcasts
        self._backend = transfer_backend(config.rollout.engine_args)
        self._ranks = config.rollout.cards
        self._fabric = fabric
        self._learners = learners
        self._pool = pool
        self._tell = tell
        self.mode: Mode = settings.mode if settings.mode != "auto" else "dense"
        self.transport: Transport = (
            "object_store" if settings.transport == "auto" else settings.transport
        )
        self.measured: Measured | None = None
        self._rates: dict[Transport, float] = {}
        self._group: BroadcastGroup | None = None
        self._broadcasts = 0
        self._restarts = 0

    @property
    def into_engines(self) -> bool:
        """Whether versions are broadcast into the engines' processes: only whole ones, and only
        while every worker is there, since a broadcast waits for all members. (`WeightSync` uses it
        only if all engines change at once.)"""
        into = self.transport == "collective" and self.mode == "dense" and bool(self._backend)
        return into and not self._pool.gone

    def next_broadcast(self) -> Broadcast:
        """The next broadcast of the current group, or of a new one if a worker was replaced or the
        last broadcast failed."""
        timeout = min(self._settings.timeout / 4, BROADCAST_TIMEOUT)
        if self._group is None or self._pool.restarts != self._restarts:
            workers = len(self._pool.workers)
            self._group = self._learners.meet(workers, timeout, self._backend, self._ranks)
            self._broadcasts = 0
            self._restarts = self._pool.restarts
        self._broadcasts += 1
        return Broadcast(group=self._group, number=self._broadcasts - 1, timeout=timeout)

    async def end_broadcast(self, sending: Any) -> None:
        """Waits until the learners have sent; a failure only ends the group."""
        try:
            await asyncio.wait_for(sending, self._settings.timeout)
        # no error: the workers have fetched the version from the object store instead
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._group = None
            self._tell(
                f"weight sync: {cause(error)}; the version went through Ray's object store instead"
            )

    def learn(self, published: Published, reports: Sequence[Mapping[str, float]]) -> None:
        """Takes in the measurements of one version, and chooses mode and transport of the next."""
        now = self.measured or Measured(num_bytes=float(published.num_bytes))
        rates = [
            r["wire_bytes"] / r["transfer_s"]
            for r in reports
            if r["wire_bytes"] and r["transfer_s"]
        ]
        if rates:
            now = replace(now, bandwidth=min(rates))
            self._rates[self.transport] = min(rates)
        if published.patch is not None:
            seconds = [float(report["prepare_s"]) for report in reports if self.mode == "patch"]
            prepare_s = max(seconds, default=0.0)
            ratio = published.num_bytes / max(1, published.patch.size)
            now = replace(
                now, ratio=ratio, coding_s=published.encode_s + (prepare_s or published.encode_s)
            )
        elif published.changed is not None:
            now = replace(now, ratio=guessed_ratio(published.changed))
        self.measured = now
        self._choose(now)

    def _choose(self, now: Measured) -> None:
        if self._settings.transport == "auto":
            fabric = self._fabric and self.mode == "dense" and bool(self._backend)
            transport = choose_transport(self._rates, self.transport, fabric=fabric)
            if transport != self.transport:
                measured = ", ".join(
                    f"{name} {rate / 1e6:.3g} MB/s" for name, rate in self._rates.items()
                )
                self._tell(f"weight sync goes from {self.transport} to {transport}: {measured}")
                self.transport = transport
        if self._settings.mode != "auto":
            return
        choice = choose(now, self.mode)
        if choice.mode != self.mode:
            self._tell(f"weight sync goes from {self.mode} to {choice.mode}: {choice.why}")
            self.mode = choice.mode
