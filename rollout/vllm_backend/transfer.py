"""Weights from the learners into the engines' own processes, through the weight-transfer engines that vLLM has.

    learners, rank 0                                      a rollout worker
                                    <-- ready --          come(place): its engine decodes on
    waits until all workers are
                                    --- go --->           pauses, has the engine's processes join the group (once) and
    send(place, tensors)            === tensors ==>       receive, proves the digests, resumes

Words go through the store of `collective.Meeting`, tensors through the devices' fabric: NCCL, or HCCL, which vllm-ascend puts
under NCCL's name; on a CPU through gloo (`vllm_gloo`). Nobody enters a collective before everybody said that it will, as one
that waits in there for somebody who never comes has to be killed. Who misses a version has it the parcel's way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from ...kernels import platform
from ..embedded.model import TORCH_DTYPES
from ..weights.broadcast import Ticket
from ..weights.patch import TensorBytes
from ..weights.transport import TransferError
from . import compat as vllm_compat
from .shared_memory import Layout

c10d: Any = torch.distributed  # it exports more than its types say

POLL = 0.01
"""Seconds between two looks at how many workers are ready."""
Send = Callable[[Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InEngines:
    """One version on its way into the engines' processes: the next broadcast of a group."""

    ticket: Ticket
    number: int
    """Of the broadcast within its group, from 0."""
    timeout: float
    """Seconds, before a worker has the version another way."""
    tensors: Layout
    """In the order in which they are sent."""
    digests: Mapping[str, str]

    @property
    def described(self) -> Layout:
        """With torch's names of the dtypes."""
        return {name: (str(TORCH_DTYPES[dtype])[6:], shape) for name, (dtype, shape) in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * TORCH_DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Transfer:
    """What an engine has to know to receive a version."""

    place: InEngines
    rank: int
    """In the group, of the first of the engine's processes; the others follow it."""
    instead: Callable[[], Mapping[str, TensorBytes]]
    """Has the tensors another way; to be called in a thread."""


class Seat:
    """A rollout worker's place in the groups that it hears of."""

    def __init__(self) -> None:
        self._ticket: Ticket | None = None
        self._store: Any = None
        self.rank = 0

    def come(self, place: InEngines, joined: Ticket | None) -> int:
        """Waits until all workers are ready for this broadcast; the rank of this engine's first process. `TransferError` if
        they are not in time, or if this engine (whose processes are in group `joined`) cannot take part."""
        ticket = place.ticket
        within = timedelta(seconds=2 * place.timeout)  # the learner gives up first: after its "go" nobody may be gone
        try:
            if self._ticket != ticket:
                self._store = c10d.TCPStore(ticket.host, ticket.port, is_master=False, timeout=within)
                self.rank = 1 + (self._store.add(f"{ticket.group}/engines", 1) - 1) * ticket.ranks
                self._ticket = ticket
            go = f"{ticket.group}/go/{place.number}"
            if place.number > 0 and joined != ticket:  # the engine was started anew since
                self._store.set(go, "no")
            self._store.add(f"{ticket.group}/ready/{place.number}", 1)
            self._store.wait([go], within)
            if self._store.get(go) != b"go":
                raise TransferError(f"an engine has left weight-transfer group {ticket.group}")
        except RuntimeError as error:  # c10d's; also TransferError
            self._ticket = None
            raise TransferError(f"weight transfer {place.number} did not begin: {error}") from error
        return self.rank


class Sender:
    """The learners' end of one group; opened by its first broadcast."""

    def __init__(self, store: Any, ticket: Ticket) -> None:
        """store: `collective.Meeting`'s."""
        self.ticket, self._store = ticket, store
        self._send: Send | None = None

    def send(self, place: InEngines, tensors: Mapping[str, TensorBytes]) -> None:
        """Returns when the tensors have left; TransferError if not all workers came."""
        self._call_together(place)
        if self._send is None:
            self._send = open_group(self.ticket, place.timeout)
        self._send({name: as_tensor(tensors[name]) for name in place.tensors})

    def _call_together(self, place: InEngines) -> None:
        group, workers = self.ticket.group, self.ticket.workers
        ready, go = f"{group}/ready/{place.number}", f"{group}/go/{place.number}"
        deadline = time.monotonic() + place.timeout
        while (here := self._store.add(ready, 0)) < workers and not self._store.check([go]):
            if time.monotonic() > deadline:
                self._store.set(go, "no")
                raise TransferError(f"{here} of {workers} engines were ready to receive within {place.timeout:g} s")
            time.sleep(POLL)
        if self._store.check([go]):
            raise TransferError(f"an engine has left weight-transfer group {group}")
        self._store.set(go, "go")


def open_group(ticket: Ticket, timeout: float) -> Send:
    """Meets the engines' processes as rank 0; what it returns broadcasts tensors to them."""
    size = 1 + ticket.workers * ticket.ranks
    if ticket.backend != platform.CPU.weight_transfer:
        device = platform.device_of_process(platform.named(ticket.device))
        return vllm_compat.open_transfer(ticket.backend, ticket.host, ticket.engine_port, size, device)
    group = platform.meet(platform.CPU, ticket.host, ticket.engine_port, 0, size, timeout)

    def broadcast(tensors: Mapping[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            platform.broadcast(group, tensor, timeout)

    return broadcast


def as_tensor(tensor: TensorBytes) -> torch.Tensor:
    """A view of its bytes."""
    dtype = TORCH_DTYPES[tensor.dtype]
    if not tensor.data.size:  # torch views nothing as nothing else
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.from_numpy(tensor.data).view(dtype).view(tensor.shape)


__all__ = ["InEngines", "Seat", "Send", "Sender", "Transfer", "as_tensor", "open_group"]
