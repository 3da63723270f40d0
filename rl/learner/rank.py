"""One learner rank: a Ray actor that owns a device, its shard of the policy and of the optimizer's
state.

Parameters are float32 masters sharded by FSDP2; a pass gathers and casts them to the compute dtype,
and gradients are summed (not averaged) over ranks in float32, since every token's weight already
holds the denominator of the whole step.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...kernels import platform
from ...kernels.loss.divergence import Teaching
from ...rollout.actors import node_address, use_node_interface
from ...rollout.tracing import ProcessTrace
from ...rollout.weights.canary import Canary, canary_of
from ...rollout.weights.engine_transfer import BroadcastGroup
from ..algorithm.losses import CLIPPED, COUNTED, PARTS, BatchLoss, Objective, token_loss
from ..algorithm.offpolicy import mismatch_metrics, worker_mismatch
from ..algorithm.surrogates import value_loss
from ..config.distill import DistillConfig
from ..config.load import CriticConfig, ModelConfig, OptimConfig
from ..groups import Batch
from . import canary as canaries
from . import checkpoint, memory
from .batching import plan_micro_batches
from .critic import Critic
from .flops import ModelFlops, peak_flops, speed
from .fused_layers import fused_forward
from .layers import ATTENTION, replace_layers
from .lora import inject_adapters, merged_shards
from .policy import MicroBatchTensors, Policy, pick_attention, takes_packed, to_tensors
from .publisher import Parts, Published, Publisher, PublishRequest, shards_of
from .shards import Shards
from .teachers import Teacher, sampled_logprobs, teaching
from .trainable import Trainable, shard
from .whole import keep_whole, passes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """The settings of one rank, known before it meets the others."""

    rank: int
    world: int
    device: str
    """A platform's name, as in `cluster.device`."""
    threads: int
    model: ModelConfig
    timeout: float
    """Seconds after which a collective gives up on a lost peer."""
    seed: int = 0
    """Of new adapters."""
    longest: int = memory.SMALLEST
    """Tokens of the longest sequence that a run may train on; what cannot hold it is refused before
    the first step."""


class LearnerRank:
    """Calls of all ranks must be made in the same order with the same arguments; each returns on
    every rank."""

    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        self.platform = platform.named(spec.device)
        platform.set_threads(spec.threads)
        self.device = platform.device_of_process(self.platform)
        self.dtype = platform.compute_dtype(spec.model.dtype, self.platform)
        self.master = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.attention = spec.model.attention
        if self.attention == "auto":
            self.attention = pick_attention(self.platform, self.dtype)
        packing = spec.model.packing
        self.packed = takes_packed(self.attention) if packing == "auto" else packing == "on"
        own = self.platform.is_cpu or self.platform.fused_layers
        self.fused = own and self.dtype == torch.bfloat16 and spec.model.attention == "auto"
        """Whether the policy's layers are run by `layers.py`, on NPUs by `fused_layers.py`."""
        self.sums = platform.sum_dtype(self.platform.device)
        self.reduce_every_pass = False
        """Whether gradients are summed over ranks after each pass, not after the last: then none of
        them waits whole, which for a large model is more than a device has."""
        self.peak = peak_flops(platform.device_name(self.platform))
        self.publisher = Publisher(rank=spec.rank, world=spec.world, threads=spec.threads)
        self._trace = ProcessTrace()
        self.critic: Trainable | None = None
        self.reference: Policy | None = None
        self.teachers: list[Teacher] = []
        self._taken: checkpoint.Snapshot | None = None
        self._seen: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        """Of each batch since the last update: old and engine's log-probs, loss mask, sequence
        ids."""
        self._workers: list[NDArray[Any] | None] = []

    def trace(self, begin: bool) -> bytes:
        """Begins a trace of this process, or ends it and returns it."""
        if begin:
            self._trace.begin()
            return b""
        return self._trace.end()

    def address(self) -> str:
        """`host:port` at which rank 0 will wait for the others."""
        host = node_address() if self.spec.world > 1 else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def connect(self, address: str) -> None:
        """Joins the process group; every collective has the deadline of the spec."""
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
        from torch.distributed.device_mesh import init_device_mesh

        self.model_path = model_path
        self.mesh: DeviceMesh = init_device_mesh(self.platform.device, (self.spec.world,))
        self.policy = self._load_policy()

    def _load_policy(self, *, offload: bool = False) -> Policy:
        """A sharded policy with the weights of the model's files, and adapters of its own where
        there are to be any."""
        from transformers import AutoModelForCausalLM

        model = self._load(AutoModelForCausalLM, self.model_path)
        try:
            self.flops: ModelFlops | None = ModelFlops.of(model.config)
        except ValueError as error:  # an architecture that is not counted trains all the same
            self.flops = None
            _log.warning("no TFLOP/s and MFU will be logged: %s", error)
        self.vocabulary = len(model.get_output_embeddings().weight)
        if self.spec.model.lora is not None:
            inject_adapters(model, self.spec.model.lora, self.spec.seed)
        if self.fused:
            self.fused = self._replace(model, getattr(model, model.base_model_prefix).layers)
            if self.fused:  # also of what is loaded later
                self.attention = ATTENTION
                self.packed |= self.spec.model.packing == "auto"
        policy = Policy(model).train()
        self._shard(policy, getattr(model, model.base_model_prefix).layers, offload=offload)
        return policy

    def _replace(self, model: Any, layers: Any) -> bool:
        if self.platform.is_cpu:
            return replace_layers(model, layers)
        return replace_layers(model, layers, fused_forward(self.device), self.device)

    def _load(self, auto: Any, path: str) -> Any:
        # in host memory, on an accelerator in the files' own dtype: sharding moves one layer at a time
        dtype = self.master if self.platform.is_cpu else "auto"
        model = auto.from_pretrained(path, dtype=dtype, attn_implementation=self.attention)
        if self.spec.model.gradient_checkpointing:
            new_name = getattr(model, "activation_checkpointing_enable", None)  # of transformers 5
            (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
        return model

    def _shard(
        self, module: nn.Module, layers: Any, *, dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """For passes in `dtype`, by default that of the passes."""
        compute = dtype or self.dtype
        if self.spec.world == 1 and self.platform.is_cpu:
            keep_whole(module, self.mesh, compute)
            return
        shard(
            module,
            layers,
            self.mesh,
            compute,
            device=self.device,
            master=self.master,
            offload=offload,
            keep=self.platform.is_cpu,
        )

    def begin_stage(
        self,
        optim: OptimConfig,
        total_steps: int,
        critic: CriticConfig | None = None,
        reference: bool = False,
    ) -> None:
        """A fresh optimizer and learning-rate schedule for `total_steps` updates, and what goes
        with the policy: a critic, and the policy of this moment as a frozen reference."""
        self.optim = optim
        self.micro_batch_tokens = self._pass_tokens(optim)
        self.actor = Trainable(self.policy, optim, total_steps)
        self.critic = self._make_critic(critic, total_steps) if critic is not None else None
        self.reference = None
        if reference:
            self.reference = self._load_policy(offload=not self.platform.is_cpu)
            self.reference.eval().requires_grad_(False)
            self.refresh_reference()

    def _pass_tokens(self, optim: OptimConfig) -> int:
        """`optim.micro_batch_tokens` as far as they are worth their room, or what fits; an
        architecture whose need is not known gets the largest. Sets `reduce_every_pass`."""
        given = optim.micro_batch_tokens
        largest = given if isinstance(given, int) else memory.largest_pass(self.platform)
        if self.flops is None:
            return largest
        sizes = [(p.numel(), p.requires_grad) for p in self.policy.parameters()]
        parameters = sum(size for size, _ in sizes)
        need = partial(
            memory.need,
            self.flops,
            parameters=parameters,
            trained=sum(size for size, trained in sizes if trained),
            world=self.spec.world,
            dtype=self.dtype,
            attention=self.attention,
            checkpointing=self.spec.model.gradient_checkpointing,
            fused=self.fused and self.platform.is_cpu,
        )
        if isinstance(given, int) and self.platform.is_cpu:
            return memory.worth_keeping(need(), given, self.platform)
        free = torch.tensor(memory.free_memory(self.platform), device=self.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)  # every rank must cut the same passes
        room, needed = int(free) // (self.spec.world if self.platform.is_cpu else 1), need()
        if not self.platform.is_cpu:
            needed = need(resident=True)
            self.reduce_every_pass = not memory.fits(needed, room)
            if self.reduce_every_pass:
                gathered = memory.gathered_at_once(self.flops, parameters)
                needed = need(resident=True, gathered=gathered)
        if isinstance(given, int):
            return given
        return memory.tokens_that_fit(needed, room, longest=memory.SMALLEST, largest=largest)

    def _make_critic(self, settings: CriticConfig, total_steps: int) -> Trainable:
        """From `critic.path`, or with the policy's body of this moment, adapters merged in."""
        from transformers import AutoModel

        body = self._load(AutoModel, settings.path or self.model_path)
        if self.fused:
            self._replace(body, body.layers)
        critic = Critic(body, self.master).train()
        self._shard(critic.value, [], dtype=self.master)
        self._shard(critic, critic.body.layers)
        if settings.path is None:
            prefix = f"{self.policy.model.base_model_prefix}."
            held = merged_shards(self.policy.model, self.spec.rank, self.spec.world)
            Shards.of(critic.body).copy_from(
                (name.removeprefix(prefix), part) for name, _, part in held
            )
        self.critic_settings = settings
        return Trainable(critic, settings.optim(self.optim), total_steps)

    def refresh_reference(self) -> None:
        """The reference becomes what the policy is now."""
        assert self.reference is not None, "this stage has no reference"
        policy = Shards.of(self.policy, frozen=True)
        Shards.of(self.reference, frozen=True).copy_from(
            zip(policy.parameters, policy.local, strict=True)
        )

    def load_teachers(self, distill: DistillConfig) -> None:
        """The frozen teachers, in the order of the settings; in host memory between their
        passes."""
        from transformers import AutoModelForCausalLM

        self.teachers = []
        for settings in distill.teachers.values():
            model = self._load(AutoModelForCausalLM, settings.path)
            if self.fused:
                self._replace(model, getattr(model, model.base_model_prefix).layers)
            teacher = Teacher(model)
            layers = getattr(model, model.base_model_prefix).layers
            self._shard(teacher, layers, offload=not self.platform.is_cpu)
            teacher.eval().requires_grad_(False)
            self.teachers.append(teacher)

    def step(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """One optimizer step on the whole batch; the same metrics on every rank."""
        batch = self._with_old_logp(batch, objective)
        start = time.perf_counter()
        loss, metrics = self.backward(batch, objective)
        metrics |= self._mismatch()  # before the update: the policy is still the old one
        metrics |= {"actor/loss": loss, **self.actor.update("actor")}
        if self.platform.is_cpu:  # what passes freed is as much again as what stays
            platform.give_back_memory()
        seconds = time.perf_counter() - start
        metrics |= self._speed(batch, seconds) | platform.memory_statistics(self.platform)
        return metrics | {"timing_s/update_actor": seconds}

    def skip(self, updates: int) -> None:
        """Moves the learning-rate schedules on by updates that there was nothing to learn for."""
        for each in (self.actor, self.critic):
            if each is not None:
                each.skip(updates)

    def _speed(self, batch: Batch, seconds: float) -> dict[str, float]:
        if self.flops is None:
            return {}
        cost = self.flops.update(
            batch.sequence_lengths,
            int(batch.loss_mask_T.sum()),
            frozen_weights=self.spec.model.lora is not None,
        )
        return speed(
            cost, tokens=batch.num_tokens, seconds=seconds, devices=self.spec.world, peak=self.peak
        )

    def backward(self, batch: Batch, objective: Objective) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the whole batch's loss to the parameters; returns the loss and the
        metrics."""
        batch = self._with_old_logp(batch, objective)
        loss_function = token_loss(
            objective,
            batch,
            self.device,
            old_logp=batch.old_logp_T,
            reference_logp=batch.reference_logp_T,
        )
        behaviour_T = self._on_device(batch.behaviour_logp_T)
        totals: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=self.sums, device=self.device)
        logp_T = torch.zeros(batch.num_tokens, dtype=self.sums, device=self.device)
        for micro in self._micro_batches(batch, self.policy):
            shift = behaviour_T[micro.index_n] if objective.on_samples else None
            compared = self._teaching(micro, batch, objective)
            part, stats, metrics = self.policy(
                micro, loss_function, shift, objective.temperature, compared
            )
            assert part is not None
            part.backward()
            loss += part.detach()
            logp_T[micro.index_n] = stats.logp.detach().to(self.sums)
            for name, values in metrics.items():
                totals[name] = (
                    totals.get(name, torch.zeros_like(loss)) + values.detach().to(self.sums).sum()
                )
        if objective.on_samples and batch.num_tokens:
            dist.all_reduce(logp_T)
            old_T = logp_T.cpu().numpy() if batch.old_logp_T is None else batch.old_logp_T
            self._seen.append(
                (old_T, batch.behaviour_logp_T, batch.loss_mask_T, batch.sequence_ids_T)
            )
            self._workers.append(batch.worker_ids_T)
        loss_value, sums = self._sums(loss, totals)
        return loss_value, loss_function.metrics | token_means(sums, batch, loss_function)

    def _teaching(
        self, micro: MicroBatchTensors, batch: Batch, objective: Objective
    ) -> Teaching | None:
        if not objective.distill.on_distributions:
            return None
        cut = partial(to_tensors, batch, device=self.device, packed=self.packed)
        return teaching(self.teachers, micro, batch, objective, self.vocabulary, cut)

    def _mismatch(self) -> dict[str, float]:
        """How far the engines' policy was from the old one, over all that was seen since the last
        update."""
        seen, self._seen = self._seen, []
        workers, self._workers = self._workers, []
        if not seen:
            return {}
        old, behaviour, mask, ids = ([*rows] for rows in zip(*seen, strict=True))
        starts = np.cumsum([0, *(int(part[-1]) + 1 for part in ids[:-1])])
        numbered = np.concatenate([part + start for part, start in zip(ids, starts, strict=True)])
        of = [row for row in workers if row is not None]
        known = np.concatenate(of) if len(of) == len(workers) else None
        rows = np.concatenate(old), np.concatenate(behaviour), np.concatenate(mask)
        return mismatch_metrics(*rows, numbered) | worker_mismatch(*rows, known)

    def _with_old_logp(self, batch: Batch, objective: Objective) -> Batch:
        if not objective.needs_old_logp or batch.old_logp_T is not None:
            return batch
        return replace(batch, old_logp_T=self.logprobs(batch, objective.temperature))

    def _sums(self, loss: Tensor, totals: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """Sums over ranks."""
        names = sorted(totals)
        stacked = torch.stack([loss, *(totals[name] for name in names)])
        dist.all_reduce(stacked)
        return float(stacked[0]), dict(zip(names, stacked[1:].tolist(), strict=True))

    def critic_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step of the critic."""
        assert self.critic is not None, "this stage has no critic"
        start = time.perf_counter()
        loss, metrics = self.critic_backward(batch)
        metrics |= {"critic/vf_loss": loss, **self.critic.update("critic")}
        return metrics | {"timing_s/update_critic": time.perf_counter() - start}

    def critic_backward(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the mean of `value_loss` over the batch's loss tokens; returns that
        mean and the metrics."""
        assert (
            self.critic is not None and batch.values_T is not None and batch.returns_T is not None
        )
        module, old_T, targets_T = (
            self.critic.module,
            self._on_device(batch.values_T),
            self._on_device(batch.returns_T),
        )
        loss = torch.zeros((), dtype=self.sums, device=self.device)
        clipped = torch.zeros_like(loss)
        for micro in self._micro_batches(batch, module):
            values, at = module(micro), micro.index_n
            clip = self.critic_settings.clip
            errors, slope, held = value_loss(values.detach(), old_T[at], targets_T[at], clip=clip)
            values.backward(slope.to(values.dtype) / max(1, batch.num_loss_tokens))
            loss += errors.to(self.sums).sum() / max(1, batch.num_loss_tokens)
            clipped += held.sum()
        value, sums = self._sums(loss, {"critic/vf_clipfrac": clipped})
        return value, {name: total / max(1, batch.num_loss_tokens) for name, total in sums.items()}

    def _micro_batches(
        self, batch: Batch, module: Any, *, gradient: bool = True
    ) -> Iterator[MicroBatchTensors]:
        """This rank's passes, as many as on every other rank; gradients go over to the others with
        the last one."""
        from torch.distributed.fsdp import FSDPModule

        plan = plan_micro_batches(
            batch.sequence_lengths,
            self.spec.world,
            self.micro_batch_tokens,
            packed=self.packed,
            cost=float if self.flops is None else self.flops.sequence,
        )
        mine = plan[self.spec.rank]
        with passes(module):
            for i, sequences in enumerate(mine):
                if gradient and isinstance(module, FSDPModule):
                    last = i == len(mine) - 1
                    module.set_requires_gradient_sync(last or self.reduce_every_pass)
                    # on a CPU to gather is to cast, which costs more than the room; the optimizer
                    # makes the copies stale
                    module.set_reshard_after_backward(last or not self.platform.is_cpu)
                yield to_tensors(batch, sequences, self.device, packed=self.packed)

    def _on_device(self, row_T: NDArray[Any]) -> Tensor:
        row = torch.from_numpy(np.ascontiguousarray(row_T))
        return (row.to(self.sums) if row.dtype == torch.float64 else row).to(self.device)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """[T] the policy's log-prob of every loss token of the batch (0 elsewhere) in the master
        dtype, whole on every rank."""
        return self._per_token(
            batch, self.policy, lambda micro: self.policy(micro, None, None, temperature)[1].logp
        )

    def canary(self, seed: int) -> Canary:
        """That of the weights of now."""
        model, spec = self.policy.model, self.spec
        return canary_of(seed, canaries.squares(model, spec.rank, spec.world, self.device))

    def canary_logprobs(
        self, batch: Batch, canary: Canary, left_out: Sequence[str] = ()
    ) -> list[NDArray[Any]]:
        """[T] as `logprobs`, of the canary, and then for each name of it without that tensor."""
        model, rank, world = self.policy.model, self.spec.rank, self.spec.world
        with canaries.changed(model, canary, rank, world):
            found = [self.logprobs(batch)]
            for name in left_out:
                canaries.change(model, canary, rank, world, back=True, only=name)
                found.append(self.logprobs(batch))
                canaries.change(model, canary, rank, world, only=name)
        return found

    def reference_logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """The same of the reference."""
        reference = self.reference
        assert reference is not None, "this stage has no reference"
        return self._per_token(
            batch, reference, lambda micro: reference(micro, None, None, temperature)[1].logp
        )

    def teacher_logprobs(self, batch: Batch, temperature: float = 1.0) -> NDArray[Any]:
        """The same of each sequence's teacher, 0 where it has none."""

        def look(own: Batch, teacher: Teacher) -> NDArray[Any]:
            return self._per_token(
                own, teacher, lambda micro: teacher(micro, None, None, temperature)[1].logp
            )

        return sampled_logprobs(self.teachers, batch, look)

    def values(self, batch: Batch) -> NDArray[Any]:
        """[T] the critic's estimate before every loss token of the batch (0 elsewhere), whole on
        every rank."""
        assert self.critic is not None, "this stage has no critic"
        return self._per_token(batch, self.critic.module, self.critic.module)

    @torch.no_grad()
    def _per_token(
        self, batch: Batch, module: nn.Module, look: Callable[[MicroBatchTensors], Tensor]
    ) -> NDArray[Any]:
        from torch.distributed.fsdp import FSDPModule

        values_T = torch.zeros(batch.num_tokens, dtype=self.master, device=self.device)
        for micro in self._micro_batches(batch, module, gradient=False):
            values_T[micro.index_n] = look(micro).to(self.master)
        for part in module.modules():
            # without a backward pass gathered copies would stay, and go stale at the next step
            if isinstance(part, FSDPModule):
                part.reshard()
        dist.all_reduce(values_T)
        return values_T.cpu().numpy()

    def take_weights(self) -> None:
        """Copies this rank's shard aside, as the next version to be published."""
        self.publisher.take(
            shards_of(self.policy.model, self.dtype, self.spec.rank, self.spec.world)
        )

    # Those below may run in another thread than the rest, while it makes its next step.

    def publish_part(self, whole: bool) -> Parts:
        """How this rank's shard changed since the last version, for rank 0."""
        return self.publisher.part(whole=whole)

    def publish(self, order: PublishRequest, *others: Parts) -> Published:
        """Rank 0: what was taken, handed to the transport."""
        return self.publisher.publish(order, others)

    def meet(self, workers: int, timeout: float, backend: str, ranks: int) -> BroadcastGroup:
        """Rank 0: a new group for broadcasts to so many workers' engines."""
        return self.publisher.meet(self.platform.device, workers, timeout, backend, ranks)

    def broadcast(self) -> None:
        """Rank 0: sends what was last published to the engines that wait for it."""
        self.publisher.broadcast()

    def snapshot(self) -> int:
        """Copies what a checkpoint holds aside, between two steps; bytes on this rank."""
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
        """Writes what was copied aside, in another thread than the rest: the model in Hugging Face
        format under `folder`, and what training goes on from under `folder/learner`."""
        taken, self._taken = self._taken, None
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
        """Both, one after the other."""
        self.snapshot()
        self.write(folder)

    def restore(self, folder: str) -> None:
        """Goes on from what `write` wrote, possibly with another number of ranks."""
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


def token_means(sums: dict[str, float], batch: Batch, loss: BatchLoss) -> dict[str, float]:
    """Metrics from their sums over the tokens of the passes. The terms of the loss are sums
    already, but for the entropy, which sequences that were left out have too; the others are means
    over the tokens that train. `actor/nonfinite_logp` and the clip fractions of a loss that cannot
    clip tokens left out are shares of more than these."""
    passed = max(1, int(batch.loss_mask_T.sum()))
    counted = sums.pop(COUNTED, 0.0) or float(passed)
    every = counted + batch.num_loss_tokens - passed if loss.clips_by_advantage else counted
    found = {}
    for name, total in sums.items():
        if name in PARTS:
            found[name] = total / batch.share if name == "actor/entropy" else total
        elif name in ("actor/nonfinite_logp", "actor/head_recomputed"):
            found[name] = total / passed
        else:
            found[name] = total / (every if name in CLIPPED else counted)
    return found
