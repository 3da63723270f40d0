"""A sharded model with its optimizer and learning-rate schedule, updated, saved and restored as
one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..config.load import OptimConfig
from . import checkpoint
from .rates import learning_rate
from .shards import Shards


def shard(
    module: nn.Module,
    parts: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute: torch.dtype,
    *,
    device: torch.device,
    master: torch.dtype,
    offload: bool = False,
    keep: bool = False,
) -> None:
    """Shards `parts`, then the rest of `module`, by FSDP2. Each part is moved to the device and
    cast to `master` just before it is sharded, so that no device ever holds the whole. Passes
    gather parameters in `compute`, gradients are summed over ranks in `master`. With `offload` the
    shards are in host memory between passes; with `keep` gathered parameters stay until they are
    resharded (`set_reshard_after_backward`, `reshard`)."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import DTensor

    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in [*parts, module]:
        for tensor in part.parameters():
            if not isinstance(tensor, DTensor):  # those of parts are sharded already
                tensor.data = tensor.data.to(device, master)
        sharded: Any = fully_shard(
            part,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=where,
            reshard_after_forward=not keep,
        )
        # summed, not averaged: a token's weight holds the denominator of the whole step
        sharded.set_gradient_divide_factor(1.0)
        # FSDP2 would otherwise ask for PREMUL_SUM, which Gloo does not have
        sharded.set_force_sum_reduction_for_comms(True)


class Trainable:
    """AdamW over the shards of those parameters of `module` that require a gradient."""

    def __init__(self, module: nn.Module, optim: OptimConfig, total_steps: int) -> None:
        self.module: Any = module  # FSDP2 adds its methods to the class of the module
        self.optim = optim
        self.shards = Shards.of(module)
        self.skipped = 0
        """Updates left out because their gradient was not finite."""
        self.optimizer = torch.optim.AdamW(
            self.shards.local,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.scheduler = learning_rate(self.optimizer, optim, max(1, total_steps))

    def update(self, name: str) -> dict[str, float]:
        """One optimizer step with the accumulated gradients; returns its metrics under `name`/. A
        gradient that is not finite changes nothing and is counted: one bad batch must not destroy
        the weights."""
        norm = self.shards.take_gradients(self.optim.grad_clip)
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
        lr = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            f"{name}/grad_norm": norm,
            f"{name}/lr": lr,
            f"{name}/steps_skipped": float(self.skipped),
        }

    def skip(self, updates: int) -> None:
        """Advances the learning-rate schedule by updates without a batch to train on."""
        for _ in range(updates):
            self.scheduler.step()

    def aside(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A copy of the state that `restore` reads: this rank's shards, and the schedule's
        position."""
        state = checkpoint.aside(checkpoint.state_of(self.shards, self.optimizer))
        return state, checkpoint.position_of(self.shards, self.optimizer, self.scheduler)

    def restore(self, folder: Path) -> None:
        checkpoint.load_state(self.shards, self.optimizer, self.scheduler, folder)
