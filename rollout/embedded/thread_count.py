"""How many threads a decoding step is worth: sharing out a short one costs more than it saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHARE = 1 << 29
"""Multiply-adds of a step that are worth a thread: about what one core does in the time that waking
others for each of a layer's operators takes."""


def worth(weights: int, rows: int, most: int) -> int:
    """Threads for a step of `rows` tokens through `weights` weights, of `most` that there are. It
    depends on nothing that changes while an engine runs, so neither does the order of its sums."""
    return max(1, min(most, weights * rows // SHARE))


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Runs torch's operators of the calling thread on `count` threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
