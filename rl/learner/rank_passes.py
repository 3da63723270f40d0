"""The forward and backward passes of one learner rank over its share of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ...kernels import platform
from ..config.load import OptimConfig
from ..groups import Batch
from . import memory
from .batching import MicroBatch, plan_micro_batches
from .model_loader import ModelLoader
from .policy import MicroBatchTensors, Policy, to_tensors
from .shared_prompts import KEYS, plan_sharing
from .whole import passes


@dataclass(kw_only=True, slots=True)
class PassSize:
    tokens: int
    """Of a pass, padding included."""
    reduce_every_pass: bool = False
    """Whether gradients are summed over ranks after each pass, not after the last: then none of
    them waits whole, which for a large model is more than a device has."""


def pass_size(models: ModelLoader, policy: Policy, optim: OptimConfig) -> PassSize:
    """`optim.micro_batch_tokens` as far as they are worth their room, or what fits; an architecture
    whose need is not known gets the largest. A collective on accelerators and for `auto`."""
    given = optim.micro_batch_tokens
    target, spec = models.platform, models.spec
    largest = given if isinstance(given, int) else memory.largest_pass(target)
    if models.flops is None:
        return PassSize(tokens=largest)
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    parameters = sum(size for size, _ in sizes)
    need = partial(
        memory.need,
        models.flops,
        parameters=parameters,
        trained=sum(size for size, trained in sizes if trained),
        world=spec.world,
        dtype=models.dtype,
        attention=models.attention,
        checkpointing=spec.model.gradient_checkpointing,
        fused=models.fused and target.is_cpu,
    )
    if isinstance(given, int) and target.is_cpu:
        return PassSize(tokens=memory.worth_keeping(need(), given, target))
    free = torch.tensor(memory.free_memory(target, models.device), device=models.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)  # every rank must cut the same passes
    room = int(free) // (spec.world if target.is_cpu else 1)
    needed = need()
    reduce_every_pass = False
    if not target.is_cpu:
        needed = need(resident=True)
        reduce_every_pass = not memory.fits(needed, room)
        if reduce_every_pass:
            gathered = memory.gathered_at_once(models.flops, parameters)
            needed = need(resident=True, gathered=gathered)
    tokens = largest
    if not isinstance(given, int):
        tokens = memory.tokens_that_fit(needed, room, longest=memory.SMALLEST, largest=largest)
    return PassSize(tokens=tokens, reduce_every_pass=reduce_every_pass)


class RankPasses:
    """Runs any of the rank's models over a batch. Every rank makes as many passes as any other."""

    def __init__(self, models: ModelLoader, size: PassSize) -> None:
        self.models = models
        self.size = size
        self.sums = platform.sum_dtype(models.platform.device)
        """The dtype of sums over tokens."""

    def micro_batches(
        self, batch: Batch, module: Any, *, gradient: bool = True
    ) -> Iterator[MicroBatchTensors]:
        """This rank's passes; gradients go over to the other ranks with the last one."""
        from torch.distributed.fsdp import FSDPModule

        models = self.models
        mine = self.plan(batch)[models.spec.rank]
        with passes(module):
            for i, sequences in enumerate(mine):
                if gradient and isinstance(module, FSDPModule):
                    last = i == len(mine) - 1
                    module.set_requires_gradient_sync(last or self.size.reduce_every_pass)
                    # on a CPU to gather is to cast, which costs more than the room; the optimizer
                    # makes the copies stale
                    module.set_reshard_after_backward(last or not models.platform.is_cpu)
                yield self.tensors(batch, sequences)

    def plan(self, batch: Batch) -> list[list[MicroBatch]]:
        """The passes of every rank."""
        models, budget = self.models, self.size.tokens
        if models.shares_prompts:
            copy = KEYS if models.fused and models.platform.is_cpu else 1.0
            return plan_sharing(batch, models.spec.world, budget, models.flops, copy=copy)
        lengths = batch.sequence_lengths
        return plan_micro_batches(
            lengths,
            models.spec.world,
            budget,
            packed=models.packed,
            costs=None if models.flops is None else [models.flops.sequence(n) for n in lengths],
        )

    def tensors(self, batch: Batch, sequences: tuple[int, ...]) -> MicroBatchTensors:
        """Some sequences of the batch as one micro-batch on the device."""
        models = self.models
        return to_tensors(
            batch,
            sequences,
            models.device,
            packed=models.packed,
            share_prompts=models.shares_prompts,
        )

    @torch.no_grad()
    def per_token(
        self, batch: Batch, module: nn.Module, look: Callable[[MicroBatchTensors], Tensor]
    ) -> NDArray[Any]:
        """[T] what `look` gives for each loss token (0 elsewhere) in the dtype of the master
        weights, whole on every rank."""
        from torch.distributed.fsdp import FSDPModule

        models = self.models
        values_T = torch.zeros(batch.num_tokens, dtype=models.master, device=models.device)
        for micro in self.micro_batches(batch, module, gradient=False):
            values_T[micro.index_n] = look(micro).to(models.master)
        for part in module.modules():
            # without a backward pass gathered copies would stay, and go stale at the next step
            if isinstance(part, FSDPModule):
                part.reshard()
        dist.all_reduce(values_T)
        return values_T.cpu().numpy()

    def logprobs(self, batch: Batch, policy: Policy, temperature: float) -> NDArray[Any]:
        """[T] the policy's log-prob of every loss token, as `per_token`."""
        return self.per_token(
            batch, policy, lambda micro: policy(micro, None, None, temperature)[1].logp
        )

    def on_device(self, row_T: NDArray[Any]) -> Tensor:
        """A row of the batch, float64 in the dtype of sums."""
        row = torch.from_numpy(np.ascontiguousarray(row_T))
        return (row.to(self.sums) if row.dtype == torch.float64 else row).to(self.models.device)

    def over_ranks(self, loss: Tensor, totals: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The loss and the named totals, each summed over all ranks."""
        names = sorted(totals)
        stacked = torch.stack([loss, *(totals[name] for name in names)])
        dist.all_reduce(stacked)
        return float(stacked[0]), dict(zip(names, stacked[1:].tolist(), strict=True))
