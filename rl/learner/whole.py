"""A module that one rank has all of, on a CPU: what FSDP2 does for it without the copies that
collectives need.

Its parameters are the masters, distributed over a mesh of one so that checkpoints and the optimizer
treat them as any other's. During passes copies in the dtype of the passes stand in their place, and
what a backward pass says of a copy is added to the master's gradient at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...kernels.transformer.sums import add_to
from .shards import Shards


class _Whole:
    """The parameters of a module that no part of it has taken over before."""

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
            """As soon as a pass has formed the gradient of a copy."""
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
    """The parameters of `module` that are no master yet become masters of their dtype, with copies
    in `compute` for `passes`."""
    vars(module)["_whole"] = _Whole(module, mesh, compute)


@contextmanager
def passes(module: nn.Module) -> Iterator[None]:
    """Forward and backward passes of a module that is kept whole run in here; any other is left to
    itself."""
    parts = [vars(part)["_whole"] for part in module.modules() if "_whole" in vars(part)]
    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.leave)
            part.enter()
        yield
