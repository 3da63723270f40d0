"""The learner ranks as one object: every call goes to all of them, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from ...rollout.actors import ActorLostError, CallFailedError, check_reachable, gather
from ...rollout.weights.canary import Canary
from ...rollout.weights.engine_transfer import BroadcastGroup
from ..algorithm.losses import Objective
from ..config.distill import DistillConfig
from ..config.load import CriticConfig, OptimConfig
from ..disks import Disks
from ..groups import Batch
from .publisher import Published, PublishRequest

PUBLISHING = "publishing"
"""Concurrency group of a rank's actor whose thread publishes weights while another trains."""
WRITING = "writing"
"""Concurrency group whose thread writes checkpoints."""


class LearnersLostError(ActorLostError):
    """A rank is gone or stuck; the group has to be restarted from a checkpoint."""


class LearnerGroup:
    """Every call goes to all ranks and returns when all are done."""

    def __init__(self, ranks: Sequence[Any], *, timeout: float, disks: Disks | None = None) -> None:
        """timeout: seconds for one call. disks: those of the ranks' nodes; None if the ranks share
        the caller's disk."""
        self.ranks = tuple(ranks)
        self._timeout = timeout
        self._disks = disks
        self.record: Callable[[str, float, float], None] = lambda what, start, end: None
        """Called with (name, start, end) of every call, as `time.time()`."""

    def connect(self, model_path: str, timeout: float) -> None:
        """Forms the process group of the ranks and loads the policy, each within `timeout` seconds
        (`cluster.start_timeout`). Raises ValueError if other nodes cannot reach rank 0's
        address."""
        wait = partial(_gather, timeout=timeout, key="cluster.start_timeout")
        address = wait([self.ranks[0].address.remote()], what="address")[0]
        if len(self.ranks) > 1:
            check_reachable(address, {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]})
        wait([rank.connect.remote(address) for rank in self.ranks], what="connect")
        wait([rank.load.remote(model_path) for rank in self.ranks], what="load")

    def begin_stage(
        self,
        optim: OptimConfig,
        total_steps: int,
        critic: CriticConfig | None = None,
        reference: bool = False,
    ) -> None:
        self._call("begin_stage", optim, total_steps, critic, reference)

    def load_teachers(self, distill: DistillConfig) -> None:
        self._call("load_teachers", distill)

    def step(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """One optimizer step on the whole batch; metrics over all ranks."""
        metrics: dict[str, float] = self._call("step", ray.put(batch), objective)[0]
        return metrics

    def skip(self, updates: int) -> None:
        """Advances the learning-rate schedules by updates without a batch to train on."""
        self._call("skip", updates)

    def logprobs(self, batch: Batch, temperature: float) -> Any:
        """The policy's log-prob [T] of every loss token."""
        return self._call("logprobs", ray.put(batch), temperature)[0]

    def canary(self, seed: int) -> Canary:
        """A canary of the current weights."""
        canary: Canary = self._call("canary", seed)[0]
        return canary

    def canary_logprobs(
        self, batch: Batch, canary: Canary, left_out: Sequence[str] = ()
    ) -> list[Any]:
        """Log-probs [T] as of `logprobs` under the canary's weights, then for each name in
        `left_out` under those with that tensor unchanged."""
        logps: list[Any] = self._call("canary_logprobs", ray.put(batch), canary, tuple(left_out))[0]
        return logps

    def reference_logprobs(self, batch: Batch, temperature: float) -> Any:
        """The reference's log-prob [T] of every loss token."""
        return self._call("reference_logprobs", ray.put(batch), temperature)[0]

    def teacher_logprobs(self, batch: Batch, temperature: float) -> Any:
        """The log-prob [T] of every loss token by its sequence's teacher."""
        return self._call("teacher_logprobs", ray.put(batch), temperature)[0]

    def refresh_reference(self) -> None:
        self._call("refresh_reference")

    def values(self, batch: Batch) -> Any:
        """The critic's value [T] before every loss token."""
        return self._call("values", ray.put(batch))[0]

    def critic_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step of the critic; metrics over all ranks."""
        metrics: dict[str, float] = self._call("critic_step", ray.put(batch))[0]
        return metrics

    def trace(self, begin: bool) -> list[bytes]:
        """Begins a trace of every rank's process, or ends it and returns each recording."""
        return self._call("trace", begin)

    def take_weights(self) -> None:
        """Copies the weights, as the next version to publish."""
        self._call("take_weights")

    def publish(self, order: PublishRequest) -> Published:
        """Publishes the copied weights; the ranks may make their next step meanwhile."""
        beside = {"concurrency_group": PUBLISHING}
        whole = not order.patch
        parts = [rank.publish_part.options(**beside).remote(whole) for rank in self.ranks[1:]]
        published: Published = self._wait(
            [self.ranks[0].publish.options(**beside).remote(order, *parts), *parts], "publish"
        )[0]
        return published

    def meet(self, workers: int, timeout: float, backend: str, ranks: int) -> BroadcastGroup:
        """A new process group of rank 0 and the engines of `workers` workers (`Publisher.meet`)."""
        meet = self.ranks[0].meet.options(concurrency_group=PUBLISHING)
        group: BroadcastGroup = self._wait([meet.remote(workers, timeout, backend, ranks)], "meet")[
            0
        ]
        return group

    def broadcast(self) -> Any:
        """Begins to send the version last published to the workers that wait for it; returns the
        Ray reference of the call."""
        return self.ranks[0].broadcast.options(concurrency_group=PUBLISHING).remote()

    def snapshot(self) -> None:
        """Every rank copies its part of a checkpoint; training may then go on."""
        self._call("snapshot")

    def write(self, folder: str) -> None:
        """Every rank writes what `snapshot` copied, while it trains; all of it is on the caller's
        disk when this returns."""
        beside = {"concurrency_group": WRITING}
        self._wait([rank.write.options(**beside).remote(folder) for rank in self.ranks], "write")
        if self._disks is not None:
            self._disks.pull(Path(folder))

    def restore(self, folder: str) -> None:
        if self._disks is not None:
            self._disks.push(Path(folder))
        self._call("restore", folder)
        if self._disks is not None:
            self._disks.drop(Path(folder))

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait([getattr(rank, method).remote(*arguments) for rank in self.ranks], method)

    def _wait(self, refs: Sequence[Any], what: str) -> list[Any]:
        start = time.time()
        try:
            return _gather(refs, what, self._timeout, "cluster.step_timeout")
        finally:
            self.record(what, start, time.time())


def _gather(refs: Sequence[Any], what: str, timeout: float, key: str) -> list[Any]:
    try:
        return gather(refs, who="learner rank", what=what, timeout=timeout, key=key)
    except CallFailedError:
        raise
    except ActorLostError as error:
        raise LearnersLostError(str(error)) from error
