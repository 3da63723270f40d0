"""A rank's shards of the parameters as plain tensors: an optimizer over distributed tensors spends
more time on dispatching its many small operations than on doing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels import platform

if TYPE_CHECKING:  # as in `checkpoint`
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shards:
    """The sharded parameters by name and, in the same order, this rank's part of each, sharing its
    memory."""

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
        """Moves the gradients to the local shards, scaled so that their global norm is at most
        `clip`; returns the norm before that (the parameters have none afterwards). A norm that is
        not finite leaves them as they are."""
        for parameter, local in zip(self.parameters.values(), self.local, strict=True):
            local.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None
        gradients = [local.grad for local in self.local if local.grad is not None]
        norms = torch._foreach_norm(gradients)
        wide = platform.sum_dtype(norms[0].device.type)
        squares = torch.stack([norm.to(wide) ** 2 for norm in norms]).sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if clip < norm < float("inf"):
            torch._foreach_mul_(gradients, clip / norm)
        return norm

    def copy_from(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over this rank's part of parameters by name, sharded alike; names that are not ours
        are passed over."""
        ours = dict(zip(self.parameters, self.local, strict=True))
        with torch.no_grad():
            for name, value in values:
                if name in ours:
                    ours[name].copy_(value)

    @staticmethod
    def like(parameter: Any, local: Tensor) -> DTensor:
        """`local` as a distributed tensor sharded as `parameter` is."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
