"""The gradient and the metrics of one training step: of the policy, and of its critic.

Gradients are summed (not averaged) over ranks in float32, since every token's weight already holds
the denominator of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..algorithm.losses import CLIPPED, COUNTED, PARTS, BatchLoss, Objective, token_loss
from ..algorithm.offpolicy import mismatch_metrics, worker_mismatch
from ..algorithm.surrogates import value_loss
from ..groups import Batch
from .policy import Policy
from .rank_passes import RankPasses
from .teachers import Teacher, teaching


def policy_backward(
    passes: RankPasses,
    policy: Policy,
    batch: Batch,
    objective: Objective,
    teachers: Sequence[Teacher] = (),
) -> tuple[float, dict[str, float], NDArray[Any] | None]:
    """Adds the gradient of the whole batch's loss to the parameters. Returns the loss, the metrics,
    and for losses on samples [T] the policy's own log-probs."""
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
    """How far the engines' policy is from the old one, over the batches since the last update."""

    def __init__(self) -> None:
        self._rows: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        """Of each batch: old and engine's log-probs, loss mask, sequence ids."""
        self._workers: list[NDArray[Any] | None] = []

    def add(self, batch: Batch, own_T: NDArray[Any]) -> None:
        """own_T: the policy's log-probs, which are the old ones where the batch has none."""
        old_T = own_T if batch.old_logp_T is None else batch.old_logp_T
        self._rows.append((old_T, batch.behaviour_logp_T, batch.loss_mask_T, batch.sequence_ids_T))
        self._workers.append(batch.worker_ids_T)

    def take(self) -> dict[str, float]:
        """The metrics of what was added, which is forgotten."""
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
    """Metrics from their sums over the tokens of the passes. The terms of the loss are sums
    already, but for the entropy, which sequences that were left out have too; the others are means
    over the tokens that train. `actor/nonfinite_logp` and the clip fractions of a loss that cannot
    clip tokens left out are shares of more than these."""
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
