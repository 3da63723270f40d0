"""A decoding step on a CPU: one new token of each sequence through all layers, and the draw of the
next.

Between two matrix products one compiled pass does what torch does in a dozen operators
(`kernels.decoding.operations`).

Shape legend: n sequences, S slots, W longest sequence, E hidden, H query heads, K key/value heads,
D head size, I MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.decoding import operations
from .kv_cache import KVCache
from .model import Decoder
from .sampling import SlotSampling

SHARED_WORK = 1 << 18
"""Elements of a pass above which threads share its rows: waking a thread takes as long as a quarter
of that."""


def supports(decoder: Decoder) -> bool:
    """Whether `CPUStep` supports the decoder's device and dtype."""
    return decoder.device.type == "cpu" and decoder.dtype in (torch.bfloat16, torch.float32)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array, bfloat16 as uint16."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = bits.numpy()
    return array


class CPUStep:
    """Decodes with `decoder`, whose weights may change between two calls, over the slots of
    `cache`."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, slots: int, max_len: int, threads: int
    ) -> None:
        arch, dtype = decoder.arch, decoder.dtype
        self.decoder = decoder
        self.cache = cache
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="decode")
        self._hidden = torch.zeros(slots, arch.hidden_size, dtype=dtype)
        self._normed = torch.zeros_like(self._hidden)
        self._attended = torch.zeros(slots, arch.num_heads * arch.head_dim, dtype=dtype)
        self._product = torch.zeros(slots, arch.intermediate_size, dtype=dtype)
        self._arrays = [
            as_array(t) for t in (self._hidden, self._normed, self._attended, self._product)
        ]
        self._nothing = as_array(torch.zeros(0, dtype=dtype))
        self._no_delta = as_array(torch.zeros(slots, 0, dtype=dtype))
        cos, sin = decoder.rope(max_len)
        self._rotation = cos.numpy(), sin.numpy()
        self._weights = [
            (
                as_array(layer.attention_norm),
                as_array(layer.mlp_norm),
                self._optional(layer.q_norm),
                self._optional(layer.k_norm),
            )
            for layer in decoder.layers
        ]
        self._last_norm = as_array(decoder.norm)

    def _optional(self, weight: Tensor | None) -> NDArray[Any]:
        return self._nothing if weight is None else as_array(weight)

    def logits(self, ids: Tensor, positions: Tensor, n: int) -> Tensor:
        """ids, positions [m] int64 -> [m, V] in the decoder's dtype; only the first n rows are
        sequences."""
        arch, rows, cache = self.decoder.arch, len(ids), self.cache
        hidden, normed, attended, product = self._arrays
        eps, places = arch.norm_eps, positions.numpy()
        torch.index_select(self.decoder.embedding, 0, ids, out=self._hidden[:rows])
        delta = self._no_delta
        attention_work = 2 * int(places[:n].sum() + n) * attended.shape[1]
        for number, (layer, weights) in enumerate(
            zip(self.decoder.layers, self._weights, strict=True)
        ):
            first_norm, second_norm, q_norm, k_norm = weights
            keys, values = as_array(cache.keys[number]), as_array(cache.values[number])
            operations.add_norm(hidden, delta, first_norm, eps, normed, 0, n)
            qkv = as_array(layer.qkv(self._normed[:rows]))
            self._share(
                operations.attend, n, attention_work,
                qkv, q_norm, k_norm, eps, *self._rotation, keys, values, places, attended,
            )  # fmt: skip
            delta = as_array(layer.out(self._attended[:rows]))
            operations.add_norm(hidden, delta, second_norm, eps, normed, 0, n)
            gate_up = as_array(layer.gate_up(self._normed[:rows]))
            work = n * 4 * arch.intermediate_size
            self._share(operations.silu_product, n, work, gate_up, product)
            delta = as_array(layer.down(self._product[:rows]))
        operations.add_norm(hidden, delta, self._last_norm, eps, normed, 0, n)
        return self.decoder.head(self._normed[:rows])

    def draw(
        self, logits: Tensor, uniform: Tensor, settings: SlotSampling
    ) -> tuple[Tensor, Tensor]:
        """`sampling.sample` for settings without min-p, top-k and top-p; logits [n, V] with
        contiguous rows."""
        n = len(logits)
        tokens, logprobs = np.empty(n, np.int64), np.empty(n, np.float32)
        self._share(
            operations.draw,
            n,
            logits.numel(),
            as_array(logits),
            settings.temperature.numpy(),
            settings.greedy.numpy(),
            uniform.numpy(),
            tokens,
            logprobs,
        )
        return torch.from_numpy(tokens), torch.from_numpy(logprobs)

    def _share(self, function: Callable[..., None], n: int, work: int, *arguments: Any) -> None:
        """Calls `function` on rows 0..n-1, by several threads if it has more than `SHARED_WORK`
        elements of `work`. Each row's result is the same either way."""
        parts = min(self._threads, n) if work > SHARED_WORK else 1
        edges = [n * part // parts for part in range(parts + 1)]
        others = [
            self._pool.submit(function, *arguments, start, stop)
            for start, stop in pairwise(edges[1:])
        ]
        function(*arguments, 0, edges[1])
        for other in others:
            other.result()
