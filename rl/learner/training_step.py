"""The passes of one learner rank over its share of a batch, and the gradients and metrics that a
training step of the policy, and of its critic, forms of them.

Gradients are summed (not averaged) over ranks in float32, since every token's weight already holds
the denominator of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ...kernels import platform
from ..algorithm.losses import CLIPPED, COUNTED, PARTS, BatchLoss, Objective, token_loss
from ..algorithm.offpolicy import mismatch_metrics, worker_mismatch
from ..algorithm.surrogates import value_loss
from ..config.load import OptimConfig
from ..groups import Batch
from . import memory
from .batching import MicroBatch, plan_micro_batches
from .model_loader import ModelLoader
from .policy import MicroBatchTensors, Policy, to_tensors
from .shards import passes
from .shared_prompts import plan_sharing
from .teachers import Teacher, teaching


@dataclass(kw_only=True, slots=True)
class PassSize:
    tokens: int
    """Most tokens of a pass, padding included."""
    reduce_every_pass: bool = False
    """Whether gradients are summed over ranks after every pass instead of after the last one: a
    rank then keeps no unsharded gradients, which for a large model exceed a device's memory."""


def pass_size(models: ModelLoader, policy: Policy, optim: OptimConfig) -> PassSize:
    """The pass size for `optim.micro_batch_tokens`: on a CPU at most what `worth_keeping` allows,
    and for `auto` what fits; the largest for an architecture whose memory is not known. A
    collective. Raises ValueError if the run's longest sequence does not fit."""
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
    if isinstance(given, int):
        # planned by whoever gave it: refused only where all that is free would not do
        memory.check_longest(needed, room, spec.longest)
        tokens = memory.worth_keeping(needed, given, target)
    else:
        tokens = memory.tokens_that_fit(needed, room, longest=spec.longest, largest=largest)
    return PassSize(tokens=tokens, reduce_every_pass=reduce_every_pass)


class RankPasses:
    """Runs any of the rank's models over a batch. Every rank runs the same number of passes."""

    def __init__(self, models: ModelLoader, size: PassSize) -> None:
        self.models = models
        self.size = size
        self.sums = platform.sum_dtype(models.platform.device)
        """The dtype of sums over tokens."""

    def micro_batches(
        self, batch: Batch, module: Any, *, gradient: bool = True
    ) -> Iterator[MicroBatchTensors]:
        """This rank's micro-batches; gradients are summed over ranks with the last one, or with
        each if `reduce_every_pass`."""
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
        """The micro-batches of every rank."""
        models, budget = self.models, self.size.tokens
        if models.shares_prompts:
            copy = models.copied_prompt
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
        """The result of `look` for each loss token, as [T] (0 elsewhere) in the dtype of the master
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
        """The policy's log-probs [T] of the loss tokens (`per_token`)."""
        return self.per_token(
            batch, policy, lambda micro: policy(micro, None, None, temperature)[1].logp
        )

    def on_device(self, row_T: NDArray[Any]) -> Tensor:
        """A row [T] of the batch on the device; float64 becomes the dtype of sums."""
        row = torch.from_numpy(np.ascontiguousarray(row_T))
        return (row.to(self.sums) if row.dtype == torch.float64 else row).to(self.models.device)

    def over_ranks(self, loss: Tensor, totals: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The loss and the named totals, each summed over all ranks."""
        names = sorted(totals)
        stacked = torch.stack([loss, *(totals[name] for name in names)])
        dist.all_reduce(stacked)
        return float(stacked[0]), dict(zip(names, stacked[1:].tolist(), strict=True))


def policy_backward(
    passes: RankPasses,
    policy: Policy,
    batch: Batch,
    objective: Objective,
    teachers: Sequence[Teacher] = (),
) -> tuple[float, dict[str, float], NDArray[Any] | None]:
    """Adds the gradient of the whole batch's loss to the parameters. Returns the loss, the metrics,
    and for losses on samples the policy's own log-probs [T] (else None)."""
    device, sums = passes.models.device, passes.sums
    loss_function = token_loss(
        objective,
        batch,
        device,
        old_logp=batch.old_logp_T,
        reference_logp=batch.reference_logp_T,
    )
    behaviour_T = passes.on_device(batch.behaviour_logp_T)
    totals: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=sums, device=device)
    logp_T = torch.zeros(batch.num_tokens, dtype=sums, device=device)
    for micro in passes.micro_batches(batch, policy):
        shift = behaviour_T[micro.index_n] if objective.on_samples else None
        compared = None
        if objective.distill.on_distributions:
            cut = partial(passes.tensors, batch)
            vocabulary = passes.models.vocabulary
            compared = teaching(teachers, micro, batch, objective, vocabulary, cut)
        part, stats, metrics = policy(micro, loss_function, shift, objective.temperature, compared)
        assert part is not None
        part.backward()
        loss += part.detach()
        logp_T[micro.index_n] = stats.logp.detach().to(sums)
        for name, values in metrics.items():
            total = totals.get(name, torch.zeros_like(loss))
            totals[name] = total + values.detach().to(sums).sum()
    own_T = None
    if objective.on_samples and batch.num_tokens:
        dist.all_reduce(logp_T)
        own_T = logp_T.cpu().numpy()
    value, summed = passes.over_ranks(loss, totals)
    return value, loss_function.metrics | token_means(summed, batch, loss_function), own_T


def critic_backward(
    passes: RankPasses, critic: Any, batch: Batch, clip: float | None
) -> tuple[float, dict[str, float]]:
    """Adds the gradient of the mean of `value_loss` over the batch's loss tokens; returns that mean
    and the metrics."""
    assert batch.values_T is not None and batch.returns_T is not None
    old_T = passes.on_device(batch.values_T)
    targets_T = passes.on_device(batch.returns_T)
    count = max(1, batch.num_loss_tokens)
    loss = torch.zeros((), dtype=passes.sums, device=passes.models.device)
    clipped = torch.zeros_like(loss)
    for micro in passes.micro_batches(batch, critic):
        values = critic(micro)
        at = micro.index_n
        errors, slope, held = value_loss(values.detach(), old_T[at], targets_T[at], clip=clip)
        values.backward(slope.to(values.dtype) / count)
        loss += errors.to(passes.sums).sum() / count
        clipped += held.sum()
    value, sums = passes.over_ranks(loss, {"critic/vf_clipfrac": clipped})
    return value, {name: total / count for name, total in sums.items()}


class EngineMismatch:
    """Metrics of the difference between the engines' policy and the old one, over the batches since
    the last update."""

    def __init__(self) -> None:
        self._rows: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        """For each batch: old and engine's log-probs, loss mask, sequence ids, each [T]."""
        self._workers: list[NDArray[Any] | None] = []

    def add(self, batch: Batch, own_T: NDArray[Any]) -> None:
        """own_T: the policy's log-probs, taken as the old ones if the batch has none."""
        old_T = own_T if batch.old_logp_T is None else batch.old_logp_T
        self._rows.append((old_T, batch.behaviour_logp_T, batch.loss_mask_T, batch.sequence_ids_T))
        self._workers.append(batch.worker_ids_T)

    def take(self) -> dict[str, float]:
        """The metrics of all batches added since the last call."""
        rows, workers = self._rows, self._workers
        self._rows = []
        self._workers = []
        if not rows:
            return {}
        old, behaviour, mask, ids = ([*column] for column in zip(*rows, strict=True))
        starts = np.cumsum([0, *(int(part[-1]) + 1 for part in ids[:-1])])
        numbered = np.concatenate([part + start for part, start in zip(ids, starts, strict=True)])
        known = [row for row in workers if row is not None]
        worker_T = np.concatenate(known) if len(known) == len(workers) else None
        joined = np.concatenate(old), np.concatenate(behaviour), np.concatenate(mask)
        return mismatch_metrics(*joined, numbered) | worker_mismatch(*joined, worker_T)


def token_means(sums: dict[str, float], batch: Batch, loss: BatchLoss) -> dict[str, float]:
    """Metrics from their sums over the tokens of the passes. Terms of the loss remain sums, except
    that the entropy is scaled up to sequences that were left out of the passes. Other metrics are
    means over the tokens that train; `actor/nonfinite_logp` is a share of all loss tokens of the
    passes, and the clip fractions, for a loss that never clips tokens left out, include those in
    the denominator."""
    passed = max(1, int(batch.loss_mask_T.sum()))
    counted = sums.pop(COUNTED, 0.0) or float(passed)
    every = counted + batch.num_loss_tokens - passed if loss.clips_by_advantage else counted
    means = {}
    for name, total in sums.items():
        if name in PARTS:
            means[name] = total / batch.share if name == "actor/entropy" else total
        elif name in ("actor/nonfinite_logp", "actor/head_recomputed"):
            means[name] = total / passed
        else:
            means[name] = total / (every if name in CLIPPED else counted)
    return means
