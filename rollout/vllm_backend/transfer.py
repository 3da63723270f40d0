"""Broadcast of weights from the learners into the engines' own processes, by vLLM's weight-transfer
engines.

    learners, rank 0                                      a rollout worker
                                    <-- ready --          join(version): its engine decodes on
    waits until all workers are
                                    --- go --->           pauses, has the engine's processes join
                                    the group (once) and
    send(version, tensors)          === tensors ==>       receive, proves the digests, resumes

Messages go through a store that the learner keeps, tensors over the devices' fabric: NCCL, or HCCL,
which vllm-ascend puts under NCCL's name; on a CPU over `gloo`. All ranks confirm through the
store first: a rank stuck in a collective can only be killed. A worker that misses a version fetches
it from the object store.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from ...kernels import platform
from ..actors import node_address, own_device
from ..weights.engine_transfer import Broadcast, BroadcastGroup, EngineTransfer
from ..weights.patch import TensorBytes
from ..weights.tensors import as_tensor
from ..weights.transport import TransferError
from . import transfer_api

c10d: Any = torch.distributed  # Any: it exports more than its types say

POLL = 0.01
"""Seconds between two checks of how many workers are ready."""
Send = Callable[[Mapping[str, torch.Tensor]], None]


class GroupMember:
    """A rollout worker's membership in broadcast groups, one at a time."""

    def __init__(self) -> None:
        self._group: BroadcastGroup | None = None
        self._store: Any = None
        self.rank = 0

    def join(self, broadcast: Broadcast, joined: BroadcastGroup | None) -> int:
        """Waits until all workers are ready for this broadcast; returns the rank of this engine's
        first process. Raises TransferError if they are not in time, or if this engine, whose
        processes are in group `joined`, cannot take part."""
        group = broadcast.group
        # twice the learner's deadline, so that it gives up first: after "go" no worker may be gone
        within = timedelta(seconds=2 * broadcast.timeout)
        try:
            if self._group != group:
                self._store = c10d.TCPStore(group.host, group.port, is_master=False, timeout=within)
                self.rank = 1 + (self._store.add(f"{group.group}/engines", 1) - 1) * group.ranks
                self._group = group
            go = f"{group.group}/go/{broadcast.number}"
            if broadcast.number > 0 and joined != group:  # the engine was restarted since
                self._store.set(go, "no")
            self._store.add(f"{group.group}/ready/{broadcast.number}", 1)
            self._store.wait([go], within)
            if self._store.get(go) != b"go":
                raise TransferError(f"an engine has left weight-transfer group {group.group}")
        except RuntimeError as error:  # c10d's errors, and the TransferError above
            self._group = None
            raise TransferError(
                f"weight transfer {broadcast.number} did not begin: {error}"
            ) from error
        return self.rank


class Rendezvous:
    """The learner's side: a store by which groups are formed, one after the other."""

    def __init__(self, device: str, timeout: float, host: str | None = None) -> None:
        """host: the address at which workers reach this process; None: Ray's of its node."""
        self._device = device
        self._groups = 0
        self.host = host or node_address()
        within = timedelta(seconds=timeout)
        self.store = c10d.TCPStore(
            self.host, 0, is_master=True, wait_for_workers=False, timeout=within
        )

    def group(self, workers: int, backend: str, ranks: int = 1) -> BroadcastGroup:
        """A new group of this process and `ranks` processes of each worker's engine."""
        self._groups += 1
        return BroadcastGroup(
            host=self.host,
            port=self.store.port,
            group=self._groups,
            workers=workers,
            device=self._device,
            backend=backend,
            ranks=ranks,
            engine_port=_free_port(self.host),
        )


class Sender:
    """The learners' end of one group; its processes join at the first broadcast."""

    def __init__(self, store: Any, group: BroadcastGroup) -> None:
        """store: that of the `Rendezvous`."""
        self.group = group
        self._store = store
        self._send: Send | None = None

    def send(self, version: EngineTransfer, tensors: Mapping[str, TensorBytes]) -> None:
        """Broadcasts a version; returns when the tensors are sent. Raises TransferError if not all
        workers are ready in time."""
        self._await_workers(version.broadcast)
        if self._send is None:
            self._send = open_group(self.group, version.broadcast.timeout)
        self._send({name: as_tensor(tensors[name]) for name in version.tensors})

    def _await_workers(self, broadcast: Broadcast) -> None:
        group = self.group.group
        workers = self.group.workers
        ready = f"{group}/ready/{broadcast.number}"
        go = f"{group}/go/{broadcast.number}"
        deadline = time.monotonic() + broadcast.timeout
        while (here := self._store.add(ready, 0)) < workers and not self._store.check([go]):
            if time.monotonic() > deadline:
                self._store.set(go, "no")
                raise TransferError(
                    f"{here} of {workers} engines were ready to receive within"
                    f" {broadcast.timeout:g} s"
                )
            time.sleep(POLL)
        if self._store.check([go]):
            raise TransferError(f"an engine has left weight-transfer group {group}")
        self._store.set(go, "go")


def open_group(group: BroadcastGroup, timeout: float) -> Send:
    """Joins the engines' processes in a group, as rank 0; returns a function that broadcasts
    tensors to them."""
    size = 1 + group.workers * group.ranks
    if group.backend != platform.CPU.weight_transfer:
        device = own_device(platform.named(group.device))
        return transfer_api.open_transfer(
            group.backend, group.host, group.engine_port, size, device
        )
    processes = platform.meet(platform.CPU, group.host, group.engine_port, 0, size, timeout)

    def broadcast(tensors: Mapping[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            platform.broadcast(processes, tensor, timeout)

    return broadcast


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
