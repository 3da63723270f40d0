"""How `emberl bench` takes times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...kernels.platform import Platform


def seconds(run: Callable[[], object], wait: Callable[[], object], rounds: int) -> float:
    """The median of `rounds` runs after one that does not count, each until the device has done
    it."""
    taken = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def waiting(target: Platform) -> Callable[[], object]:
    """What returns once the device has done all that it was given."""
    return (lambda: None) if target.is_cpu else torch.accelerator.synchronize
