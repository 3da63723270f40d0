"""The slots of a batch: keys and values of the sequences being decoded, one slot each, and the
records of these and of the samples that wait. The slots in use are always 0..n-1.

Every layer's cache is a contiguous [S, K, W, D] whose width W follows the longest sequence in use:
a CPU's batched multiply copies its operands where they are not contiguous, which costs more than
widening the cache now and then.

Shape legend: S slots, n in use, W width, L layers, H query heads, K key/value heads, D head size, P
prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..samples import Completion, Prompt, Sampling, Span
from ..stops import StopMatcher
from .architecture import Architecture

ALIGNED = 64
"""Bytes: vectors are read a line of the cache at a time."""
STEP = 16
"""The width is a multiple of this; every widening copies the cache once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptState:
    """A prompt after its prefill: what every sample of its group starts from."""

    keys: Tensor
    """[L, K, P, D]"""
    values: Tensor
    """[L, K, P, D]"""
    logits: Tensor
    """[V] of the token after the prompt."""


class KVCache:
    """The cache of `slots` sequences. Call `open` before the `attend` of each layer."""

    def __init__(
        self, arch: Architecture, slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = slots * arch.num_kv_heads * arch.head_dim * _rounded(max_len)

        def storage() -> list[Tensor]:
            return [_zeros(size, dtype, device) for _ in range(arch.num_layers)]

        self._storage = (storage(), storage())
        self._shape = (slots, arch.num_kv_heads, -1, arch.head_dim)
        self._heads = arch.num_kv_heads
        self._scale = arch.head_dim**-0.5
        self._mask = torch.full((slots, _rounded(max_len)), -torch.inf, dtype=dtype, device=device)
        """[S, longest]: 0 where a token is held, else -inf; added to the scores."""
        self._rows = torch.arange(slots, device=device)
        self.width = 0
        self._use(STEP)

    def fit(self, longest: int, n: int) -> None:
        """Makes room for sequences of `longest` tokens, keeping n slots; gives room back where much
        more is held."""
        width = _rounded(longest)
        # narrower only by several steps: every change of the width copies the cache
        if self.width < width or self.width >= width + 4 * STEP:
            kept = min(width, self.width)
            held = [tensor[:n, :, :kept].clone() for tensor in (*self.keys, *self.values)]
            self._use(width)
            for tensor, old in zip((*self.keys, *self.values), held, strict=True):
                tensor[:n, :, :kept] = old

    def _use(self, width: int) -> None:
        self.width = width
        size = self._rows.numel() * self._shape[1] * self._shape[3] * width
        keys, values = self._storage
        self.keys = [flat[:size].view(self._shape) for flat in keys]
        self.values = [flat[:size].view(self._shape) for flat in values]

    def fill(self, start: int, stop: int, prompt: PromptState) -> None:
        """Copies a prompt into slots start..stop-1; it must fit."""
        length = prompt.keys.shape[-2]
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[start:stop, :, :length] = prompt.keys[layer]
            values[start:stop, :, :length] = prompt.values[layer]
        self._mask[start:stop, :length] = 0
        self._mask[start:stop, length:] = -torch.inf

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a slot over another's."""
        for held in (*self.keys, *self.values):
            held[target, :, :length] = held[source, :, :length]
        self._mask[target] = self._mask[source]

    def open(self, positions: Tensor) -> None:
        """Makes place `positions` [n] of each slot in use visible, for the token about to be
        decoded."""
        n = len(positions)
        rows = self._rows[:n]
        self._mask[rows, positions] = 0
        self._bias = self._mask[:n, None, : self.width]
        self._places = rows * self.width + positions
        if self._heads > 1:
            self._bias = self._bias.repeat_interleave(self._heads, 0)
            heads = torch.arange(self._heads, device=rows.device)
            self._places = (
                (rows[:, None] * self._heads + heads) * self.width + positions[:, None]
            ).view(-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores one new token of each slot and attends to all it holds: q [n, H, D], k, v [n, K,
        D] -> [n, H * D]."""
        n, heads, dim = q.shape
        pairs = n * self._heads
        self.keys[layer].view(-1, dim).index_copy_(0, self._places, k.reshape(pairs, dim))
        self.values[layer].view(-1, dim).index_copy_(0, self._places, v.reshape(pairs, dim))
        keys, values = self.keys[layer][:n].flatten(0, 1), self.values[layer][:n].flatten(0, 1)
        queries = q.reshape(pairs, heads // self._heads, dim)
        scores = torch.baddbmm(self._bias, queries, keys.transpose(1, 2), alpha=self._scale)
        return torch.bmm(torch.softmax(scores, -1), values).view(n, heads * dim)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] zeros. On a CPU the system allocates their pages at the first write, so that room for
    the longest sequences costs nothing before there are any: numpy asks for zero pages, whereas
    torch writes zeros to all of them."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = np.zeros(size * dtype.itemsize + ALIGNED, np.uint8)
    start = -pages.ctypes.data % ALIGNED
    return torch.from_numpy(pages[start : start + size * dtype.itemsize]).view(dtype)


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP


Deliver = Callable[[Completion], None]


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """Samples of one prompt that wait for slots."""

    prompt: Prompt
    samples: Sequence[int]
    """Indices within the group."""
    sampling: Sampling
    deliver: Deliver
    stop: StopMatcher | None = None
    partial: Completion | None = None
    """The partial completion from which this request's only sample goes on."""
    placed: int = 0
    """Number of samples that were given a slot."""
    state: PromptState | None = None
    """The prefilled tokens, kept until the last sample is admitted or the weights change."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens to prefill: the prompt, and those of the partial completion."""
        return self.prompt.token_ids + (
            () if self.partial is None else tuple(self.partial.token_ids.tolist())
        )

    @property
    def left(self) -> Sequence[int]:
        return self.samples[self.placed :]


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """One sample in a slot."""

    request: WaitingRequest
    sample: int
    started: float
    spans: list[Span] = field(default_factory=list)
    """Tokens of earlier weight versions."""
    tail: bytes | None = b""
    """The state of its `StopMatcher`; None after a complete stop string."""


@dataclass(slots=True)
class Counters:
    """Work done since the engine started."""

    prefill_tokens: int = 0
    """Prompt tokens computed, pads left out."""
    decode_steps: int = 0
    decode_tokens: int = 0


def unstarted(prompt_id: str, index: int) -> Completion:
    """The completion, without tokens, of a sample that was aborted before its first token."""
    now = time.time()
    return Completion(
        prompt_id=prompt_id,
        sample=index,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        spans=(),
        finish_reason="abort",
        started=now,
        finished=now,
    )
