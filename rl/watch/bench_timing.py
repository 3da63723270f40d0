"""Timing for `emberl bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...kernels.platform import Platform


def seconds(run: Callable[[], object], wait: Callable[[], object], rounds: int) -> float:
    """The median seconds of `rounds` runs after a warm-up, each until the device is done."""
    taken = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def waiting(target: Platform) -> Callable[[], object]:
    """A function that blocks until the device is idle; on a CPU it returns at once."""
    return (lambda: None) if target.is_cpu else torch.accelerator.synchronize
