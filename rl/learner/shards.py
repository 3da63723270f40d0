"""A rank's shards of the parameters as plain tensors: an optimizer over distributed tensors spends more time on
dispatching its many small operations than on doing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shards:
    """The sharded parameters by name and, in the same order, this rank's part of each, sharing its memory."""

    parameters: Mapping[str, Any]
    """name -> DTensor parameter."""
    local: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module, *, frozen: bool = False) -> Shards:
        """Of all parameters that require a gradient, or, `frozen`, of all."""
        named = module.named_parameters()
        parameters: dict[str, Any] = {name: p for name, p in named if frozen or p.requires_grad}
        with torch.no_grad():  # without a graph `to_local` is the shard itself, not a view of it
            return cls(parameters=parameters, local=[p.to_local() for p in parameters.values()])

    def take_gradients(self, clip: float) -> float:
        """Moves the gradients to the local shards, scaled so that their global norm is at most `clip`; returns the norm
        before that (the parameters have none afterwards). A norm that is not finite leaves them as they are."""
        for parameter, local in zip(self.parameters.values(), self.local, strict=True):
            local.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None
        gradients = [local.grad for local in self.local if local.grad is not None]
        squares = torch.stack([norm.double() ** 2 for norm in torch._foreach_norm(gradients)]).sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if clip < norm < float("inf"):
            torch._foreach_mul_(gradients, clip / norm)
        return norm

    def copy_from(self, other: Shards, rename: Callable[[str], str] = str) -> None:
        """Takes over the values of another module's shards, sharded alike; `rename` gives the other's name of a parameter,
        and a name that the other has not is left as it is."""
        there = dict(zip(other.parameters, other.local, strict=True))
        with torch.no_grad():
            for name, local in zip(self.parameters, self.local, strict=True):
                if (source := there.get(rename(name))) is not None:
                    local.copy_(source)

    @staticmethod
    def like(parameter: Any, local: Tensor) -> DTensor:
        """`local` as a distributed tensor sharded as `parameter` is."""
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
