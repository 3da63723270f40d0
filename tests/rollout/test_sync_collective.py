"""Broadcasts between processes: all get the same bytes; who does not come is found out within the deadline."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from emberl.rollout.weights.broadcast import InBroadcast, Meeting, Ticket
from emberl.rollout.weights.transport import Link, TransferError

pytestmark = pytest.mark.slow
SIZES = (1000, 7)
WORKER = """
import sys, xxhash
from emberl.rollout.weights.broadcast import InBroadcast, Ticket
from emberl.rollout.weights.transport import Link
link, ticket = Link(timeout=60.0), Ticket(host=sys.argv[1], port=int(sys.argv[2]), group=1, workers=2, device="cpu")
for number, size in enumerate(map(int, sys.argv[3:])):
    place = InBroadcast(ticket=ticket, number=number, size=size, timeout=60.0)
    print(xxhash.xxh3_64_hexdigest(place.fetch(link)), flush=True)
"""


def payload(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, SIZES[number], np.uint8)


def test_everybody_gets_every_broadcast() -> None:
    import xxhash

    meeting = Meeting("cpu", timeout=60.0)
    ticket = meeting.ticket(2)
    command = [sys.executable, "-c", WORKER, ticket.host, str(ticket.port), *map(str, SIZES)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for number in range(2):
            meeting.send(ticket, payload(number))
        wanted = [xxhash.xxh3_64_hexdigest(payload(number)) for number in range(2)]
        assert [process.communicate(timeout=60)[0].split() for process in workers] == [wanted] * 2
    finally:
        for process in workers:
            process.kill()


def test_a_worker_that_never_comes() -> None:
    meeting, start = Meeting("cpu", timeout=2.0), time.monotonic()
    with pytest.raises(TransferError, match="2 of them never came"):
        meeting.send(meeting.ticket(2), payload(0))
    assert time.monotonic() - start < 10
    ticket = Ticket(host="127.0.0.1", port=1, group=1, workers=1, device="cpu")
    with pytest.raises(TransferError, match="did not meet"):
        InBroadcast(ticket=ticket, number=0, size=1, timeout=1.0).fetch(Link(timeout=1.0))
