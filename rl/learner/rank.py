"""One learner rank: a Ray actor that owns a device, its shard of the policy and of the optimizer's state.

Parameters are float32 masters sharded by FSDP2; a pass gathers and casts them to the compute dtype, and gradients are
summed (not averaged) over ranks in float32, since every token's weight already holds the denominator of the whole step.
"""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ...kernels import platform
from ...rollout.patches import TensorBytes, WeightPatch, dense_patch
from ..algorithm.losses import Objective, token_loss
from ..config import ModelConfig, OptimConfig
from ..groups import Batch
from . import checkpoint
from .batching import plan_micro_batches
from .policy import MicroBatchTensors, Policy, to_tensors
from .shards import Shards

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """What an actor must know before it meets the others."""

    rank: int
    world: int
    device: str
    """A platform's name, as in `cluster.device`."""
    threads: int
    model: ModelConfig
    timeout: float
    """Seconds after which a collective gives up on a lost peer."""


class LearnerRank:
    """Calls of all ranks must be made in the same order with the same arguments; each returns on every rank."""

    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        self.platform = platform.named(spec.device)
        platform.set_threads(spec.threads)
        self.device = platform.device_of_process(self.platform)
        self.dtype = platform.compute_dtype(spec.model.dtype, self.platform)
        self.steps_skipped = 0

    def address(self) -> str:
        """`host:port` at which rank 0 will wait for the others."""
        host = socket.gethostbyname(socket.gethostname()) if self.spec.world > 1 else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def connect(self, address: str) -> None:
        """Joins the process group; every collective has the deadline of the spec."""
        dist.init_process_group(
            self.platform.collective,
            init_method=f"tcp://{address}",
            rank=self.spec.rank,
            world_size=self.spec.world,
            timeout=timedelta(seconds=self.spec.timeout),
        )

    def load(self, model_path: str) -> None:
        """Reads the model and shards it; the working copies in passes are of the compute dtype."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AutoModelForCausalLM

        attention = self.spec.model.attention
        if attention == "auto":  # eager attention takes its softmax in float32 whatever the model computes in
            attention = "eager" if self.platform.is_cpu and self.dtype != torch.float64 else "sdpa"
        master = torch.float64 if self.dtype == torch.float64 else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=master, attn_implementation=attention)
        if self.spec.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = Policy(model.to(self.device)).train()
        mesh = init_device_mesh(self.platform.device, (self.spec.world,))
        precision = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=master)
        body = getattr(model, model.base_model_prefix)
        for module in [*body.layers, self.policy]:
            fully_shard(module, mesh=mesh, mp_policy=precision)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.model_path = model_path

    def begin_stage(self, optim: OptimConfig, total_steps: int) -> None:
        """A fresh optimizer and learning-rate schedule for `total_steps` steps."""
        from transformers import get_scheduler

        self.optim = optim
        self.shards = Shards.of(self.policy)
        self.optimizer = torch.optim.AdamW(
            self.shards.local,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
        self.scheduler = get_scheduler(
            name, self.optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=max(1, total_steps)
        )

    def step(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """One optimizer step on the whole batch; the same metrics on every rank."""
        start = time.perf_counter()
        loss, metrics = self.backward(batch, objective)
        norm = self.shards.take_gradients(self.optim.grad_clip)
        if math.isfinite(norm):
            self.optimizer.step()
        else:  # one bad batch must not destroy the weights; the count tells whether it stays at one
            self.steps_skipped += 1
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics | {
            "actor/pg_loss": loss,
            "actor/grad_norm": norm,
            "actor/lr": lr,
            "actor/steps_skipped": float(self.steps_skipped),
            "timing_s/update_actor": time.perf_counter() - start,
        }

    def backward(self, batch: Batch, objective: Objective) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the whole batch's loss to the parameters; returns the loss and the metrics."""
        old_logp = batch.old_logp_T
        if objective.needs_old_logp and old_logp is None:
            old_logp = self.logprobs(batch, objective.temperature)
        loss_function = token_loss(objective, batch, self.device, old_logp=old_logp)
        mine = plan_micro_batches(batch.sequence_lengths, self.spec.world, self.optim.micro_batch_tokens)[
            self.spec.rank
        ]
        behaviour_T = torch.from_numpy(np.ascontiguousarray(batch.behaviour_logp_T)).to(self.device)
        totals: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        policy: Any = self.policy  # FSDP2 adds its methods to the class of the module
        for i, sequences in enumerate(mine):
            policy.set_requires_gradient_sync(i == len(mine) - 1)
            micro = to_tensors(batch, sequences, self.device)
            shift = behaviour_T[micro.index_n] if objective.on_samples else None
            part, stats, metrics = self.policy(micro, loss_function, shift, objective.temperature)
            assert part is not None
            part.backward()
            loss += part.detach()
            per_token = dict(metrics)
            if stats.entropy is not None:
                per_token["actor/entropy"] = stats.entropy
            if objective.on_samples:
                per_token |= mismatch(stats.logp.detach(), behaviour_T[micro.index_n])
            for name, values in per_token.items():
                totals[name] = totals.get(name, torch.zeros_like(loss)) + values.detach().double().sum()
                if name == "training/rollout_probs_diff_mean" and len(values):
                    peak = totals.get("max", torch.zeros_like(loss))
                    totals["max"] = torch.maximum(peak, values.max().double())
        loss_value, metrics_found = self._reduce(loss, totals, batch.num_loss_tokens)
        return loss_value, loss_function.metrics | metrics_found

    def _reduce(self, loss: Tensor, totals: dict[str, Tensor], num_loss_tokens: int) -> tuple[float, dict[str, float]]:
        """Sums over ranks; per-token metrics become means over the step's loss tokens."""
        peak = totals.pop("max", torch.zeros_like(loss))
        names = sorted(totals)
        stacked = torch.stack([loss, *(totals[name] for name in names)])
        dist.all_reduce(stacked)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        values = (stacked[1:] / max(1, num_loss_tokens)).tolist()
        means = dict(zip(names, values, strict=True))
        if "training/rollout_probs_diff_mean" in means:
            means["training/rollout_probs_diff_max"] = float(peak)
        return float(stacked[0]), means

    @torch.no_grad()
    def logprobs(self, batch: Batch, temperature: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[T] the policy's log-prob of every loss token of the batch (0 elsewhere), whole on every rank."""
        logp_T = torch.zeros(batch.num_tokens, dtype=torch.float32, device=self.device)
        for sequences in plan_micro_batches(batch.sequence_lengths, self.spec.world, self.optim.micro_batch_tokens)[
            self.spec.rank
        ]:
            micro: MicroBatchTensors = to_tensors(batch, sequences, self.device)
            _, stats, _ = self.policy(micro, None, None, temperature)
            logp_T[micro.index_n] = stats.logp.float()
        self._reshard()
        dist.all_reduce(logp_T)
        return logp_T.cpu().numpy()

    def _reshard(self) -> None:
        """After a pass without backward the gathered working copies would stay, and go stale at the next step."""
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def weights(self, run_id: str, version: int) -> WeightPatch | None:
        """The whole policy in the bytes that engines serve, on rank 0; None on the others."""
        tensors = [(name, self._bytes(tensor)) for name, tensor in checkpoint.full_tensors(self.policy, self.dtype)]
        return dense_patch(run_id, version, tensors) if self.spec.rank == 0 else None

    @staticmethod
    def _bytes(tensor: Tensor) -> TensorBytes:
        data = tensor.detach().cpu().contiguous()
        return TensorBytes(
            dtype=SAFETENSORS_DTYPES[data.dtype], shape=tuple(data.shape), data=data.view(-1).view(torch.uint8).numpy()
        )

    def save(self, folder: str) -> None:
        """The model in Hugging Face format under `folder`, and what training goes on from under `folder/learner`."""
        checkpoint.save_model(self.policy, Path(folder), self.dtype, self.model_path, write=self.spec.rank == 0)
        checkpoint.save_state(self.shards, self.optimizer, self.scheduler, Path(folder) / "learner", self.spec.rank)
        dist.barrier()

    def restore(self, folder: str) -> None:
        """Goes on from what `save` wrote, possibly with another number of ranks."""
        checkpoint.load_state(self.shards, self.optimizer, self.scheduler, Path(folder) / "learner")

    def peak_memory(self) -> int:
        """Bytes."""
        return platform.peak_memory_bytes(self.platform)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def pid(self) -> int:
        return os.getpid()


def mismatch(logp: Tensor, behaviour_logp: Tensor) -> dict[str, Tensor]:
    """Per-token distance between what the learner and the engine say of the same tokens; the k3 form of the divergence
    KL(engine || learner) is never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    log_ratio = logp - behaviour_logp
    return {
        "training/rollout_probs_diff_mean": (logp.exp() - behaviour_logp.exp()).abs(),
        "rollout_corr/kl": -log_ratio,
        "rollout_corr/k3_kl": log_ratio.expm1() - log_ratio,
        "rollout_corr/log_ppl_abs_diff": log_ratio.abs(),
    }
