"""Causal attention over packed sequences on a CPU in bfloat16, which keeps no scores for the
backward pass.

Shape legend: T tokens of a pass, sequences one behind the other; D features of a head; N sequences
of at most L tokens; heads query heads, kv heads of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import elements
from .attention_spans import Span
from .threads import bits, over_parts


@dataclass(frozen=True, slots=True)
class _Alike:
    """Sequences of similar length with the same prompt, padded with zeros to one length, so that
    one batched product takes them all."""

    queries: NDArray[np.int64]
    """[N, L] rows, -1 where there is none."""
    keys: NDArray[np.int64]
    """[N, before + L] rows: the prompt's and the queries'."""
    prompt: int
    before: int
    first_query: int
    """Rows of `queries` in all groups before this one; `first_key`: of `keys`."""
    first_key: int

    @property
    def last_query(self) -> int:
        return self.first_query + self.queries.size

    @property
    def last_key(self) -> int:
        return self.first_key + self.keys.size


SCORES = 2**18
"""Most attention scores of a group: 512 KiB in bfloat16 stay in a core's second-level cache."""
FILLING, FILLED_ROWS = 1 / 8, 32
"""Most padding of a group, as a share of its rows and in rows: less than another group's calls."""


@lru_cache(maxsize=64)
def _groups(spans: tuple[Span, ...], heads: int) -> tuple[_Alike, ...]:
    """All sequences in groups of similar length. Cached: every layer of a pass asks the same."""
    left = sorted(spans, key=lambda s: (s.prompt, s.before, -s.length))
    groups: list[_Alike] = []
    while left:
        _, longest, prompt, before = left[0]
        room = max(1, SCORES // (heads * longest * (before + longest)))
        fits = [s for s in left[:room] if s[2:] == (prompt, before)]
        lengths = np.array([s.length for s in fits], np.int64)
        rows = np.arange(1, len(fits) + 1) * longest
        too_much = rows - np.cumsum(lengths) > np.maximum(FILLING * rows, FILLED_ROWS)
        count = int(np.argmax(too_much)) or len(fits)
        starts = np.array([s.start for s in fits[:count]], np.int64)
        places = np.arange(longest)
        queries = np.where(places < lengths[:count, None], starts[:, None] + places, -1)
        shared = np.broadcast_to(np.arange(prompt, prompt + before), (count, before))
        groups.append(
            _Alike(
                queries,
                np.concatenate([shared, queries], axis=1),
                prompt,
                before,
                groups[-1].last_query if groups else 0,
                groups[-1].last_key if groups else 0,
            )
        )
        left = left[count:]
    return tuple(groups)


class _Attention(torch.autograd.Function):
    """Causal attention, with short sequences batched: calling an operator costs more than it
    computes for one of them. Each sequence's queries are a block [heads, L, D], so that the query
    heads that share keys are rows of one product. Backward forms the scores anew, for one group of
    sequences per thread at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: tuple[Span, ...],
        size: int,
        scale: float,
    ) -> Tensor:
        heads, kv = q.shape[1] // size, k.shape[1] // size
        groups = _groups(spans, heads)
        turned_q = q.new_empty(groups[-1].last_query, heads * size)
        turned_k = q.new_empty(groups[-1].last_key, kv * size)
        out, sums = torch.empty_like(q), torch.empty(groups[-1].last_query, heads)
        angles = cos.numpy(), sin.numpy()
        q_bits, k_bits, v_bits, out_bits = bits(q), bits(k), bits(v), bits(out)

        def attend(group: _Alike) -> None:
            block_q, block_k = _blocks(turned_q, turned_k, group, size)
            elements.rotate(q_bits, *angles, group.queries, bits(block_q))
            elements.rotate(k_bits, *angles, group.keys, bits(block_k))
            values = torch.empty_like(block_k)
            elements.gather_heads(v_bits, group.keys, bits(values))
            scores = torch.bmm(_shared(block_q, kv), block_k.flatten(0, 1).transpose(1, 2))
            log_sums = sums[group.first_query : group.last_query].view(-1, block_q.shape[2])
            elements.causal_softmax(
                bits(scores.view(*log_sums.shape, -1)),
                group.before,
                np.float32(scale),
                log_sums.numpy(),
            )
            answer = torch.bmm(scores, values.flatten(0, 1))
            elements.scatter_heads(bits(answer.view_as(block_q)), 0, group.queries, out_bits)

        over_parts(groups, attend)
        ctx.save_for_backward(turned_q, turned_k, v, cos, sin, out, sums)
        ctx.groups = groups
        ctx.size = size
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        turned_q, turned_k, v, cos, sin, out, sums = ctx.saved_tensors
        size, kv = ctx.size, v.shape[1] // ctx.size
        dq, dk, dv = torch.empty_like(out), torch.empty_like(v), torch.empty_like(v)
        angles = cos.numpy(), sin.numpy()
        dq_bits, dk_bits, dv_bits = bits(dq), bits(dk), bits(dv)
        v_bits, out_bits, dout_bits = bits(v), bits(out), bits(dout.contiguous())
        of_prompts: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

        def attend(group: _Alike) -> None:
            block_q, block_k = _blocks(turned_q, turned_k, group, size)
            slope, values = torch.empty_like(block_q), torch.empty_like(block_k)
            deltas = torch.empty(block_q.shape[:-1])
            elements.gather_heads(dout_bits, group.queries, bits(slope))
            elements.gather_heads(v_bits, group.keys, bits(values))
            elements.products_of_rows(bits(slope), out_bits, group.queries, deltas.numpy())
            q, k, slopes = _shared(block_q, kv), block_k.flatten(0, 1), _shared(slope, kv)
            probs = torch.bmm(q, k.transpose(1, 2))
            dscores = torch.bmm(slopes, values.flatten(0, 1).transpose(1, 2))
            log_sums = sums[group.first_query : group.last_query].view(-1, block_q.shape[2])
            elements.causal_softmax_backward(
                bits(probs.view(*log_sums.shape, -1)),
                bits(dscores.view(*log_sums.shape, -1)),
                group.before,
                np.float32(ctx.scale),
                log_sums.numpy(),
                deltas.view_as(log_sums).numpy(),
            )
            dvalues = torch.bmm(probs.transpose(1, 2), slopes).view_as(values)
            dblock_q = torch.bmm(dscores, k).view_as(block_q)
            dblock_k = torch.bmm(dscores.transpose(1, 2), q).view_as(block_k)
            before = group.before
            elements.rotate_back(bits(dblock_q), 0, *angles, group.queries, dq_bits)
            elements.scatter_heads(bits(dvalues), before, group.queries, dv_bits)
            elements.rotate_back(bits(dblock_k), before, *angles, group.queries, dk_bits)
            if before:
                totals = np.zeros((2, kv, before, size), np.float32)
                elements.sum_of_copies(bits(dblock_k), totals[0])
                elements.sum_of_copies(bits(dvalues), totals[1])
                of_prompts[group.first_key] = totals[0], totals[1]

        over_parts(ctx.groups, attend)
        for group in ctx.groups:  # in their order, so that sums do not depend on threads
            if group.before:
                keys, values = of_prompts[group.first_key]
                elements.add_rotated_back(keys, *angles, group.prompt, dk_bits)
                elements.add_heads(values, group.prompt, dv_bits)
        return dq, dk, dv, None, None, None, None, None


def _blocks(turned_q: Tensor, turned_k: Tensor, group: _Alike, size: int) -> tuple[Tensor, Tensor]:
    """The memory of a group's queries as [N, heads, L, D], and of its keys as [N, kv, before + L,
    D]."""
    queries = turned_q[group.first_query : group.last_query]
    keys = turned_k[group.first_key : group.last_key]
    count, longest = group.queries.shape
    return (
        queries.view(count, -1, longest, size),
        keys.view(count, -1, group.before + longest, size),
    )


def _shared(block: Tensor, kv: int) -> Tensor:
    """[N, heads, L, D] as [N * kv, heads / kv * L, D]: rows that share their keys."""
    return block.view(len(block) * kv, -1, block.shape[-1])


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    spans: tuple[Span, ...],
    *,
    size: int,
    scale: float,
) -> Tensor:
    """[T, heads * D] causal attention within each sequence and to the prompt before it, after the
    rotary embedding.

    Args:
        q, k, v: [T, heads * D], [T, kv * D] twice.
        cos, sin: [T, D / 2] float32.
        spans: every row is of one of them; prompts are rows of other spans.
        size: D.
    """
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), k.contiguous(), v.contiguous(), cos, sin, spans, size, scale
    )
    return out
