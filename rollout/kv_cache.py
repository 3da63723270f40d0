"""Keys and values of the sequences being decoded, one slot each; the slots in use are always 0..n-1.

Keys are stored transposed: the scores of one query are then a row times a matrix whose rows are contiguous, which is
what a CPU's bfloat16 multiply wants.

Shape legend: S slots, n in use, M longest sequence, L layers, H query heads, K key/value heads, D head size, P prompt
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptState:
    """A prompt after its prefill: what every sample of its group starts from."""

    keys: Tensor
    """[L, K, D, P]"""
    values: Tensor
    """[L, K, P, D]"""
    logits: Tensor
    """[V] of the token after the prompt."""


class KVCache:
    """Preallocated cache. `length` says how many of the M places a decode step looks at (the longest in use)."""

    def __init__(self, arch: Architecture, slots: int, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        layers, heads, dim = arch.num_layers, arch.num_kv_heads, arch.head_dim
        self.keys = torch.zeros(layers, slots, heads, dim, max_len, dtype=dtype, device=device)
        self.values = torch.zeros(layers, slots, heads, max_len, dim, dtype=dtype, device=device)
        self.mask = torch.full((slots, max_len), -torch.inf, dtype=dtype, device=device)
        """0 where a slot holds a token, else -inf: added to the scores."""
        self._slots = torch.arange(slots, device=device)
        self._scale = dim**-0.5

    def fill(self, start: int, stop: int, prompt: PromptState) -> None:
        """Copies a prompt into slots start..stop-1."""
        length = prompt.keys.shape[-1]
        self.keys[:, start:stop, :, :, :length] = prompt.keys[:, None]
        self.values[:, start:stop, :, :length] = prompt.values[:, None]
        self.mask[start:stop, :length] = 0
        self.mask[start:stop, length:] = -torch.inf

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a slot over another's."""
        self.keys[:, target, :, :, :length] = self.keys[:, source, :, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.mask[target] = self.mask[source]

    def open(self, positions: Tensor) -> None:
        """Makes place `positions` [n] of each slot in use visible, for the token about to be decoded."""
        self.mask[self._slots[: len(positions)], positions] = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, length: int) -> Tensor:
        """Stores one new token of each slot and attends to all it holds: q [n, H, D], k, v [n, K, D] -> [n, H * D]."""
        n, heads, dim = q.shape
        kv_heads = k.shape[1]
        keys, values = self.keys[layer, :n], self.values[layer, :n]
        rows = self._slots[:n]
        keys[rows, :, :, positions] = k
        values[rows, :, positions] = v
        queries = q.reshape(n * kv_heads, heads // kv_heads, dim)
        mask = self.mask[:n, None, :length].repeat_interleave(kv_heads, 0)
        scores = torch.baddbmm(mask, queries, keys[..., :length].flatten(0, 1), alpha=self._scale)
        return torch.bmm(torch.softmax(scores, -1), values[:, :, :length].flatten(0, 1)).view(n, heads * dim)


__all__ = ["KVCache", "PromptState"]
