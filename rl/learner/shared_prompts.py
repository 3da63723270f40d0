"""The prompt that a group's answers have in common, computed once in a learner's pass instead of
once for each answer (as Prefix Grouper, arXiv 2506.05433, but by its layout alone).

A packed row has a prompt once, followed by its answers. Token-wise operations (projections, norms,
MLPs) compute every row once. Attention gets whole sequences: queries, keys and values are expanded
with a copy of the prompt before each answer, and of its output only the prompt's first copy is
kept. So any attention over packed sequences works, and a prompt's gradient is the sum over its
copies, as without sharing. The learner's own attention on a CPU makes no copies: it reads each
prompt's rows directly (`SharedRows.spans`).

Shape legend: S sequences of a batch, R rows of the packed row, E tokens of the sequences laid out
one behind the other, filling included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.transformer.attention_spans import Span
from ..groups import Batch
from .batching import PACKED_SEQUENCES, MicroBatch, plan_micro_batches
from .flops import ModelFlops

SHARE = 4
"""Groups are assigned to ranks in pieces of at most 1 / SHARE of a rank's work, so that ranks can
be balanced; a larger group is split, and its prompt computed once for each piece."""
KEYS = 1 / 8
"""Largest share that a token's keys have in what a pass keeps of it."""


@dataclass(frozen=True, slots=True)
class SharingSequences:
    """Consecutive sequences of a batch that begin with the same prompt."""

    sequences: tuple[int, ...]
    prompt: int
    """Number of its tokens: those before the first loss token."""


def sharing_sequences(batch: Batch, sequences: Iterable[int]) -> list[SharingSequences]:
    """The sequences, in order, as runs with one prompt each."""
    lengths = batch.sequence_lengths
    ends = np.cumsum(lengths)
    trained = np.flatnonzero(batch.loss_mask_T)
    runs: list[SharingSequences] = []
    before = np.zeros(0, np.int32)
    for s in sequences:
        start, end = ends[s] - lengths[s], ends[s]
        first = np.searchsorted(trained, start)
        stop = min(end, trained[first]) if first < len(trained) else end
        prompt = batch.token_ids_T[start:stop]
        if runs and np.array_equal(prompt, before):
            runs[-1] = SharingSequences((*runs[-1].sequences, s), len(prompt))
        else:
            runs.append(SharingSequences((s,), len(prompt)))
            before = prompt
    return runs


def repeated_tokens(batch: Batch) -> int:
    """Number of prompt tokens in the batch that sharing saves from being computed again."""
    runs = sharing_sequences(batch, range(len(batch.sequence_lengths)))
    return sum((len(run.sequences) - 1) * run.prompt for run in runs)


def plan_sharing(
    batch: Batch, world: int, budget: int, flops: ModelFlops | None, *, copy: float = 1.0
) -> list[list[MicroBatch]]:
    """`plan_micro_batches` for packed passes, with all answers to a prompt in one pass if they fit.

    budget: tokens of a pass, of which a token of a prompt's copy before another answer takes
        `copy`: all of it where attention works on copies, `KEYS` where it keeps their keys alone.
    """
    lengths = batch.sequence_lengths
    runs = sharing_sequences(batch, range(len(lengths)))
    whole = sum(_cost(run.sequences, run.prompt, lengths, None) for run in runs)

    def room(sequences: Sequence[int], prompt: int) -> int:
        repeated = (len(sequences) - 1) * prompt
        return int(lengths[list(sequences)].sum()) - int((1 - copy) * repeated)

    pieces = [
        SharingSequences(part, run.prompt)
        for run in runs
        for part in _cut(run, lengths, room, budget, whole / (SHARE * world))
    ]
    most = max((len(piece.sequences) for piece in pieces), default=1)
    plan = plan_micro_batches(
        [room(piece.sequences, piece.prompt) for piece in pieces],
        world,
        budget,
        packed=True,
        costs=[_cost(piece.sequences, piece.prompt, lengths, flops) for piece in pieces],
        most=max(1, PACKED_SEQUENCES // most),
    )
    return [
        [tuple(chain.from_iterable(pieces[i].sequences for i in taken)) for taken in of_rank]
        for of_rank in plan
    ]


def _cost(
    sequences: Sequence[int], prompt: int, lengths: NDArray[np.int64], flops: ModelFlops | None
) -> float:
    """The FLOPs of a pass over sequences that share their prompt; its tokens without `flops`."""
    repeated = (len(sequences) - 1) * prompt
    if flops is None:
        return float(lengths[list(sequences)].sum() - repeated)
    return float(sum(flops.sequence(lengths[s]) for s in sequences) - repeated * flops.token)


def _cut(
    run: SharingSequences,
    lengths: NDArray[np.int64],
    room: Callable[[Sequence[int], int], int],
    budget: int,
    share: float,
) -> list[tuple[int, ...]]:
    """The run split into the fewest parts of about equal size that keep to both bounds; single
    sequences if no split does."""
    for parts in range(1, len(run.sequences)):
        cut = [tuple(part.tolist()) for part in np.array_split(np.array(run.sequences), parts)]
        if all(
            room(part, run.prompt) <= budget and _cost(part, run.prompt, lengths, None) <= share
            for part in cut
        ):
            return cut
    return [(s,) for s in run.sequences]


@dataclass(frozen=True, slots=True, eq=False)
class SharedRows:
    """The map between the R rows of a packed row that has each prompt once, and the E tokens of its
    sequences with their prompts repeated."""

    rows_E: Tensor
    """The row of each token."""
    first_R: Tensor
    """The first token of each row."""
    copies: tuple[tuple[Tensor, Tensor], ...]
    """(rows [n], tokens [n, c]) for each number c > 1 of copies: the rows with c copies, and the
    tokens that are copies of each. Every row is there once, so that sums over copies have one order
    on every device."""
    spans: tuple[Span, ...]
    """Each sequence's own rows and the rows of its prompt, for an attention that reads prompts
    without copies."""

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.int64]], device: torch.device) -> SharedRows:
        """sequences: the rows of each one's tokens; the first ones may be rows of an earlier
        sequence, all others are the next rows in order."""
        rows_E = np.concatenate(sequences)
        first_R = np.unique(rows_E, return_index=True)[1]
        order = np.argsort(rows_E, kind="stable")
        counts = np.bincount(rows_E)
        starts = np.cumsum(counts) - counts
        copies = []
        for count in np.unique(counts[counts > 1]):
            rows = np.flatnonzero(counts == count)
            tokens = order[starts[rows, None] + np.arange(count)]
            copies.append((_on(rows, device), _on(tokens, device)))
        return cls(
            _on(rows_E, device), _on(first_R, device), tuple(copies), tuple(_spans(sequences))
        )


def _spans(sequences: Sequence[NDArray[np.int64]]) -> Iterator[Span]:
    used = 0
    for rows in sequences:
        before = int((rows < used).sum())
        own = len(rows) - before
        assert np.array_equal(rows[:before], rows[0] + np.arange(before)), "a prompt is one piece"
        if own:
            yield Span(used, own, int(rows[0]) if before else 0, before)
        used += own


def _on(index: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index, np.int64)).to(device)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shared: SharedRows) -> Tensor:
        ctx.shared = shared
        return rows.index_select(0, shared.rows_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        shared: SharedRows = ctx.shared
        wide = torch.float64 if slope.dtype == torch.float64 else torch.float32
        total = slope.index_select(0, shared.first_R)
        for rows, tokens in shared.copies:
            each = slope.index_select(0, tokens.flatten()).view(*tokens.shape, *slope.shape[1:])
            total.index_copy_(0, rows, each.sum(1, dtype=wide).to(slope.dtype))
        return total, None


def over_sequences(
    shared: SharedRows | None, attend: Callable[..., Tensor], *rows: Tensor
) -> Tensor:
    """Calls `attend`, which maps tensors [E, ...] to [E, ...], on tensors [R, ...]; returns
    [R, ...]. With `shared` None it is a plain call."""
    if shared is None:
        return attend(*rows)
    answer = attend(*(_spread(each, shared) for each in rows))
    return answer.index_select(0, shared.first_R)


def _spread(rows: Tensor, shared: SharedRows) -> Tensor:
    spread: Tensor = _Spread.apply(rows, shared)  # type: ignore[no-untyped-call]
    return spread


def share_in_attention(name: str) -> None:
    """Makes the function of this `attn_implementation` of transformers accept the keyword
    `shared`; calls without it are unchanged."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = ALL_ATTENTION_FUNCTIONS[name]
    if getattr(inner, "takes_shared", False):
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        """[1, heads, R, D] in, [1, R, heads, D] out."""
        shared = given.pop("shared", None)
        if shared is None:
            result: tuple[Tensor, Any] = inner(module, query, key, value, mask, **given)
            return result
        given.pop("position_ids", None)  # of rows, while the borders are of sequences

        def attend(*heads: Tensor) -> Tensor:
            q, k, v = (each.transpose(0, 1)[None] for each in heads)
            answer: Tensor = inner(module, q, k, v, mask, **given)[0][0]
            return answer

        rows = (each[0].transpose(0, 1) for each in (query, key, value))
        return over_sequences(shared, attend, *rows)[None], None

    attention.takes_shared = True  # type: ignore[attr-defined]
    AttentionInterface.register(name, attention)
