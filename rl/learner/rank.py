"""One learner rank: a Ray actor that owns a device and its shards of the policy and of the
optimizer's state.

`model_loader.py` reads and shards its models, `training_step.py` runs them over its share of a
batch and forms gradients and metrics.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...kernels import platform
from ...rollout.actors import node_address, use_node_interface
from ...rollout.tracing import ProcessTrace
from ...rollout.weights.canary import Canary, canary_of
from ...rollout.weights.engine_transfer import BroadcastGroup
from ..algorithm.losses import Objective
from ..config.distill import DistillConfig
from ..config.load import CriticConfig, OptimConfig
from ..groups import Batch
from . import canary as canaries
from . import checkpoint
from .flops import peak_flops, speed
from .model_loader import ModelLoader, RankSpec
from .policy import Policy
from .publisher import Parts, Published, Publisher, PublishRequest, shards_of
from .shards import Shards
from .shared_prompts import repeated_tokens
from .teachers import Teacher, sampled_logprobs
from .trainable import Trainable
from .training_step import EngineMismatch, RankPasses, critic_backward, pass_size, policy_backward


class LearnerRank:
    """Calls of all ranks must be made in the same order with the same arguments; each returns on
    every rank."""

    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        platform.set_threads(spec.threads)
        self.models = ModelLoader(spec)
        self.platform = self.models.platform
        self.dtype = self.models.dtype
        self.peak = peak_flops(platform.device_name(self.platform))
        self.publisher = Publisher(rank=spec.rank, world=spec.world, threads=spec.threads)
        self._trace = ProcessTrace()
        self.critic: Trainable | None = None
        self.reference: Policy | None = None
        self.teachers: list[Teacher] = []
        self._taken: checkpoint.Snapshot | None = None
        self._mismatch = EngineMismatch()

    def trace(self, begin: bool) -> bytes:
        """Begins a trace of this process, or ends it and returns it."""
        if begin:
            self._trace.begin()
            return b""
        return self._trace.end()

    def address(self) -> str:
        """`host:port` with a free port, at which rank 0 will wait for the others."""
        host = node_address() if self.spec.world > 1 else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def connect(self, address: str) -> None:
        """Joins the process group; every collective has the deadline of the spec."""
        # a thread begins with the first card as its own, whatever the actor's constructor chose
        platform.device_of_process(self.platform, self.models.device.index or 0)
        use_node_interface(self.platform.interface_variables)
        host, _, port = address.rpartition(":")
        within = self.spec.timeout
        dist.init_process_group(
            self.platform.collective,
            store=platform.meeting_store(host, int(port), self.spec.rank, within),
            rank=self.spec.rank,
            world_size=self.spec.world,
            timeout=timedelta(seconds=within),
        )
        # a thread that writes checkpoints has collectives of its own
        self._writers: Any = platform.host_group(within)

    def load(self, model_path: str) -> None:
        """Reads the model and shards it."""
        self.model_path = model_path
        self.models.open(model_path)
        self.policy = self.models.load_policy()

    def begin_stage(
        self,
        optim: OptimConfig,
        total_steps: int,
        critic: CriticConfig | None = None,
        reference: bool = False,
    ) -> None:
        """Makes a new optimizer and learning-rate schedule for `total_steps` updates, and, if asked
        for, a critic and a frozen reference with the policy's current weights."""
        self.passes = RankPasses(self.models, pass_size(self.models, self.policy, optim))
        self.actor = Trainable(self.policy, optim, total_steps)
        self.critic = None
        if critic is not None:
            self.critic_clip = critic.clip
            module = self.models.load_critic(critic, self.policy)
            self.critic = Trainable(module, critic.optim(optim), total_steps)
        self.reference = None
        if reference:
            self.reference = self.models.load_policy(offload=not self.platform.is_cpu)
            self.reference.eval().requires_grad_(False)
            self.refresh_reference()

    def refresh_reference(self) -> None:
        """Copies the policy's current weights into the reference."""
        assert self.reference is not None, "this stage has no reference"
        policy = Shards.of(self.policy, frozen=True)
        Shards.of(self.reference, frozen=True).copy_from(
            zip(policy.parameters, policy.local, strict=True)
        )

    def load_teachers(self, distill: DistillConfig) -> None:
        """Loads the frozen teachers, in the order of the settings."""
        self.teachers = [self.models.load_teacher(each.path) for each in distill.teachers.values()]

    def step(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """One optimizer step on the whole batch; the same metrics on every rank."""
        batch = self._with_old_logp(batch, objective)
        start = time.perf_counter()
        loss, metrics = self.backward(batch, objective)
        metrics |= self._mismatch.take()  # before the update: the policy is still the old one
        metrics |= {"actor/loss": loss, **self.actor.update("actor")}
        if self.platform.is_cpu:  # passes free as much memory as remains in use
            platform.give_back_memory()
        seconds = time.perf_counter() - start
        metrics |= self._speed(batch, seconds)
        metrics |= platform.memory_statistics(self.platform, self.models.device)
        return metrics | {"timing_s/update_actor": seconds}

    def backward(self, batch: Batch, objective: Objective) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the whole batch's loss to the parameters; returns the loss and the
        metrics."""
        batch = self._with_old_logp(batch, objective)
        loss, metrics, own_T = policy_backward(
            self.passes, self.policy, batch, objective, self.teachers
        )
        if own_T is not None:
            self._mismatch.add(batch, own_T)
        return loss, metrics

    def _with_old_logp(self, batch: Batch, objective: Objective) -> Batch:
        if not objective.needs_old_logp or batch.old_logp_T is not None:
            return batch
        return replace(batch, old_logp_T=self.logprobs(batch, objective.temperature))

    def _speed(self, batch: Batch, seconds: float) -> dict[str, float]:
        if self.models.flops is None:
            return {}
        cost = self.models.flops.update(
            batch.sequence_lengths,
            int(batch.loss_mask_T.sum()),
            frozen_weights=self.spec.model.lora is not None,
            repeated=repeated_tokens(batch) if self.models.shares_prompts else 0,
        )
        return speed(
            cost, tokens=batch.num_tokens, seconds=seconds, devices=self.spec.world, peak=self.peak
        )

    def skip(self, updates: int) -> None:
        """Advances the learning-rate schedules by updates without a batch to train on."""
        for each in (self.actor, self.critic):
            if each is not None:
                each.skip(updates)

    def critic_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step of the critic."""
        assert self.critic is not None, "this stage has no critic"
        start = time.perf_counter()
        loss, metrics = self.critic_backward(batch)
        metrics |= {"critic/vf_loss": loss, **self.critic.update("critic")}
        return metrics | {"timing_s/update_critic": time.perf_counter() - start}

    def critic_backward(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the critic's loss to its parameters; returns the loss and the
        metrics."""
        assert self.critic is not None, "this stage has no critic"
        return critic_backward(self.passes, self.critic.module, batch, self.critic_clip)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """The policy's log-probs [T] of the batch's loss tokens (0 elsewhere), in the master dtype,
        whole on every rank."""
        return self.passes.logprobs(batch, self.policy, temperature)

    def reference_logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """`logprobs` of the reference."""
        assert self.reference is not None, "this stage has no reference"
        return self.passes.logprobs(batch, self.reference, temperature)

    def teacher_logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """`logprobs` of each sequence's teacher, 0 where it has none."""
        look = partial(self.passes.logprobs, temperature=temperature)
        return sampled_logprobs(self.teachers, batch, look)

    def values(self, batch: Batch) -> NDArray[Any]:
        """The critic's estimates [T] before the batch's loss tokens (0 elsewhere), whole on every
        rank."""
        assert self.critic is not None, "this stage has no critic"
        return self.passes.per_token(batch, self.critic.module, self.critic.module)

    def canary(self, seed: int) -> Canary:
        """A canary of the current weights; a collective."""
        model, spec = self.policy.model, self.spec
        squares = canaries.squares(model, spec.rank, spec.world, self.models.device)
        return canary_of(seed, squares)

    def canary_logprobs(
        self, batch: Batch, canary: Canary, left_out: Sequence[str] = ()
    ) -> list[NDArray[Any]]:
        """`logprobs` under the canary's weights, then for each name in `left_out` under those with
        that tensor unchanged."""
        model, rank, world = self.policy.model, self.spec.rank, self.spec.world
        with canaries.changed(model, canary, rank, world):
            logps = [self.logprobs(batch)]
            for name in left_out:
                canaries.change(model, canary, rank, world, back=True, only=name)
                logps.append(self.logprobs(batch))
                canaries.change(model, canary, rank, world, only=name)
        return logps

    def take_weights(self) -> None:
        """Copies this rank's shard, as the next version to publish."""
        self.publisher.take(
            shards_of(self.policy.model, self.dtype, self.spec.rank, self.spec.world)
        )

    # The methods below may run in another thread, while the training thread makes its next step.

    def publish_part(self, whole: bool) -> Parts:
        """`Publisher.part` of this rank, for rank 0."""
        return self.publisher.part(whole=whole)

    def publish(self, order: PublishRequest, *others: Parts) -> Published:
        """On rank 0: publishes the copied weights with the other ranks' parts."""
        return self.publisher.publish(order, others)

    def meet(self, workers: int, timeout: float, backend: str, ranks: int) -> BroadcastGroup:
        """On rank 0: a new group for broadcasts to `workers` workers' engines."""
        return self.publisher.meet(self.platform.device, workers, timeout, backend, ranks)

    def broadcast(self) -> None:
        """On rank 0: sends the version last published to the engines that wait for it."""
        self.publisher.broadcast()

    def snapshot(self) -> int:
        """Copies this rank's part of a checkpoint to host memory, between two steps; returns its
        bytes."""
        first = self.spec.rank == 0
        taken = checkpoint.Snapshot(
            model=checkpoint.whole_model(self.policy, self.dtype, keep=first),
            states={},
            positions={},
        )
        for name, trained in (("learner", self.actor), ("critic", self.critic)):
            if trained is not None:
                taken.states[name], position = trained.aside()
                taken.positions |= {name: position} if first else {}
        if self.reference is not None:
            shards = Shards.of(self.reference, frozen=True)
            taken.states["reference"] = checkpoint.aside(checkpoint.weights_of(shards))
        self._taken = taken
        return taken.num_bytes

    def write(self, folder: str) -> None:
        """Writes the snapshot, in another thread than the training one: the model in Hugging Face
        format under `folder`, and the state to resume from under `folder/learner` and so on."""
        taken = self._taken
        self._taken = None
        assert taken is not None, "nothing was copied aside"
        failure: Exception | None = None
        try:
            if taken.model is not None:
                checkpoint.write_model(
                    self.policy, taken.model, Path(folder), self.dtype, self.model_path
                )
        except Exception as error:  # a full disk, by whatever name the writing library gives it
            failure = error
        # the others would wait for this rank in the next collective
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._writers)
        if failed:
            raise failure or OSError("another rank could not write the model")
        checkpoint.write_states(taken, Path(folder), self._writers)
        dist.barrier(group=self._writers)

    def save(self, folder: str) -> None:
        """`snapshot` and `write`."""
        self.snapshot()
        self.write(folder)

    def restore(self, folder: str) -> None:
        """Loads the state that `write` wrote, possibly with another number of ranks."""
        self.actor.restore(Path(folder) / "learner")
        if self.critic is not None:
            self.critic.restore(Path(folder) / "critic")
        if self.reference is not None:
            checkpoint.load_weights(
                Shards.of(self.reference, frozen=True), Path(folder) / "reference"
            )

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def pid(self) -> int:
        return os.getpid()
