"""Micro-batches: which sequences go through a learner rank together.

Sequences are sorted by length and cut so that the padded size of every micro-batch stays within a token budget, then
dealt so that each rank runs the same number of passes (with sharded parameters every pass is a collective) and the
largest pass is as small as that number allows. Loss and gradient do not depend on any of this, since every token's
weight was fixed over the whole step beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MicroBatch = tuple[int, ...]
"""Indices of sequences; empty for a rank that only keeps step with the others."""


def plan_micro_batches(lengths: Sequence[int] | NDArray[np.int64], world: int, budget: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, given the S sequence lengths and the padded tokens that one pass may hold.

    A sequence longer than the budget gets a pass of its own. Every rank gets equally many micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    sizes = [int(lengths[i]) for i in order]
    if not sizes:
        return [[()] for _ in range(world)]
    budget = max(budget, sizes[0])
    rounds = -(-len(_cut(sizes, budget)) // world)
    low, high = sizes[0], budget  # the smallest budget that needs no more passes than that
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) <= rounds * world:
            high = middle
        else:
            low = middle + 1
    pieces: list[MicroBatch] = [tuple(order[a:b]) for a, b in _cut(sizes, low)]
    pieces += [()] * (rounds * world - len(pieces))
    return [pieces[rank::world] for rank in range(world)]


def _cut(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Half-open ranges of a descending list, each of padded size (count times its first, longest) within the budget."""
    ranges, start = [], 0
    for i in range(len(sizes)):
        if (i - start + 1) * sizes[start] > budget and i > start:
            ranges.append((start, i))
            start = i
    ranges.append((start, len(sizes)))
    return ranges
