"""The assignment of actors to bundles of a placement group, computed without Ray and torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..kernels import platform
from .config.load import Config, ConfigError

Role = Literal["learner", "rollout"]
SHARE = 0.5
"""Share of a device, in Ray's accounting, of a colocated learner or rollout worker."""
PATIENCE = 10.0
"""Seconds without a cluster's answer after which the user is told."""
POLL_S = 0.5
"""Seconds between two queries of a cluster's resources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorSlot:
    """The placement of one actor: its bundle of the placement group and its process's threads."""

    role: Role
    index: int
    """Rank of the learner, or number of the worker."""
    bundle: dict[str, float]
    """Ray resources, e.g. `{"NPU": 1, "CPU": 4}`."""
    threads: int
    place: int
    """Index of the bundle in the placement group; a colocated learner and worker share one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The slots of all actors."""

    device: str
    slots: tuple[ActorSlot, ...]

    def bundles(self) -> list[dict[str, float]]:
        """The placement group's bundles: the sum of the resources of each one's slots."""
        places = sorted({slot.place for slot in self.slots})
        return [_sum(slot.bundle for slot in self.slots if slot.place == place) for place in places]

    def total(self) -> dict[str, float]:
        """The sum of the Ray resources of all slots."""
        return _sum(slot.bundle for slot in self.slots)

    def describe(self) -> str:
        """A table for a person, one line per actor."""
        lines = [f"placement on {self.device}: {resources_text(self.total())}"]
        lines += [
            f"  bundle {slot.place:2}  {slot.role} {slot.index}  {resources_text(slot.bundle)},"
            f" {slot.threads} threads"
            for slot in self.slots
        ]
        said = platform.describe_environment(self.device, os.environ)
        return "\n".join([*lines, *(f"  {line}" for line in said)])


ROLES: tuple[Role, ...] = ("learner", "rollout")


def plan_placement(config: Config, roles: tuple[Role, ...] = ROLES) -> Placement:
    """The placement of a configuration's actors. roles: only these, e.g. without learners.

    An actor's threads are its bundle's CPUs. On a CPU-only cluster that trains on-policy, learners
    and rollouts take turns, so each side may use the CPUs of both.
    """
    cluster = config.cluster
    target = platform.named(cluster.device)
    counts = {
        "learner": cluster.learners,
        "rollout": len(config.rollout.servers) or cluster.rollouts,
    }
    cpus = {"learner": cluster.cpus_per_learner, "rollout": cluster.cpus_per_rollout}
    everything = sum(counts[role] * cpus[role] for role in roles)
    slots = []
    for role in roles:
        alone = target.is_cpu and config.schedule.max_staleness == 0
        threads = int(everything / counts[role] if alone else cpus[role])
        cardless = target.is_cpu or (role == "rollout" and bool(config.rollout.servers))
        cards = (
            SHARE
            if cluster.colocated
            else 1.0
            if role == "learner"
            else float(config.rollout.cards)
        )
        bundle = {"CPU": cpus[role]} if cardless else {target.resource: cards, "CPU": cpus[role]}
        first = 0 if cluster.colocated or role == roles[0] else cluster.learners
        slots += [
            ActorSlot(role=role, index=i, bundle=bundle, threads=max(1, threads), place=first + i)
            for i in range(counts[role])
        ]
    return Placement(device=target.device, slots=tuple(slots))


def check_capacity(placement: Placement, available: dict[str, float], where: str) -> None:
    """Raises `ConfigError` if the placement needs more than `available`."""
    for name, wanted in placement.total().items():
        have = available.get(name, 0.0)
        if wanted > have + 1e-9:  # fractions of CPUs and devices add up with rounding
            other = (
                "cluster.cpus_per_learner and cluster.cpus_per_rollout"
                if name == "CPU"
                else "cluster.device"
            )
            learners, rollouts = (
                sum(slot.role == role for slot in placement.slots)
                for role in ("learner", "rollout")
            )
            raise ConfigError(
                f"the placement needs {wanted:g} {name} but {where} has {have:g}: lower"
                f" cluster.learners={learners} or cluster.rollouts={rollouts}, or change {other}"
            )


def wait_for_nodes(
    placement: Placement,
    seconds: float,
    have: Callable[[], dict[str, float]],
    where: str,
    tell: Callable[[str], None],
) -> None:
    """Waits until a cluster has (`have`) the resources of the placement: nodes may still register,
    or an autoscaler start them for the placement group. Raises `ConfigError` after `seconds`
    (`cluster.join_timeout`)."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            check_capacity(placement, have(), where)
        except ConfigError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                tell(f"waiting for nodes, up to cluster.join_timeout={seconds:g} s: {error}")
                told = True
            time.sleep(POLL_S)
        else:
            return


def wait_for_grant(
    group: Any,
    placement: Placement,
    timeout: float,
    free: Callable[[], dict[str, float]],
    tell: Callable[[str], None],
) -> None:
    """Waits until Ray's placement group has its resources, which others may hold. Raises
    `ConfigError` after `timeout` seconds (`cluster.start_timeout`)."""
    wanted = resources_text(placement.total())
    granted = group.wait(timeout_seconds=min(PATIENCE, timeout))
    if not granted:
        tell(f"waiting for {wanted}, up to cluster.start_timeout={timeout:g} s; free now: {free()}")
        granted = group.wait(timeout_seconds=max(1, timeout - PATIENCE))
    if not granted:
        raise ConfigError(
            f"the cluster did not grant {wanted} within cluster.start_timeout={timeout:g} s;"
            f" something else holds them: {free()}"
        )


def resources_text(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _sum(bundles: Iterable[dict[str, float]]) -> dict[str, float]:
    counted: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            counted[name] = counted.get(name, 0.0) + amount
    return dict(sorted(counted.items()))
