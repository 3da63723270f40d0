"""Decoder layers of Llama, Qwen2 and Qwen3 on a device that has operators for their parts
(`kernels/transformer/fused.py`): what `layers.py` does on a CPU.

Modules, parameters and their names stay. Shape legend: T tokens, H features of the model, D of a
head.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...kernels.transformer.fused import Parts
from .layers import Forward
from .shared_prompts import SharedRows, over_sequences


def fused_forward(device: torch.device) -> Forward:
    """A decoder layer's forward with the fused operators of `device`."""
    parts = Parts.of(device)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **given: Any,
    ) -> Any:
        assert position_embeddings is not None
        return layer(
            self,
            hidden_states,
            position_embeddings,
            ends(hidden_states, given),
            parts,
            given.get("shared"),
        )

    return forward


def ends(hidden: Tensor, given: dict[str, Any]) -> tuple[int, ...]:
    """The cumulative ends of a packed row's sequences, or of padded rows, in flattened tokens."""
    if given.get("ends") is not None:
        ends: tuple[int, ...] = given["ends"]
        return ends
    borders = given.get("cu_seq_lens_q")
    if borders is not None:
        return tuple(borders.tolist()[1:])
    return tuple(accumulate([hidden.shape[1]] * hidden.shape[0]))


def layer(
    self: Any,
    hidden: Tensor,
    turns: tuple[Tensor, Tensor],
    ends: tuple[int, ...],
    parts: Parts,
    shared: SharedRows | None = None,
) -> Tensor:
    """The layer's output for hidden [B, L, H], a packed row or padded ones, in the same shape."""
    shape, x = hidden.shape, hidden.flatten(0, 1)
    first, second, attention, mlp = (
        self.input_layernorm,
        self.post_attention_layernorm,
        self.self_attn,
        self.mlp,
    )
    normed, size = parts("norm", x, first.weight, first.variance_epsilon), attention.head_dim
    q, k, v = (
        part(normed).view(len(x), -1, size)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = (
            parts("norm", rows, norm.weight, norm.variance_epsilon)
            for rows, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
    cos, sin = (turn.expand(shape[0], -1, -1).reshape(len(x), size).to(x.dtype) for turn in turns)
    q, k = parts("rotary", q, cos, sin), parts("rotary", k, cos, sin)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parts("attention", q, k, v, ends, attention.scaling)

    answer = over_sequences(shared, attend, q, k, v)
    x = x + attention.o_proj(answer.flatten(1))
    normed = parts("norm", x, second.weight, second.variance_epsilon)
    inner = parts("gate", mlp.gate_proj(normed), mlp.up_proj(normed))
    out: Tensor = (x + mlp.down_proj(inner)).view(shape)
    return out
