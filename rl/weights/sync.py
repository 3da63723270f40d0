"""Weight sync as the loop sees it: each version goes from the learners to every engine, proved by
digest.

    sync.begin(version)              between two steps: the learners copy their shards aside
    figures = sync.deliver()         diff, encoding, PREPARE on every worker, then COMMIT; learners
    and engines may work meanwhile

The driver handles announcements only (`transport.WeightUpdate`); the bytes go from rank 0 to the
nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray

from ...rollout.actors import cause
from ...rollout.pool import RolloutPool
from ...rollout.weights.engine_transfer import Broadcast, BroadcastGroup
from ...rollout.weights.transport import Directory, PatchRef, WeightUpdate, list_patches
from ..config.load import SyncConfig
from ..learner.group import LearnerGroup
from ..learner.publisher import Published, PublishRequest

Mode = Literal["dense", "patch"]
Transport = Literal["object_store", "collective", "directory"]

CHAIN_SHARE = 0.5
"""A new anchor is made once the patches since the last one are this much of it."""
CODING_RATE = 1e9
"""Bytes of weights a second that a patch costs on each side, until that has been measured."""
COPY_RATE = 4e9
"""The same of weights that come whole."""
BROADCAST_TIMEOUT = 60.0
"""Seconds at most, after which a worker takes the bytes from Ray's object store instead."""
ADVANTAGE = 0.8
"""The other way must take at most this share of the time for `auto` to change over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements by which `auto` decides; None until taken."""

    num_bytes: float
    """Of the whole weights."""
    bandwidth: float | None = None
    """Bytes a second from the learners to an engine."""
    ratio: float | None = None
    """The whole weights / a patch."""
    coding_s: float = 0.0
    """Seconds to make a patch and to apply it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    mode: Mode
    why: str


def choose(measured: Measured, now: Mode) -> Choice:
    """The mode that takes less time for one version, with a bias to what is in use."""
    if measured.bandwidth is None:
        return Choice(mode=now, why="the link has not been measured yet")
    dense = measured.num_bytes / measured.bandwidth + measured.num_bytes / COPY_RATE
    coding = measured.coding_s or 2 * measured.num_bytes / CODING_RATE
    ratio = measured.ratio or 50.0
    patch = measured.num_bytes / ratio / measured.bandwidth + coding
    better: Mode = "patch" if patch < dense else "dense"
    if better != now and min(patch, dense) > ADVANTAGE * max(patch, dense):
        better = now
    why = (
        f"{measured.num_bytes / 1e6:.3g} MB of weights at {measured.bandwidth / 1e6:.3g} MB/s:"
        f" dense {dense:.2g} s, patches {patch:.2g} s ({ratio:.3g}x smaller, {coding:.2g} s to"
        " code)"
    )
    return Choice(mode=better, why=why)


def choose_transport(
    rates: Mapping[Transport, float], now: Transport, *, fabric: bool
) -> Transport:
    """The faster of Ray's object store and the broadcast into vLLM's processes; rates: bytes a
    second, of those that were tried. Only where vLLM has its engine for that and devices a fabric
    of their own (`fabric`) is it tried at all."""
    if not fabric:
        return "object_store"
    if now not in rates or (other := _OTHER[now]) not in rates:
        return now if now not in rates else _OTHER[now]
    return other if rates[now] < ADVANTAGE * rates[other] else now


_OTHER: Mapping[Transport, Transport] = {"object_store": "collective", "collective": "object_store"}


def guessed_ratio(changed: float) -> float:
    """How much smaller a patch of bfloat16 weights is, to within a factor of two, where this share
    of them changed."""
    return 1.0 / max(1 / 5000, min(1.0, 0.7 * changed))


class WeightSync:
    """The newest version's announcement, and what it takes to write the next one."""

    def __init__(
        self,
        settings: SyncConfig,
        learners: LearnerGroup,
        pool: RolloutPool,
        *,
        run_id: str,
        run_dir: Path,
        history: bool,
        fabric: bool,
        tell: Callable[[str], None],
        backend: str = "",
        ranks: int = 1,
    ) -> None:
        """history: keep every version in `run_dir`. fabric: the devices have one, for
        transport=auto to try. tell: where a person reads why `auto` changed over. backend: the
        weight-transfer engine of vLLM by which the `ranks` processes of each engine take a
        broadcast of whole weights themselves."""
        self._backend = backend
        self._ranks = ranks
        self._fabric = fabric
        self._settings = settings
        self._learners = learners
        self._pool = pool
        self._tell = tell
        self._run_id = run_id
        self._attempt = time.time_ns()
        self._mode: Mode = settings.mode if settings.mode != "auto" else "dense"
        self._transport: Transport = (
            "object_store" if settings.transport == "auto" else settings.transport
        )
        self._rates: dict[Transport, float] = {}
        self._group: BroadcastGroup | None = None
        self._broadcasts = self._restarts = 0
        self._folder = Path(settings.directory) if settings.directory else run_dir / "sync"
        self._history = run_dir / "history" if history else None
        self._anchors: tuple[PatchRef, ...] = ()
        self._patches: tuple[PatchRef, ...] = ()
        self._measured: Measured | None = None
        self._begun: list[tuple[int, float]] = []
        self.notice: WeightUpdate | None = None

    def begin(self, version: int) -> None:
        """The learners copy aside what is to be version `version`."""
        start = time.perf_counter()
        self._learners.take_weights()
        self._begun.append((version, time.perf_counter() - start))

    def deliver(self, *, later: bool = False) -> dict[str, float]:
        """Every worker serves what was begun when this returns (or, `later`, once it has finished
        what it decodes, before anything else); the figures of it."""
        version, taken_s = self._begun.pop(0)
        if self._history is not None and self.notice is None:
            self._forget_from(version)
        start = time.perf_counter()
        broadcast = self._next_broadcast() if self._into_engines and not later else None
        published = self._learners.publish(self._order(version, broadcast))
        self.notice = self._announce(published)
        sending = self._learners.broadcast() if broadcast is not None else None
        reports: list[dict[str, float]] = []
        if later:
            self._pool.apply_later(self.notice)
        else:
            reports = self._pool.apply(self.notice)
            versions = {int(report["version"]) for report in reports}
            assert versions == {version}, f"workers serve versions {versions} instead of {version}"
        if sending is not None:
            self._end_broadcast(sending)
        self._learn(published, reports)
        seconds = taken_s + time.perf_counter() - start
        return {
            **_figures(published, reports),
            "sync/diff_s": taken_s,
            "timing_s/update_weights": seconds,
        }

    @property
    def _into_engines(self) -> bool:
        """Whether versions go into the engines' processes: whole ones only, and where all change at
        once (engines that are updated one after another cannot receive together)."""
        return self._transport == "collective" and self._mode == "dense" and bool(self._backend)

    def _next_broadcast(self) -> Broadcast:
        """Of the group that stands, or of a new one where a worker was replaced or the last
        broadcast failed."""
        timeout = min(self._settings.timeout / 4, BROADCAST_TIMEOUT)
        if self._group is None or self._pool.restarts != self._restarts:
            workers = len(self._pool.workers)
            self._group = self._learners.meet(workers, timeout, self._backend, self._ranks)
            self._broadcasts = 0
            self._restarts = self._pool.restarts
        self._broadcasts += 1
        return Broadcast(group=self._group, number=self._broadcasts - 1, timeout=timeout)

    def _end_broadcast(self, sending: Any) -> None:
        try:
            ray.get(sending, timeout=self._settings.timeout)
        # the workers had another place to take the bytes from
        except ray.exceptions.RayError as error:
            self._group = None
            self._tell(
                f"weight sync: {cause(error)}; the version went through Ray's object store instead"
            )

    def _order(self, version: int, broadcast: Broadcast | None) -> PublishRequest:
        patch = self.notice is not None and (self._mode == "patch" or self._history is not None)
        return PublishRequest(
            run_id=self._run_id,
            version=version,
            patch=patch,
            anchor=not patch or self._mode == "dense" or self._anchor_due(version),
            dense=self._mode == "dense",
            directory=str(self._folder) if self._transport == "directory" else None,
            broadcast=broadcast,
            history=None if self._history is None else str(self._history),
        )

    def _anchor_due(self, version: int) -> bool:
        if not self._anchors or self._measured is None:
            return True
        since = [ref.size for ref in self._patches if ref.version > self._anchors[0].version]
        old = version - self._anchors[0].version >= self._settings.anchor_every
        return old or sum(since) > CHAIN_SHARE * self._measured.num_bytes

    def _announce(self, published: Published) -> WeightUpdate:
        """Patches are kept back to the anchor before the newest, for a worker that missed a
        version."""
        if published.anchor is not None:
            oldest = self._anchors[0].version if self._anchors else published.version
            self._patches = tuple(ref for ref in self._patches if ref.version > oldest)
            self._anchors = (published.anchor,)
        if published.patch is None or self._mode == "dense":
            self._patches = ()
        else:
            self._patches = (*self._patches, published.patch)
        if self._transport == "directory":
            Directory(self._folder).keep([*self._anchors, *self._patches])
        return WeightUpdate(
            run_id=self._run_id,
            attempt=self._attempt,
            version=published.version,
            root=published.root,
            patches=self._patches,
            anchors=self._anchors,
            engines=published.engines,
        )

    def _learn(self, published: Published, reports: Sequence[Mapping[str, float]]) -> None:
        """Takes the measurements of one version and, in mode `auto`, decides about the next."""
        now = self._measured or Measured(num_bytes=float(published.num_bytes))
        rates = [
            r["wire_bytes"] / r["transfer_s"]
            for r in reports
            if r["wire_bytes"] and r["transfer_s"]
        ]
        if rates:
            now = replace(now, bandwidth=min(rates))
            self._rates[self._transport] = min(rates)
        if published.patch is not None:
            seconds = [float(report["prepare_s"]) for report in reports if self._mode == "patch"]
            prepare_s = max(seconds, default=0.0)
            ratio = published.num_bytes / max(1, published.patch.size)
            now = replace(
                now, ratio=ratio, coding_s=published.encode_s + (prepare_s or published.encode_s)
            )
        elif published.changed is not None:
            now = replace(now, ratio=guessed_ratio(published.changed))
        self._measured = now
        if self._settings.transport == "auto":
            fabric = self._fabric and self._mode == "dense" and bool(self._backend)
            transport = choose_transport(self._rates, self._transport, fabric=fabric)
            if transport != self._transport:
                measured = ", ".join(
                    f"{name} {rate / 1e6:.3g} MB/s" for name, rate in self._rates.items()
                )
                self._tell(f"weight sync goes from {self._transport} to {transport}: {measured}")
                self._transport = transport
        if self._settings.mode != "auto":
            return
        choice = choose(now, self._mode)
        if choice.mode != self._mode:
            self._tell(f"weight sync goes from {self._mode} to {choice.mode}: {choice.why}")
            self._mode = choice.mode

    def _forget_from(self, version: int) -> None:
        """A resumed run does these versions again."""
        assert self._history is not None
        for path in list_patches(self._history):
            if int(path.name[:8]) >= version:
                path.unlink()


def _figures(published: Published, reports: list[dict[str, float]]) -> dict[str, float]:
    """Bytes and seconds are those of the worker that had or took most."""
    figures = {
        "sync/version": float(published.version),
        "sync/encode_s": published.encode_s,
        "sync/anchors": float(published.anchor is not None),
    }
    if published.changed is not None:
        figures["sync/changed_fraction"] = published.changed
    if reports:
        worst = {name: max(float(report[name]) for report in reports) for name in reports[0]}
        figures |= {
            f"sync/{name}": worst[name]
            for name in ("wire_bytes", "transfer_s", "prepare_s", "apply_s")
        }
        figures["sync/ratio"] = published.num_bytes / max(1.0, worst["wire_bytes"])
        figures |= {
            f"sync/{name}": sum(float(report[name]) for report in reports)
            for name in ("digest_failures", "replays")
        }
    return figures


__all__ = ["Choice", "Measured", "WeightSync", "choose"]
