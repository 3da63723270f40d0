"""The learners' side of a canary: their own weights changed in place as the engines change theirs,
and taken back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...rollout.weights.canary import Canary, alter
from .lora import merged_shards
from .publisher import first_row

_BASE, _LORA_A, _LORA_B = ".base_layer.", ".lora_A.", ".lora_B."


@torch.no_grad()
def squares(
    model: nn.Module, rank: int, world: int, device: torch.device
) -> dict[str, tuple[tuple[int, ...], float]]:
    """name -> (shape, sum of squares) of every weight that is served; a collective."""
    names, shapes, sums = [], [], []
    for name, shape, local in merged_shards(model, rank, world):
        names.append(name)
        shapes.append(shape)
        sums.append(local.double().square().sum().to(device))
    totals = torch.stack(sums)
    dist.all_reduce(totals)
    return dict(zip(names, zip(shapes, totals.tolist(), strict=True), strict=True))


@contextmanager
def changed(model: nn.Module, canary: Canary, rank: int, world: int) -> Iterator[None]:
    """A context in which the model's weights are the canary's. Raises RuntimeError if they could
    not be restored bit for bit."""
    before = _sums(model)
    change(model, canary, rank, world)
    try:
        yield
    finally:
        change(model, canary, rank, world, back=True)
        after = _sums(model)
    wrong = [name for name in before if before[name] != after[name]]
    if wrong:
        raise RuntimeError(
            f"{wrong[0]} is not what it was before the canary: it has elements so small that they"
            " cannot be scaled and scaled back; set sync.canary=false"
        )


@torch.no_grad()
def change(
    model: nn.Module,
    canary: Canary,
    rank: int,
    world: int,
    *,
    back: bool = False,
    only: str | None = None,
) -> None:
    """Changes every weight in place, or `only` that one; `back` undoes it. Of an adapted weight,
    W + scale * B A, the base gets both signs, B those of the rows and A those of the columns."""
    for name, parameter in model.named_parameters():
        served = _served(name)
        if only is not None and served != only:
            continue
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        count = parameter.shape[0] if parameter.dim() else 1
        rows = (first_row(tuple(parameter.shape), rank, world), count)
        if _LORA_A in name:  # [rank, in]: the whole's columns
            alter(local, served, canary, back=back, axis="columns")
        elif _LORA_B in name:  # [out, rank]: the whole's rows
            alter(local, served, canary, back=back, axis="rows", rows=rows)
        else:
            alter(local, served, canary, back=back, rows=rows)


def _served(name: str) -> str:
    """The served name of the weight that this parameter is, or is a part of."""
    for part in (_LORA_A, _LORA_B):
        if part in name:
            return name.partition(part)[0] + ".weight"
    return name.replace(_BASE, ".")


def _sums(model: nn.Module) -> Mapping[str, int]:
    """name -> the sum of the bits of this rank's shard, as integers."""
    sums = {}
    for name, parameter in model.named_parameters():
        local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        bits = local.detach().view(torch.int64 if local.dtype == torch.float64 else torch.int32)
        sums[name] = int(bits.sum())
    return sums
