"""Compiled loops on as many threads as torch uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

Part = TypeVar("Part")
FEW_ROWS = 128
"""Fewer rows than this are not worth a second thread."""


def bits(tensor: Tensor) -> NDArray[Any]:
    """A contiguous bfloat16 tensor as a uint16 array that shares its memory. torch cannot resize
    that memory afterwards: never pass a parameter, whose gathered copy FSDP frees by resizing."""
    return tensor.detach().view(torch.uint16).numpy()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads each run torch's operations on one core, without gradients."""
    started = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        # a thread's own setting: what runs here are the insides of autograd functions
        torch.set_grad_enabled(False)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="elements", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # threads yet to come take the number that was set last
    return pool


def over_rows(count: int, part: Callable[[int, int, int], None]) -> None:
    """Calls part(index, start, stop) for ranges of `count` rows, one on each of torch's threads."""
    threads = torch.get_num_threads()
    if threads == 1 or count < FEW_ROWS:
        part(0, 0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(part, range(threads), edges, edges[1:]))


def over_parts(parts: Sequence[Part], work: Callable[[Part], None]) -> None:
    """Calls work(part) for every part, as many at a time as torch has threads."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(part)
        return
    list(_pool(threads).map(work, parts))
