"""The driver's side of the weights: delivers each version from the learners to every engine, and
verifies it by digests and by a comparison of log-probs.

    figures = await weights.publish(version, wait=False)
    await weights.delivered()              # until every engine serves it

Between two steps the learners copy their shards aside; diff, encoding, PREPARE on every worker,
then COMMIT run while they train. The driver handles announcements only
(`transport.WeightUpdate`); the bytes go from rank 0 to the nodes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...rollout.engine import Request
from ...rollout.pool import RolloutPool
from ...rollout.weights.engine_transfer import Broadcast
from ...rollout.weights.transport import Directory, PatchRef, WeightUpdate, list_patches
from ..config.load import Config
from ..learner.group import LearnerGroup
from ..learner.publisher import Published, PublishRequest
from .decoding import DecodeCheck
from .due import CanaryDue
from .gate import Gate
from .probe import Level, Probe, as_batch, tolerance_of
from .route import Route

CHAIN_SHARE = 0.5
"""A new anchor is made once the patches since the last one have this share of its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A version that the learners have copied aside."""

    version: int
    seconds: float
    """Seconds for which the learners were blocked."""
    later: bool
    """Whether workers change to it one after another, each when its running samples are done."""
    expected: NDArray[np.float32] | None
    """[N] the learners' log-probs of the probe's tokens; None: nothing is compared."""


class WeightSync:
    """Publishes versions: holds the newest version's announcement, the delivery that is under way,
    and the state for the next one."""

    def __init__(
        self,
        config: Config,
        learners: LearnerGroup,
        pool: RolloutPool,
        *,
        run_id: str,
        run_dir: Path,
        fabric: bool,
        tell: Callable[[str], None],
        probe: Probe,
        probe_ids: Sequence[int] = (),
        proof_requests: Sequence[Request] = (),
    ) -> None:
        """fabric: whether the devices have one, which transport=auto may try. tell: prints the
        reasons of `auto`, and the limits of what can be proved. probe_ids: tokens whose log-probs
        are compared; none: no comparison. proof_requests: requests that are decoded with a canary;
        none: no canary."""
        settings = config.sync
        self._route = Route(config, learners, pool, fabric=fabric, tell=tell)
        self._settings = settings
        self._schedule = config.schedule
        self._recomputed = config.offpolicy.old_logp == "recompute"
        self._patience = config.rollout.timeout
        self._learners = learners
        self._pool = pool
        self._tell = tell
        self._run_id = run_id
        self._attempt = time.time_ns()  # must grow from each start to the next (`WeightUpdate`)
        self._folder = Path(settings.directory) if settings.directory else run_dir / "sync"
        self._history = run_dir / "history" if config.checkpoint.history else None
        self._anchors: tuple[PatchRef, ...] = ()
        self._patches: tuple[PatchRef, ...] = ()
        self.notice: WeightUpdate | None = None
        self.probe = probe
        self._probe_ids = tuple(probe_ids)
        self.decoding = self._decode_check(proof_requests, config.model.dtype)
        self._follows = self.decoding is not None and bool(probe_ids)
        self._due = CanaryDue(
            every=settings.canary_every, sleeps=config.cluster.colocated, tell=tell
        )
        self._expected: NDArray[np.float32] | None = None  # `Taken.expected` of the version before
        self.gate = Gate(tolerance_of(config.model.dtype))
        self.moved: Level | None = None
        """The change of the probe's log-probs by the last update."""
        self._told_apart: bool | None = None
        self.under_way: asyncio.Task[dict[str, float]] | None = None
        """The delivery of the newest version, until somebody has waited for it."""
        self._held_at: int | None = None
        self._newest = -1  # the version whose delivery is or was under way last
        self._released = asyncio.Event()

    def _decode_check(self, requests: Sequence[Request], dtype: str) -> DecodeCheck | None:
        if not requests:
            return None
        made = DecodeCheck(
            requests,
            self._learners,
            self._pool,
            self._tell,
            dtype=dtype,
            tolerance=tolerance_of(dtype),
            timeout=self._settings.timeout,
        )
        self._pool.prove_fresh = made.prove_fresh
        return made

    def begin_stage(self) -> None:
        """Forgets measurements of the noise, since the next version is a whole stage later."""
        self.probe.begin_stage()
        self.gate.begin_stage()
        if self.decoding is not None:
            self.decoding.probe.begin_stage()
        self._expected = self.moved = None

    async def publish(self, version: int, *, wait: bool = True) -> dict[str, float]:
        """Makes every worker serve the learners' weights as this version; returns the metrics of
        the transfer. Without `wait`, if rollouts run ahead, it goes on while the learners make
        their next step, and the metrics are those of the version before."""
        start = time.perf_counter()  # the learners also lose the wait for the version before
        if self.under_way is not None and self._is_held(self._newest):
            self.under_way.cancel()  # held, so it has not begun: this version takes its place
            self.under_way = None
        figures = await self.delivered()
        ahead = not wait and self._schedule.max_staleness > 0
        taken = await self._take(version, ahead and self._schedule.in_flight == "finish")
        due = self._held_at is None and self._canary_due(version)
        if not ahead:
            figures = await self._deliver(taken)
            if self._follows and self.decoding is not None:
                figures |= await self.decoding.follow(version, figures.get("sync/changed_fraction"))
            due = due or self._canary_due(version)  # once more: an engine may have restarted
            return figures | (await self._prove(version) if due else {})
        if due:
            self._newest = version
            figures |= await self._deliver(taken)
            if taken.later:  # workers finish their running samples with the old version first
                await asyncio.wait_for(
                    self._pool.served_after(version - 1), self._settings.timeout + self._patience
                )
            figures |= await self._prove(version)
            return figures | {"sync/exposed_s": time.perf_counter() - start}
        self._newest = version
        self.under_way = asyncio.create_task(self._deliver(taken))
        # if the run fails first nobody awaits the task, and asyncio would log its exception
        self.under_way.add_done_callback(lambda task: task.cancelled() or task.exception())
        return figures | {"sync/exposed_s": time.perf_counter() - start}

    def _canary_due(self, version: int) -> bool:
        if self.decoding is None:
            return False
        spent, restarts = self.decoding.seconds, self._pool.restarts
        return self._due.check(version, pool_restarts=restarts, spent=spent)

    async def _prove(self, version: int) -> dict[str, float]:
        assert self.decoding is not None
        self._due.proved(version, pool_restarts=self._pool.restarts)
        return await self.decoding.prove(version)

    async def delivered(self) -> dict[str, float]:
        """Waits for the delivery that is under way, if any; returns its metrics and raises its
        errors."""
        delivery = self.under_way
        self.under_way = None
        # without a deadline here: every wait inside has its own
        return {} if delivery is None else await delivery

    def check_step(self, metrics: Mapping[str, float], version: int) -> dict[str, float]:
        """`Gate.check` of a step that began with this version."""
        moved = None if self.moved is None else self.moved.p
        within = max(0.0, metrics.get("training/updates", 1.0) - 1)
        if self._recomputed:
            within = 0.0  # all log-probs were computed before the step's first update
        return self.gate.check(metrics, version=version, moved=moved, within=within)

    def check(self) -> None:
        """Raises the error of the delivery under way, if it has failed."""
        if self.under_way is not None and self.under_way.done():
            self.under_way.result()

    def hold(self, version: int) -> None:
        """Keeps the workers at this version, once they have it, until `release`. The learners go on
        publishing meanwhile; only their newest version is delivered then."""
        self._held_at = version
        self._released.clear()

    def release(self) -> None:
        self._held_at = None
        self._released.set()

    async def serving(self, version: int) -> None:
        """Waits until every worker serves this version or a newer one; raises the error of its
        delivery."""
        if self.under_way is not None and self._newest <= version:
            await asyncio.shield(self.under_way)
        patience = self._settings.timeout + self._patience  # as in `RolloutPool.serve_later`
        await asyncio.wait_for(self._pool.served_after(version - 1), patience)

    def _is_held(self, version: int) -> bool:
        return self._held_at is not None and version > self._held_at

    async def _take(self, version: int, later: bool) -> Taken:
        """Has the learners copy a version aside, before they make their next step."""
        start = time.perf_counter()
        await asyncio.to_thread(self._learners.take_weights)
        seconds = time.perf_counter() - start
        expected = None
        if self._probe_ids and not later:
            batch = as_batch(self._probe_ids)
            expected = (await asyncio.to_thread(self._learners.logprobs, batch, 1.0))[1:]
        return Taken(version=version, seconds=seconds, later=later, expected=expected)

    async def _deliver(self, taken: Taken) -> dict[str, float]:
        """Delivers a version; returns its metrics. Every worker serves it then or, with `later`,
        once its running samples are done."""
        version = taken.version
        while self._is_held(version):
            await self._released.wait()
        start = time.perf_counter()
        if self._history is not None and self.notice is None:
            self._forget_from(version)
        broadcast = None
        if self._route.into_engines and not taken.later:
            broadcast = await asyncio.to_thread(self._route.next_broadcast)
        published = await asyncio.to_thread(self._learners.publish, self._order(version, broadcast))
        self.notice = self._announce(published)
        sending = self._learners.broadcast() if broadcast is not None else None
        reports: list[dict[str, float]] = []
        if taken.later:
            self._pool.serve_later(self.notice)
        else:
            reports = await self._pool.serve(self.notice)
            versions = {int(report["version"]) for report in reports}
            assert versions == {version}, f"workers serve versions {versions} instead of {version}"
        if sending is not None:
            await self._route.end_broadcast(sending)
        self._route.learn(published, reports)
        figures = _figures(published, reports) | {
            "sync/diff_s": taken.seconds,
            "timing_s/update_weights": taken.seconds + time.perf_counter() - start,
        }
        self._due.note(reports)
        if taken.expected is not None:
            self._note_move(taken)
            figures |= await self.probe.check(
                taken.expected,
                await self._pool.probe(self._probe_ids),
                partial(self._pool.reload, token_ids=self._probe_ids),
                version=version,
                changed=figures.get("sync/changed_fraction"),
            )
            figures |= self._say_apart(version, figures)
            if figures["sync/reloads"]:
                self._due.why = "an engine was loaded anew"
        return figures | {"sync/exposed_s": time.perf_counter() - start}

    def _note_move(self, taken: Taken) -> None:
        before = self._expected
        self._expected = taken.expected
        assert taken.expected is not None
        if before is not None:
            self.moved = Level.between(taken.expected, before)

    def _say_apart(self, version: int, figures: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the change by one update. Prints whether it is larger than rounding, at first
        and whenever that turns."""
        if self.moved is None or not self.moved.p:
            return {}
        noise, moved = figures["sync/probe_noise_p"], self.moved.p
        apart = moved > noise
        if apart != self._told_apart:
            self._told_apart = apart
            text = (
                f"version {version}: the update moves the probabilities of {len(self._probe_ids)}"
                f" tokens by {moved:.2g} on average, engines and learners differ by {noise:.2g}"
            )
            if apart:
                self._tell(f"{text}: a version behind is {moved / max(noise, 1e-12):.3g} times it")
            else:
                self._tell(
                    f"{text}: these cannot tell whether an engine is a version behind, only whether"
                    f" it is {math.ceil(2 * noise / moved)} or more behind, or repeats an older"
                    " one's results bit for bit"
                )
        return {"sync/probe_moved": self.moved.logp, "sync/probe_moved_p": moved}

    def _order(self, version: int, broadcast: Broadcast | None) -> PublishRequest:
        patch = self.notice is not None and (
            self._route.mode == "patch" or self._history is not None
        )
        return PublishRequest(
            run_id=self._run_id,
            version=version,
            patch=patch,
            anchor=not patch or self._route.mode == "dense" or self._anchor_due(version),
            dense=self._route.mode == "dense",
            directory=str(self._folder) if self._route.transport == "directory" else None,
            broadcast=broadcast,
            history=None if self._history is None else str(self._history),
        )

    def _anchor_due(self, version: int) -> bool:
        if not self._anchors or self._route.measured is None:
            return True
        since = [ref.size for ref in self._patches if ref.version > self._anchors[0].version]
        old = version - self._anchors[0].version >= self._settings.anchor_every
        return old or sum(since) > CHAIN_SHARE * self._route.measured.num_bytes

    def _announce(self, published: Published) -> WeightUpdate:
        """The announcement of a version. Patches are kept back to the anchor before the newest one,
        for a worker that missed a version."""
        if published.anchor is not None:
            oldest = self._anchors[0].version if self._anchors else published.version
            self._patches = tuple(ref for ref in self._patches if ref.version > oldest)
            self._anchors = (published.anchor,)
        if published.patch is None or self._route.mode == "dense":
            self._patches = ()
        else:
            self._patches = (*self._patches, published.patch)
        if self._route.transport == "directory":
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

    def _forget_from(self, version: int) -> None:
        """Deletes the history from this version on, which a resumed run makes again."""
        assert self._history is not None
        for path in list_patches(self._history):
            if int(path.name[:8]) >= version:
                path.unlink()


def _figures(published: Published, reports: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a delivery; bytes and seconds are the largest of any worker."""
    figures = {
        "sync/version": float(published.version),
        "sync/encode_s": published.encode_s,
        "sync/anchors": float(published.anchor is not None),
    }
    if published.changed is not None:
        figures["sync/changed_fraction"] = published.changed
    if reports:
        figures |= {
            f"sync/{name}": max(float(report[name]) for report in reports)
            for name in ("wire_bytes", "transfer_s", "prepare_s", "apply_s")
        }
        figures["sync/ratio"] = published.num_bytes / max(1.0, figures["sync/wire_bytes"])
        figures |= {
            f"sync/{name}": sum(float(report[name]) for report in reports)
            for name in ("digest_failures", "replays")
        }
    return figures
