"""The shifted-exp scheme: loss and gradients of a linear head in three matrix products, on any
device.

For the tokens of a chunk, with E = exp(z') and z' the logits shifted by an estimate of the token's
log-prob (the behaviour log-prob, which a learner already has), the target's column being kept out
of the exponentials:

    s = sum(E) + exp(z'[y])      logp = -log1p(sum(E) / exp(z'[y]))      1 - p = sum(E) / s
    dh = -(g / s) E W + g (1 - p) W[y]      dW = E^T (-(g / s) h), dW[y] += g (1 - p) h

g is the loss's derivative by the log-prob, so E is never normalised nor rewritten, no maximum is
searched, and nothing cancels where p is near 1. E is laid out [V, n]: the shift is then the bias of
the product W h^T, which every BLAS adds before it rounds, and on a CPU both E h and W h^T run at
full speed. A row whose shift turns out to be far off is recomputed, so that the estimate decides
speed and rounding, never the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .head import Head, Transform, accumulator, add_product, not_finite
from .passes import LOWEST, Passes
from .terms import TokenStats
from .tiling import COLUMNS

MAX_SHIFT_ERROR = 40.0
"""Nats by which a shift may be off: float32 and bfloat16 hold e^40 with all their digits."""
RECOMPUTE_ROWS = 512
"""Most rows recomputed at once, in a tile besides the chunk's."""
COMPACT_BELOW = 0.75
"""Rows without a gradient are left out of the products if fewer than this share of rows remains:
only then is the copy cheaper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The operands that all chunks of a call share. `hidden` [N, H], `targets` [N] int64 vocabulary
    ids."""

    hidden: Tensor
    targets: Tensor
    head: Head
    passes: Passes
    entropy: bool
    tile: torch.dtype
    """The dtype of E and of the operands of the products (`head.product_dtype`)."""

    def rows(self, index: Tensor) -> Tensor:
        """Hidden states [n, H] as the products take them."""
        return self.hidden[index].to(self.tile)

    def weights(self, start: int, stop: int) -> Tensor:
        """Vocabulary rows [stop - start, H] as the products take them: a copy of a block at
        most."""
        return self.head.weight[start:stop].to(self.tile)

    @property
    def step(self) -> int:
        """Vocabulary rows of one product. Small on a CPU so that the element pass finds its block
        in the cache."""
        return 4096 if self.hidden.device.type == "cpu" else 32768

    def blocks(self) -> list[tuple[int, int]]:
        rows = self.head.weight.shape[0]
        return [(start, min(start + self.step, rows)) for start in range(0, rows, self.step)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A chunk after its forward product."""

    index: Tensor
    """[n] which of the N tokens."""
    e: Tensor
    """[V, n] E, with 0 at the target; undefined where it was not kept."""
    transform: Transform
    total: Tensor
    """[n] log s; the shift's error in nats."""
    target: Tensor
    """[n] z' of the target."""
    stats: TokenStats
    recomputed: Tensor
    """[n] 1 where the shift was unusable."""


def target_logits(job: Job, index: Tensor) -> Tensor:
    """Raw logits [n] of the targets, each one dot product in float32. Raises ValueError for a row
    that is not finite, before any matrix product."""
    head, wide = job.head, accumulator(job.hidden.dtype)
    local = job.targets[index]
    raw = torch.empty(len(index), dtype=wide, device=job.hidden.device)
    for start in range(0, len(index), 2048):
        part = slice(start, start + 2048)
        torch.sum(
            job.hidden[index[part]].to(wide) * head.weight[local[part]].to(wide), -1, out=raw[part]
        )
    if head.bias is not None:
        raw += head.bias[local].to(wide)
    if not bool(torch.isfinite(raw).all()):
        raise not_finite(job.hidden, int(index[~torch.isfinite(raw)][0]))
    return raw


def forward(
    job: Job, index: Tensor, shift: Tensor, raw: Tensor, buffer: Tensor, *, keep: bool
) -> Scored:
    """Scores the tokens `index` [n] with log-prob estimates `shift` [n] and target logits `raw`
    [n]; E is written to the front of the flat `buffer`, whole if `keep` says that gradients follow,
    else block over block."""
    scored = _forward(job, index, shift, raw, buffer, keep)
    unusable = (~(scored.total.abs() <= MAX_SHIFT_ERROR)).nonzero()[:, 0]
    for start in range(0, len(unusable), RECOMPUTE_ROWS):
        rows = unusable[start : start + RECOMPUTE_ROWS]
        better = _estimate(job, index[rows], raw[rows])
        again = _forward(job, index[rows], better, raw[rows], torch.empty_like(buffer[:0]), keep)
        hopeless = ~(again.total.abs() <= MAX_SHIFT_ERROR)
        if bool(hopeless.any()):
            raise not_finite(job.hidden, int(again.index[hopeless][0]))
        scored = _merge(scored, again, rows, keep)
    return scored


def _forward(
    job: Job, index: Tensor, shift: Tensor, raw: Tensor, buffer: Tensor, keep: bool
) -> Scored:
    head, count, wide = job.head, len(index), raw.dtype
    size = tile_size(job, count, keep)
    e = (buffer if buffer.numel() >= size else buffer.new_empty(size))[:size]
    e = e.view(-1, size // tile_rows(job, keep))[:, :count]
    scale = head.scale(index)
    transform = Transform.around(head, raw, shift, scale, job.tile)
    rows = job.rows(index)
    local = job.targets[index]
    order = torch.argsort(local, stable=True)
    edges = torch.tensor([0, *(stop for _, stop in job.blocks())], device=local.device)
    bounds = torch.searchsorted(local[order], edges).tolist()
    sums = torch.zeros(2 if job.entropy else 1, count, dtype=wide, device=rows.device)
    negated = -transform.raw.to(rows.dtype)
    for number, (start, stop) in enumerate(job.blocks()):
        block = e[start:stop] if keep else e[: stop - start]
        torch.addmm(negated, job.weights(start, stop), rows.t(), out=block)
        here = order[bounds[number] : bounds[number + 1]]
        block[local[here] - start, here] = float("-inf")
        bias = None if head.bias is None else head.bias[start:stop].to(wide)
        job.passes.exp_stats(block, transform, bias, sums[0], sums[1] if job.entropy else None)
    return _scored(index, e, transform, transform.at(raw), sums)


def _scored(index: Tensor, e: Tensor, transform: Transform, target: Tensor, sums: Tensor) -> Scored:
    ratio = sums[0].log() - target  # log of (1 - p) / p
    total = torch.logaddexp(sums[0].log(), target)
    entropy = None
    if len(sums) == 2:
        entropy = (total - sums[1] * torch.exp(-total) - torch.sigmoid(-ratio) * target).clamp(
            min=0
        )
    # softplus is log1p(exp(.)) and does not overflow; past its threshold the difference is below
    # float64's rounding
    stats = TokenStats(
        logp=-functional.softplus(ratio, threshold=60.0),
        one_minus_p=torch.sigmoid(ratio),
        entropy=entropy,
    )
    return Scored(
        index=index, e=e, transform=transform, total=total, target=target, stats=stats,
        recomputed=torch.zeros_like(total),
    )  # fmt: skip


def _estimate(job: Job, index: Tensor, raw: Tensor) -> Tensor:
    """Log-probs [n] by a running log-sum-exp over blocks: one more product, for the rows that need
    it."""
    head = job.head
    transform = Transform.around(head, raw, torch.zeros_like(raw), head.scale(index), job.tile)
    rows = job.rows(index).t()
    negated = -transform.raw.to(rows.dtype)
    total = torch.full_like(raw, float("-inf"))
    for start, stop in job.blocks():
        z = torch.addmm(negated, job.weights(start, stop), rows).to(raw.dtype) + transform.raw
        if head.bias is not None:
            z += head.bias[start:stop, None].to(raw.dtype)
        total = torch.logaddexp(total, torch.logsumexp(transform.at(z), 0))
    return (transform.at(raw) - total).nan_to_num(nan=0.0, neginf=LOWEST).clamp(max=0.0)


def _merge(scored: Scored, again: Scored, rows: Tensor, keep: bool) -> Scored:
    """`scored` with the columns `rows` replaced, in place where the tensors are this module's
    own."""
    if keep:
        scored.e[:, rows] = again.e
    old, new = scored.transform, again.transform
    transform = Transform(
        scale=old.scale,
        raw=old.raw.index_copy(0, rows, new.raw),
        level=old.level.index_copy(0, rows, new.level),
        inner=old.inner,
    )
    pairs = [
        (scored.stats.logp, again.stats.logp),
        (scored.stats.one_minus_p, again.stats.one_minus_p),
    ]
    if scored.stats.entropy is not None and again.stats.entropy is not None:
        pairs.append((scored.stats.entropy, again.stats.entropy))
    pairs += [(scored.total, again.total), (scored.target, again.target)]
    for whole, part in pairs:
        whole.index_copy_(0, rows, part)
    scored.recomputed[rows] = 1.0
    return Scored(
        index=scored.index, e=scored.e, transform=transform, total=scored.total,
        target=scored.target, stats=scored.stats, recomputed=scored.recomputed,
    )  # fmt: skip


class Gradients:
    """The gradients of one call, filled chunk by chunk. `None` stands for an operand that needs
    none.

    One chunk writes the weight's gradient straight in the weight's dtype, rounded once; several add
    up in float32.
    """

    def __init__(self, job: Job, needs: tuple[bool, bool, bool], chunks: int) -> None:
        weight, wide = job.head.weight, accumulator(job.hidden.dtype)
        self.hidden = torch.zeros_like(job.hidden) if needs[0] else None
        self.bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if needs[2] else None
        self.weight: Tensor | None = None
        self.fresh = True
        if needs[1]:
            make = torch.empty_like if chunks else torch.zeros_like
            self.weight = make(weight, dtype=weight.dtype if chunks <= 1 else wide)

    def finished(self, job: Job) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients in the operands' dtypes."""
        weight = None if self.weight is None else self.weight.to(job.head.weight.dtype)
        bias = (
            None
            if self.bias is None or job.head.bias is None
            else self.bias.to(job.head.bias.dtype)
        )
        return self.hidden, weight, bias

    def add_weight(self, start: int, stop: int, e: Tensor, rows: Tensor) -> None:
        """Adds E[start:stop] rows for E [stop - start, k] and rows [k, H]."""
        assert self.weight is not None
        add_product(self.weight[start:stop], e, rows, fresh=self.fresh)

    def add_targets(self, ids: Tensor, rows: Tensor) -> None:
        """Adds `rows` [k, H] (in full precision) at the vocabulary entries `ids` [k], repeated ones
        summed before they are rounded."""
        assert self.weight is not None
        unique, places = torch.unique(ids, return_inverse=True)
        total = rows.new_zeros(len(unique), rows.shape[1]).index_add_(0, places, rows)
        self.weight[unique] = (self.weight[unique].to(rows.dtype) + total).to(self.weight.dtype)


def backward(
    job: Job, scored: Scored, dlogp: Tensor, dentropy: Tensor | None, grads: Gradients
) -> None:
    """Adds the gradients of a chunk whose loss has the derivatives `dlogp` and `dentropy` [n];
    consumes `scored.e`."""
    row, target = _factors(job, scored, dlogp, dentropy)
    keep = _kept(row)
    index, hidden = scored.index, job.hidden[scored.index]
    if keep is not None:
        row, target, index, hidden = row[keep], target[keep], index[keep], hidden[keep]
    wide = hidden.to(row.dtype)
    scaled = (wide * row[:, None]).to(job.tile) if grads.weight is not None else None
    dx = None if grads.hidden is None else _hidden_accumulator(hidden, row)
    for start, stop in job.blocks():
        e = scored.e[start:stop] if keep is None else scored.e[start:stop].index_select(1, keep)
        if scaled is not None:
            grads.add_weight(start, stop, e, scaled)
        if grads.bias is not None:
            grads.bias[start:stop] += e.to(row.dtype) @ row
        if dx is not None:
            _add_hidden(dx, e, job.weights(start, stop))
    grads.fresh = False
    local = job.targets[index]
    on_target = target[:, None]
    if grads.weight is not None:
        grads.add_targets(local, wide * on_target)
    if grads.bias is not None:
        grads.bias.index_add_(0, local, on_target[:, 0])
    if grads.hidden is not None and dx is not None:
        dx = (dx * row[:, None]).add_(job.head.weight[local].to(row.dtype) * on_target)
        grads.hidden.index_copy_(0, index, dx.to(hidden.dtype))


def _hidden_accumulator(hidden: Tensor, row: Tensor) -> Tensor:
    """Zeros [n, H]; on a CPU stored as [H, n], the layout of the product that fills it."""
    if hidden.device.type == "cpu":
        return torch.zeros(hidden.shape[1], len(row), dtype=row.dtype).t()
    return torch.zeros(hidden.shape, dtype=row.dtype, device=hidden.device)


def _add_hidden(dx: Tensor, e: Tensor, weight: Tensor) -> None:
    """dx [n, H] += e^T weight for e [v, n] and weight [v, H]."""
    if dx.device.type != "cpu":
        add_product(dx, e.t(), weight)
    else:
        # a transposed copy of a bfloat16 block costs less than a product that reads it across
        add_product(dx.t(), weight.t() if e.dtype == dx.dtype else weight.t().contiguous(), e)


def _factors(
    job: Job, scored: Scored, dlogp: Tensor, dentropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Turns `scored.e` into the columns of the gradient by the raw logits, up to a factor per token
    [n], which comes first; the gradient by the target's raw logit [n] comes second and stays apart,
    in full precision."""
    t, stats, total = scored.transform, scored.stats, scored.total
    dlogp = dlogp.to(total.dtype)
    if dentropy is None and t.inner is None:
        row, target = -dlogp * torch.exp(-total), dlogp * stats.one_minus_p
    else:
        de = torch.zeros_like(dlogp) if dentropy is None else dentropy.to(total.dtype)
        h = torch.zeros_like(total) if stats.entropy is None else stats.entropy
        size = torch.maximum(dlogp.abs(), de.abs())
        unit = torch.where(size == 0, 1.0, size)
        job.passes.factor(scored.e, t, -(dlogp + de * (h - total)) / unit, -de / unit)
        target = dlogp * stats.one_minus_p - de * torch.exp(stats.logp) * (
            stats.logp.clamp(min=LOWEST) + h
        )
        if t.inner is not None:
            target = target * (1 - ((scored.target + t.level) * t.inner / t.scale) ** 2)
        row = size * torch.exp(-total)
    silent = (dlogp == 0) if dentropy is None else (dlogp == 0) & (dentropy == 0)
    return torch.where(silent, 0.0, row * t.scale), torch.where(silent, 0.0, target * t.scale)


def _kept(row: Tensor) -> Tensor | None:
    """Indices of the rows with a gradient, or None to multiply all rows, where that is cheaper
    than a copy (`COMPACT_BELOW`)."""
    keep = row.nonzero()[:, 0]
    return keep if len(keep) < COMPACT_BELOW * len(row) else None


def tile_rows(job: Job, keep: bool) -> int:
    """Rows of a chunk's tile: the vocabulary, or one block where no gradient follows."""
    return job.head.weight.shape[0] if keep else min(job.head.weight.shape[0], job.step)


def chunk_size(job: Job, chunk_bytes: int, *, keep: bool) -> int:
    """Tokens whose tile fits into `chunk_bytes`; a tile that is not kept should also stay in a
    CPU's cache."""
    fits = max(1, chunk_bytes // (tile_rows(job, keep) * job.tile.itemsize))
    return fits if keep else min(fits, 2048 if job.hidden.device.type == "cpu" else 8192)


def plan(index: Tensor, limit: int) -> list[Tensor]:
    """`index` in equal chunks of at most `limit` tokens, of whole multiples of `COLUMNS` where that
    fits."""
    count = len(index)
    if count == 0:
        return []
    parts = -(-count // limit)
    size = -(-count // parts)
    size = min(limit, -(-size // COLUMNS) * COLUMNS)
    return list(torch.split(index, size))


def plan_sequences(index: Tensor, sequence_ids: Tensor, limit: int) -> list[list[Tensor]]:
    """`index` in units that hold whole sequences. A unit is one chunk, or the several chunks of a
    sequence that is longer than `limit`."""
    _, counts = torch.unique_consecutive(sequence_ids[index], return_counts=True)
    units: list[list[Tensor]] = []
    start = stop = 0
    for length in [*counts.tolist(), limit + 1]:
        if stop - start + length > limit and stop > start:
            units.append([index[start:stop]])
            start = stop
        if length > limit and start < len(index):
            units.append(plan(index[start : start + length], limit))
            start = stop = start + length
        else:
            stop += length
    return units


def tile_size(job: Job, count: int, keep: bool) -> int:
    """Elements of a tile of `count` tokens with its padding."""
    multiple = job.passes.column_multiple
    return tile_rows(job, keep) * (-(-max(count, 1) // multiple) * multiple)


def flat_buffer(job: Job, chunks: Sequence[Tensor], *, keep: bool) -> Tensor:
    """An uninitialised flat buffer for the largest chunk's tile."""
    return job.hidden.new_empty(
        tile_size(job, max((len(chunk) for chunk in chunks), default=0), keep), dtype=job.tile
    )
