"""The run's part of a Ray cluster: starts or joins it, creates one placement group, and starts the
actors.

Each actor has a bundle of the placement group: first the learner ranks, then the rollout workers;
colocated, worker i is in the bundle of rank i.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..kernels import platform
from ..rollout.actors import LOST, ActorLostError, PlaceLostError, cause
from ..rollout.engine import WorkerSpec
from ..rollout.pool import RolloutPool
from ..rollout.schedule import QUEUE_DEPTH
from ..rollout.worker import RolloutWorker
from . import local_ray
from .config.load import Config, ConfigError, user_errors
from .disks import Disks
from .joining import check_answers, no_cluster
from .learner.group import PUBLISHING, WRITING, LearnerGroup
from .learner.model_loader import RankSpec
from .learner.rank import LearnerRank
from .placement import (
    PATIENCE,
    ROLES,
    ActorSlot,
    Role,
    check_capacity,
    plan_placement,
    resources_text,
    wait_for_grant,
    wait_for_nodes,
)


class Cluster:
    """A context manager: joins or starts Ray on entry; on exit ends the actors, the placement group
    and, if it was started here, Ray."""

    def __init__(
        self,
        config: Config,
        tell: Callable[[str], None] = print,
        roles: tuple[Role, ...] = ROLES,
    ) -> None:
        """tell: called with lines for a person, e.g. what the start waits for. roles: the kinds of
        actors to start; without learners `spawn` returns an empty group."""
        self.config = config
        self.tell = tell
        self.placement = plan_placement(config, roles)
        self.address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        self.learners: LearnerGroup
        self.pool: RolloutPool
        self._group: Any = None
        self._actors: list[Any] = []
        self._ready: dict[int, Any] = {}
        self.spawned = False
        """Whether the actors were started."""
        self.run_id = uuid.uuid4().hex
        """Run id of the weights that these engines accept."""
        self._owns_ray = self._local = False
        self._watch: local_ray.Watch | None = None
        self.next_version = 0
        """The smallest version that workers have not been told of."""
        device = platform.named(self.placement.device)
        # of a device that torch knows without another package it is known that there is none
        bare = device.is_cpu or (device.module is None and platform.detect().is_cpu)
        if bare and not self.address and not ray.is_initialized():
            check_capacity(self.placement, {"CPU": platform.local_cpus()}, "this machine")

    def __enter__(self) -> Cluster:
        # earlier versions of Ray hide all devices from a process that reserves none
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
        if not ray.is_initialized():
            self._owns_ray = True
            if not self._join():
                local_ray.before_start()
                self._local = True
                with local_ray.another_process_group(), local_ray.needed_alone():
                    ray.init(
                        # never a cluster that happens to run here: it was not asked for
                        address="local",
                        num_cpus=platform.local_cpus(),
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
                self._watch = local_ray.Watch()
        try:
            # before waiting for nodes: an autoscaler starts them for a pending placement group
            self._group = placement_group(self.placement.bundles(), strategy="PACK")
            settings, where = self.config.cluster, "the Ray cluster"
            where += f" at {self.address}" if self.address else ""
            seconds = 0.0 if self._local else settings.join_timeout
            have, free, tell = ray.cluster_resources, ray.available_resources, self.tell
            wait_for_nodes(self.placement, seconds, have, where, tell)
            wait_for_grant(self._group, self.placement, settings.start_timeout, free, tell)
        except BaseException:
            self.close()
            raise
        return self

    def _join(self) -> bool:
        """Joins the cluster at `address`, or for `auto` the one that runs here. Returns False if
        there is none to join; raises `ConfigError` if a named one does not answer."""
        if not self.address:
            return False
        if ":" in self.address and not self.address.startswith("ray://"):
            check_answers(self.address)
        try:
            ray.init(
                address=self.address,
                namespace=f"emberl-{uuid.uuid4().hex[:8]}",
                log_to_driver=False,
            )
        except ConnectionError as error:
            if self.address == "auto":
                self.address = None
                return False
            raise no_cluster(self.address, error) from error
        return True

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all our actors, removes the placement group, and shuts Ray down if it was started
        here. Idempotent."""
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                remove_placement_group(self._group)
            if self._owns_ray:
                if self._watch is not None:
                    self._watch.close()
                ray.shutdown()
        if self._local:
            local_ray.after_end()
        self._actors = []
        self._group = None

    def spawn(self, model_path: str, run_dir: Path) -> tuple[LearnerGroup, RolloutPool]:
        """Starts all actors, which load until `wait`; nodes that do not share `run_dir`'s disk get
        the model's files first. A second call returns the same actors."""
        if self.spawned:
            return self.learners, self.pool
        self._disks = self._prepare_disks(model_path, run_dir)
        self._model_path = model_path
        self._plan(model_path)
        self._start_learners()
        workers = [self._spawn(RolloutWorker, slot, spec) for slot, spec in self._workers]
        self.pool = self._pool_of(workers)
        self.spawned = True
        return self.learners, self.pool

    def restart_learners(self) -> None:
        """Replaces the learner ranks by new ones, which load the model; the rollout workers stay,
        without their requests, in a new pool. Raises ActorLostError if no worker is left."""
        for rank in self.learners.ranks:
            ray.kill(rank)
        self.next_version = max(self.next_version, self.pool.announced + 1)
        gone, workers = set(self.pool.gone), list(self.pool.workers)
        self._start_learners()
        ended = {i: worker.reset.remote() for i, worker in enumerate(workers) if i not in gone}
        for i, ref in ended.items():
            try:
                ray.get(ref, timeout=self.config.sync.timeout)
            except LOST as error:
                try:
                    workers[i] = self._another(i, f"rollout worker {i}: {cause(error)}")
                except PlaceLostError:
                    gone.add(i)
        if len(gone) == len(workers):
            raise ActorLostError("no rollout worker is left")
        self.pool = self._pool_of(workers, gone)

    def _plan(self, model_path: str) -> None:
        """Makes the settings of each actor."""
        config, slots = self.config, self.placement.slots
        world = sum(slot.role == "learner" for slot in slots)
        self._ranks = [
            (
                slot,
                RankSpec(
                    rank=slot.index,
                    world=world,
                    device=self.placement.device,
                    threads=slot.threads,
                    model=config.model,
                    timeout=config.cluster.step_timeout,
                    seed=config.seed,
                    longest=config.max_model_length,
                ),
            )
            for slot in slots
            if slot.role == "learner"
        ]
        self._workers = [
            (
                slot,
                WorkerSpec(
                    model_path=model_path,
                    device=self.placement.device,
                    dtype=config.model.dtype,
                    threads=slot.threads,
                    max_num_seqs=config.rollout.max_num_seqs,
                    max_model_len=config.max_model_length,
                    run_id=self.run_id,
                    timeout=config.sync.timeout,
                    in_flight=config.schedule.in_flight,
                    engine=config.rollout.engine,
                    engine_args=self._engine_args(),
                    token_rate=config.rollout.token_rate,
                    server=(config.rollout.servers or ("",) * (slot.index + 1))[slot.index],
                    servers_directory=config.rollout.servers_directory,
                    max_restarts=config.rollout.max_restarts,
                    rate_limit=config.sync.rate_limit,
                ),
            )
            for slot in slots
            if slot.role == "rollout"
        ]

    def _start_learners(self) -> None:
        ranks = [self._spawn(LearnerRank, slot, spec) for slot, spec in self._ranks]
        timeout = self.config.cluster.step_timeout
        self.learners = LearnerGroup(ranks, timeout=timeout, disks=self._disks)

    def _pool_of(self, workers: Sequence[Any], gone: Collection[int] = ()) -> RolloutPool:
        config = self.config
        self._ready = {i: w.ready.remote() for i, w in enumerate(workers) if i not in gone}
        return RolloutPool(
            workers,
            timeout=config.rollout.timeout,
            sync_timeout=config.sync.timeout,
            max_samples=(
                QUEUE_DEPTH * config.rollout.max_num_seqs
                if config.schedule.max_staleness or not self._ranks
                else None
            ),
            respawn=self.respawn,
            max_restarts=config.rollout.max_restarts,
            gone=gone,
            tell=self.tell,
        )

    def _prepare_disks(self, model_path: str, run_dir: Path) -> Disks:
        """The disks of the learners' nodes, after the model's files were copied to every node.
        Raises `ConfigError` for settings that need a shared disk if there is none."""
        config = self.config
        nodes = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        timeout = config.cluster.step_timeout
        every = Disks(list(nodes.values()), run_dir, timeout)
        with user_errors():
            if Path(model_path).is_dir():
                every.push(Path(model_path), nested=False)
        if config.checkpoint.history and not every.shared:
            raise ConfigError(
                f"checkpoint.history=true needs a run directory that every node sees, but"
                f" {run_dir} is another disk on some; set run_dir to a shared one"
            )
        every.close()
        directory = config.sync.directory or str(run_dir / "sync")
        if config.sync.transport == "directory":
            Path(directory).mkdir(parents=True, exist_ok=True)
            patches = Disks(list(nodes.values()), Path(directory), timeout)
            if not patches.shared:
                raise ConfigError(
                    f"sync.transport=directory needs a directory that every node sees, but"
                    f" {directory} is another disk on some; set sync.directory to a shared one"
                )
        learners = [nodes[s.place] for s in self.placement.slots if s.role == "learner"]
        return Disks(learners, run_dir, timeout)

    def _engine_args(self) -> dict[str, Any]:
        """`rollout.engine_args`, with the argument by which a colocated vLLM can free its device;
        on a CPU it cannot, and need not."""
        sleeps = self.config.cluster.colocated and self.placement.device != "cpu"
        return {
            **self.config.rollout.engine_args,
            **({"enable_sleep_mode": True} if sleeps else {}),
        }

    def respawn(self, index: int) -> Any:
        """A new actor, with its model loaded, for a rollout worker that is lost or stuck. Raises
        `PlaceLostError` if its node is gone and no other has room, `TimeoutError` after
        `cluster.start_timeout`, and Ray's own errors."""
        slot, spec = self._workers[index]
        if self._group is None:  # everything ends: a call of Ray's would start another cluster
            raise TimeoutError("the run is over")
        ray.kill(self.pool.workers[index])
        handle = self._spawn(RolloutWorker, slot, spec)
        ready = handle.ready.remote()
        deadline = time.monotonic() + self.config.cluster.start_timeout
        while not ray.wait([ready], timeout=PATIENCE)[0]:
            if len(self._workers) > 1 and not self._group.wait(timeout_seconds=1):
                ray.kill(handle)
                raise PlaceLostError(f"no node has room for {resources_text(slot.bundle)}")
            if time.monotonic() > deadline:
                raise TimeoutError("it has not loaded its model within cluster.start_timeout")
        ray.get(ready, timeout=PATIENCE)  # raises what its start raised
        return handle

    def _another(self, i: int, why: str) -> Any:
        """`respawn`, repeated up to `rollout.max_restarts` times while the new actors are lost,
        too; then raises ActorLostError. why: the reason why the one before was lost."""
        for _ in range(self.config.rollout.max_restarts):
            try:
                return self.respawn(i)
            except PlaceLostError:
                raise
            except LOST as error:
                why = f"rollout worker {i}, restarted: {cause(error)}"
        raise ActorLostError(why)

    def wait(self) -> None:
        """Waits until the learners have formed their group and every actor has its model. A rollout
        worker that is lost meanwhile is replaced; a lost learner is an error."""
        timeout = self.config.cluster.start_timeout
        if self.learners.ranks:
            self.learners.connect(self._model_path, timeout)
        deadline = time.monotonic() + timeout
        for i, ready in self._ready.items():
            try:
                ray.get(ready, timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                self._not_up(i, error)

    def _not_up(self, i: int, error: ray.exceptions.RayError) -> None:
        """Replaces a worker that died during its start, or leaves it out if no node has room.
        Raises ActorLostError if it was late or failed by an error of its own."""
        why = f"rollout worker {i} failed in 'ready': {cause(error)}"
        if late := isinstance(error, TimeoutError):
            timeout = self.config.cluster.start_timeout
            why = f"rollout worker {i}: no model within cluster.start_timeout={timeout:g} s"
        refused = not isinstance(error, LOST) or getattr(error, "actor_init_failed", False)
        if late or refused:
            raise ActorLostError(why) from error
        try:
            self.pool.substitute(i, self._another(i, why))
        except PlaceLostError as nowhere:
            self.pool.leave_out(i, f"{why}; {nowhere}")
        else:
            self.tell(f"{why}; another has taken its place")

    def _spawn(self, actor: type, slot: ActorSlot, spec: RankSpec | WorkerSpec) -> Any:
        handle = self.options(actor, slot).remote(spec)
        self._actors.append(handle)
        return handle

    def options(self, actor: type, slot: ActorSlot) -> Any:
        """The Ray actor class bound to its bundle, its resources and its thread environment."""
        others = {
            name: amount for name, amount in slot.bundle.items() if name not in ("CPU", "GPU")
        }
        remote: Any = ray.remote  # its types know no concurrency groups
        beside = {PUBLISHING: 1, WRITING: 1} if slot.role == "learner" else None
        return remote(concurrency_groups=beside)(actor).options(
            num_cpus=slot.bundle["CPU"],
            num_gpus=slot.bundle.get("GPU", 0),
            resources=others or None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=slot.place
            ),
            runtime_env={
                "env_vars": platform.thread_environment(slot.threads)
                | platform.actor_environment(self.placement.device, slot.role, os.environ)
            },
            max_restarts=0,
        )
