"""Micro-batches: the division of a batch's sequences into the passes of each learner rank.

Padded passes: sequences are sorted by length and divided so that the padded size of every
micro-batch stays within a token budget, each rank runs the same number of passes (with sharded
parameters every pass is a collective), and the largest pass is as small as that number allows.
Packed passes have no padding to avoid, so sequences are balanced over all passes of all ranks by
their costs, with Karmarkar and Karp's differencing method.

Loss and gradient do not depend on the division, since every token's weight was fixed over the whole
step beforehand.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MicroBatch = tuple[int, ...]
"""Indices of sequences; empty for a rank that runs a pass only to take part in the collectives."""

PACKED_SEQUENCES = 1000
"""Most sequences of a packed pass: attention over packed sequences on NPUs takes about a thousand
of them."""


def plan_micro_batches(
    lengths: Sequence[int] | NDArray[np.int64],
    world: int,
    budget: int,
    *,
    packed: bool = False,
    costs: Sequence[float] | None = None,
    most: int = PACKED_SEQUENCES,
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank, given the S sequence lengths and the tokens (padding
    included) that one pass may hold.

    A sequence longer than the budget gets a pass of its own. Every rank gets equally many
    micro-batches; the costliest come first, and those that run at the same time on different ranks
    cost about the same.

    packed: passes hold sequences one behind the other, not padded to the longest.
    costs: of each sequence, what packed passes are balanced by (None: the lengths);
        `ModelFlops.sequence` has attention's quadratic part.
    most: sequences of a packed pass.
    """
    sizes = [int(length) for length in lengths]
    if not sizes:
        return [[()] for _ in range(world)]
    if packed:
        pieces = _packed(sizes, world, budget, [float(c) for c in costs or sizes], most)
    else:
        pieces = _padded(sizes, world, budget)
    pieces += [()] * (-len(pieces) % world)
    return [pieces[rank::world] for rank in range(world)]


def _padded(lengths: Sequence[int], world: int, budget: int) -> list[MicroBatch]:
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes = [lengths[i] for i in order]
    budget = max(budget, sizes[0])
    rounds = -(-len(_cut(sizes, budget)) // world)
    low, high = sizes[0], budget  # the smallest budget that needs no more passes than that
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) <= rounds * world:
            high = middle
        else:
            low = middle + 1
    return [tuple(order[a:b]) for a, b in _cut(sizes, low)]


def _cut(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Half-open ranges of a descending list, each of padded size (count times its first, longest)
    within the budget."""
    ranges, start = [], 0
    for i in range(len(sizes)):
        if (i - start + 1) * sizes[start] > budget and i > start:
            ranges.append((start, i))
            start = i
    ranges.append((start, len(sizes)))
    return ranges


def _packed(
    lengths: Sequence[int], world: int, budget: int, costs: Sequence[float], most: int
) -> list[MicroBatch]:
    """Passes in descending order of cost, in the smallest multiple of `world` for which a division
    within the budget is found. The smallest that exists is NP-hard to find; best-fit decreasing
    needs at most 11/9 of it and one more."""
    alone = [i for i, length in enumerate(lengths) if length > budget]
    rest = [i for i, length in enumerate(lengths) if length <= budget]
    needed = max(-(-sum(lengths[i] for i in rest) // budget), -(-len(rest) // most))
    rounds = -(-(len(alone) + needed) // world)
    rest_lengths, rest_costs = [lengths[i] for i in rest], [costs[i] for i in rest]
    while (
        packed := _divide(rest_lengths, rest_costs, rounds * world - len(alone), budget, most)
    ) is None:
        rounds += 1
    pieces = [*((i,) for i in alone), *(tuple(rest[i] for i in part) for part in packed)]
    return sorted(pieces, key=lambda piece: -sum(costs[i] for i in piece))


def _divide(
    lengths: Sequence[int], costs: Sequence[float], passes: int, budget: int, most: int
) -> list[list[int]] | None:
    """The first division into at most `passes` passes of which none is too large; None if there is
    none."""
    for parts in _divisions(lengths, costs, passes, budget, most):
        fits = all(sum(lengths[i] for i in part) <= budget and len(part) <= most for part in parts)
        if fits and len(parts) <= passes:
            return parts
    return None


def _divisions(
    lengths: Sequence[int], costs: Sequence[float], passes: int, budget: int, most: int
) -> Iterator[list[list[int]]]:
    """Candidate divisions, best first: balanced by cost; balanced by tokens, which fits more often;
    and unbalanced, but into few passes."""
    yield karmarkar_karp(costs, passes)
    yield karmarkar_karp(lengths, passes)
    yield _best_fit(lengths, budget, most)


def _best_fit(sizes: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Indices of the items in parts, by best-fit decreasing: each item, the longest first, goes
    where it leaves the least room."""
    parts: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        open_parts = [p for p in range(len(parts)) if room[p] >= sizes[i] and len(parts[p]) < most]
        if open_parts:
            best = min(open_parts, key=lambda p: room[p])
            parts[best].append(i)
            room[best] -= sizes[i]
        else:
            parts.append([i])
            room.append(budget - sizes[i])
    return parts


def karmarkar_karp(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Indices of the costs in `bins` parts of nearly equal sums, by the largest differencing method
    (Karmarkar and Karp 1982): the two partial divisions whose sums differ most are laid over each
    other, largest on smallest, until one is left. Its sums never differ by more than the largest
    cost. Parts may have any number of members, none included.
    """
    if not costs:
        return [[] for _ in range(bins)]
    if bins < 1:
        raise ValueError(
            f"bins={bins}, but there are {len(costs)} costs to divide; give at least one bin"
        )
    # (minus the difference between largest and smallest sum, tie-break, the non-empty parts in
    # descending order of sum)
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-c, i, [(c, [i])]) for i, c in enumerate(costs)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, a = heapq.heappop(heap)
        _, order, b = heapq.heappop(heap)
        # these meet an empty part of the other
        a_only, b_only = max(0, bins - len(b)), max(0, bins - len(a))
        both = [
            (a[i][0] + b[bins - 1 - i][0], a[i][1] + b[bins - 1 - i][1])
            for i in range(a_only, len(a))
        ]
        merged = sorted([*a[:a_only], *both, *b[:b_only]], key=lambda part: -part[0])
        smallest = merged[-1][0] if len(merged) == bins else 0
        heapq.heappush(heap, (smallest - merged[0][0], order, merged))
    parts = [sorted(members) for _, members in heap[0][2]]
    return parts + [[] for _ in range(bins - len(parts))]
