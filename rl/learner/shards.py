"""One rank's part of a model's parameters: its shards as plain tensors, and whole modules.

Shards are plain tensors because an optimizer over distributed tensors spends more time on
dispatching its many small operations than on doing them.

A single rank on a CPU keeps its modules whole: the same as FSDP2 does for a sharded one, without
the copies that collectives need. Its parameters are the masters, distributed over a mesh of one so
that checkpoints and the optimizer treat them as any other's. During `passes` they are replaced by
copies in the compute dtype, and the gradient of a copy is added to the master's at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...kernels import platform
from ...kernels.transformer.sums import add_to

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
        """The shards of all parameters that require a gradient, or with `frozen` of all."""
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
        """Copies (name, this rank's shard) into the shards of those names; others are skipped."""
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


class _Whole:
    """The parameters of a module as masters and copies, those left out that belong to an earlier
    `_Whole` of one of its parts."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
        from torch.distributed.tensor import DTensor, Shard

        self.places: list[tuple[nn.Module, str, int]] = []
        self.masters: list[Any] = []
        self.copies: list[Tensor] = []
        numbers: dict[int, int] = {}
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in numbers:
                    numbers[id(parameter)] = len(self.masters)
                    self._take(parameter, DTensor.from_local(
                        parameter.detach(), mesh, [Shard(0)], run_check=False
                    ), compute)  # fmt: skip
                number = numbers[id(parameter)]
                self.places.append((owner, name, number))
                setattr(owner, name, self.masters[number])

    def _take(self, parameter: nn.Parameter, distributed: Any, compute: torch.dtype) -> None:
        master: Any = nn.Parameter(distributed, requires_grad=parameter.requires_grad)
        copy = nn.Parameter(parameter.detach().to(compute))  # of one dtype they share their memory
        room: list[Any] = []  # the gradient's, kept: freed and taken anew it would scatter the heap
        self.masters.append(master)
        self.copies.append(copy)

        def collect(copy: Tensor) -> None:
            """Moves a copy's gradient to the master, as soon as a pass has formed it."""
            assert copy.grad is not None
            if master.grad is None:
                if not room:
                    local = master.to_local()
                    room.append(Shards.like(master, torch.empty_like(local)))
                room[0].to_local().copy_(copy.grad)
                master.grad = room[0]
            else:
                add_to(master.grad.to_local(), copy.grad)
            copy.grad = None

        register: Any = copy.register_post_accumulate_grad_hook  # untyped in torch
        register(collect)

    def enter(self) -> None:
        with torch.no_grad():
            for master, copy in zip(self.masters, self.copies, strict=True):
                copy.copy_(master.to_local())
                copy.requires_grad_(master.requires_grad)
        self._place(self.copies)

    def leave(self) -> None:
        self._place(self.masters)

    def _place(self, parameters: list[Any]) -> None:
        for owner, name, number in self.places:
            owner._parameters[name] = parameters[number]


def keep_whole(module: nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Makes the parameters of `module` masters of their dtype, with copies in `compute` for
    `passes`; those that are masters already stay."""
    vars(module)["_whole"] = _Whole(module, mesh, compute)


@contextmanager
def passes(module: nn.Module) -> Iterator[None]:
    """The context for forward and backward passes of a module: puts the copies of modules kept
    whole in place; does nothing for others."""
    parts = [vars(part)["_whole"] for part in module.modules() if "_whole" in vars(part)]
    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.leave)
            part.enter()
        yield
