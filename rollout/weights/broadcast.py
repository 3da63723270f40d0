"""Weights by a collective of the devices: rank 0 of the learners broadcasts a patch's bytes to all workers at once.

For a fast fabric. The group (its number, the learner 0, the workers in the order in which they come) meets at a store that
the learner keeps; a group that lost a member is never used again. Whoever does not get the bytes this way within the
deadline takes them from the parcel's next place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed

from ...kernels import platform
from .patch import Bytes
from .transport import Link, TransferError

c10d: Any = torch.distributed  # it exports more than its types say


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """Where a group meets."""

    host: str
    port: int
    group: int
    """Its number; each meeting is a new one."""
    workers: int
    device: str
    """A platform's name."""
    backend: str = ""
    """The weight-transfer engine of vLLM through which the engines' own processes receive (`native`); empty: the workers'."""
    ranks: int = 1
    """Processes of one engine."""
    engine_port: int = 0
    """Where those meet rank 0 of the learners."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InBroadcast:
    """The next broadcast of a group."""

    ticket: Ticket
    number: int
    """Of the broadcast within its group, from 0."""
    size: int
    timeout: float
    """Seconds, before the parcel's next place is tried."""

    def fetch(self, link: Link) -> Bytes:
        member = link.memory.get("broadcast")
        if not isinstance(member, Member) or member.ticket != self.ticket:
            member = link.memory["broadcast"] = Member(self.ticket, self.timeout)
        data = member.receive(self.number, self.size, self.timeout)
        if link.bucket is not None:
            link.bucket.take(data.nbytes)
        return data


class Member:
    """One process's place in a group; made by a worker when it first hears of it, by the learner with `Meeting`."""

    def __init__(self, ticket: Ticket, timeout: float, *, store: Any = None, rank: int | None = None) -> None:
        self.ticket, self._target = ticket, platform.named(ticket.device)
        self._device = platform.device_of_process(self._target)
        self._done, self._broken = 0, False
        within = timedelta(seconds=timeout)
        try:
            self._store = store or c10d.TCPStore(ticket.host, ticket.port, is_master=False, timeout=within)
            self.rank = self._store.add(f"{ticket.group}/members", 1) if rank is None else rank
            self._store.set(f"{ticket.group}/here/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
            name = f"weights-{ticket.port}-{ticket.group}"
            size = ticket.workers + 1
            self._group = platform.process_group(self._target, self._store, self.rank, size, name, timeout)
        except RuntimeError as error:  # what c10d raises for a peer that is late or gone
            raise TransferError(f"the group of {ticket.workers} workers did not meet: {self._late(error)}") from error

    def send(self, data: Bytes, timeout: float) -> None:
        """The learner's half of a broadcast."""
        self._broadcast(torch.from_numpy(data), timeout)

    def receive(self, number: int, size: int, timeout: float) -> Bytes:
        if number != self._done:
            raise TransferError(f"broadcast {number} is not the group's next, which is {self._done}")
        data = torch.empty(size, dtype=torch.uint8)
        found: Bytes = self._broadcast(data, timeout).cpu().numpy()
        return found

    def _broadcast(self, data: torch.Tensor, timeout: float) -> torch.Tensor:
        if self._broken:
            raise TransferError("the group lost a member before")
        on_device = data.to(self._device)
        self._broken = True  # unless all goes well
        try:
            platform.broadcast(self._group, on_device, timeout)
        except RuntimeError as error:
            raise TransferError(f"a broadcast to {self.ticket.workers} workers failed: {self._late(error)}") from error
        self._broken, self._done = False, self._done + 1
        return on_device

    def _late(self, error: Exception) -> str:
        """Who has not come, if that can be told, and what c10d says."""
        said = str(error).splitlines()[0]
        try:
            ranks = range(1, self.ticket.workers + 1)
            missing = [rank for rank in ranks if not self._store.check([f"{self.ticket.group}/here/{rank}"])]
        except (AttributeError, RuntimeError):  # the store is gone, or was never reached
            return said
        return f"{len(missing)} of them never came ({said})" if missing else said


class Meeting:
    """The learner's side: a store at which groups meet, one after the other."""

    def __init__(self, device: str, timeout: float, host: str | None = None) -> None:
        """host: where the workers reach this process; None: at the address of its machine's name."""
        self._device, self._timeout, self._groups = device, timeout, 0
        self.host = host or socket.gethostbyname(socket.gethostname())
        within = timedelta(seconds=timeout)
        self.store = c10d.TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=within)
        self._member: Member | None = None

    def ticket(self, workers: int, backend: str = "", ranks: int = 1) -> Ticket:
        """Of a new group; backend, ranks: where the engines' own processes receive."""
        self._groups += 1
        self._member = None
        return Ticket(
            host=self.host,
            port=self.store.port,
            group=self._groups,
            workers=workers,
            device=self._device,
            backend=backend,
            ranks=ranks,
            engine_port=_free_port(self.host) if backend else 0,
        )

    def send(self, ticket: Ticket, pieces: Iterable[bytes | memoryview] | Bytes) -> None:
        """Returns when all workers of the ticket have the bytes; TransferError says how many are late."""
        if self._member is None:
            self._member = Member(ticket, self._timeout, store=self.store, rank=0)
        data = pieces if isinstance(pieces, np.ndarray) else np.frombuffer(b"".join(pieces), np.uint8)
        self._member.send(data.copy() if not data.flags.writeable else data, self._timeout)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


__all__ = ["InBroadcast", "Meeting", "Ticket"]
