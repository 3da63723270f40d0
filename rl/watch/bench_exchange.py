"""One rank of the collective that `bench_device` measures: python -m emberl.rl.watch.bench_exchange
DEVICE RANK RANKS PORT BYTES ROUNDS DEADLINE; rank 0 prints one JSON line."""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from ...kernels import platform
from .bench_timing import seconds, waiting


def exchange(
    device: str, rank: int, ranks: int, port: int, size: int, rounds: int, deadline: float
) -> dict[str, object]:
    """Bytes a second of an all-reduce and a broadcast; `error` if the sum is wrong."""
    target = platform.named(device)
    platform.set_threads(1)
    where = platform.device_of_process(target, 0 if target.is_cpu else rank)
    dist.init_process_group(
        target.collective,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=deadline),
    )
    x = torch.ones(size // 4, device=where)
    wait = waiting(target)
    summed = seconds(lambda: dist.all_reduce(x.fill_(1.0)), wait, rounds)
    right = bool((x == ranks).all())
    sent = seconds(lambda: dist.broadcast(x, 0), wait, rounds)
    dist.destroy_process_group()
    if not right:
        return {"error": "the sum over the ranks is wrong"}
    return {"all_reduce": size / summed, "broadcast": size / sent}


if __name__ == "__main__":
    name, *numbers, last = sys.argv[1:]
    rank, ranks, port, size, rounds = map(int, numbers)
    rates = exchange(name, rank, ranks, port, size, rounds, float(last))
    if rank == 0:
        print(json.dumps(rates), flush=True)
