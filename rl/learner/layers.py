"""Decoder layers of Llama, Qwen2 and Qwen3 as transformers builds them, run on a CPU by
`kernels/transformer`.

Modules, parameters and their names stay; only a layer's `forward` is replaced, and compared with
the layer's own once before it is used.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernels.transformer import operators
from ...kernels.transformer.attention import causal_attention
from ...kernels.transformer.attention_spans import spans_between
from .shared_prompts import share_in_attention

_log = logging.getLogger(__name__)

ATTENTION = "packed_cpu"
"""`attn_implementation` of models whose layers are replaced: transformers makes no mask for it, and
the learner packs."""
FAMILIES = ("llama", "qwen2", "qwen3")
TOLERANCE = 0.03
"""Largest relative distance between outputs, and gradients, of the replaced and the own forward:
bfloat16 rounds to 0.004, and the two round at different places."""


Forward = Callable[..., Any]


def replace_layers(
    model: Any, layers: Any, forward: Forward | None = None, device: torch.device | None = None
) -> bool:
    """Replaces the layers' forward if they are of a known family and pass the comparison, which
    runs on `device`. Returns whether it did. forward: None means that of a CPU."""
    forward, device = forward or layer_forward, device or torch.device("cpu")
    config = model.config.get_text_config()
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    known = (
        config.model_type in FAMILIES
        and full
        and config.hidden_act == "silu"
        and not config.attention_dropout
    )
    if not known or not all(_usual(layer) for layer in layers):
        return False
    distance = _distance(layers[0], config, forward, device)
    if not distance <= TOLERANCE:
        _log.warning(
            "the learner's own layers on %s differ by %.3f from those of transformers, which are"
            " used",
            device.type,
            distance,
        )
        return False
    use_packed_attention(model)
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return True


def use_packed_attention(model: Any) -> None:
    """Gives the model `packed_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    share_in_attention(ATTENTION)
    model.config._attn_implementation = ATTENTION


def _usual(layer: Any) -> bool:
    """Whether the layer has the parts that `layer_forward` reads, and no adapter in its MLP."""
    names = {name for name, _ in layer.named_children()}
    mlp = layer.mlp
    return names == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} and all(
        type(part) is nn.Linear and part.bias is None
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )


def _distance(layer: Any, config: Any, ours: Forward, device: torch.device) -> float:
    """The largest relative distance between the replaced and the own forward of a copy of the
    layer, of output and gradient for 24 random tokens."""
    layer = copy.deepcopy(layer).to(device, torch.bfloat16)
    layer.self_attn.config._attn_implementation = "sdpa"
    attention, generator = layer.self_attn, torch.Generator().manual_seed(0)
    x = torch.randn(1, 24, config.hidden_size, generator=generator).to(device, torch.bfloat16)
    angles = torch.outer(torch.arange(24), torch.linspace(1, 0, attention.head_dim // 2)).repeat(
        1, 2
    )[None]
    turns = (angles.cos().to(x), angles.sin().to(x))
    distances = []
    for forward in (ours, type(layer).forward):
        given = x.clone().requires_grad_()
        out = forward(layer, given, position_embeddings=turns)
        (gradient,) = torch.autograd.grad(out, given, x.flip(1))
        distances.append((out.detach().float() - x, gradient.float() - x.flip(1)))
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(*distances, strict=True)
    )


def layer_forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None, **given: Any,
) -> Any:  # fmt: skip
    """A decoder layer's forward: of a packed row [1, T, H], whose borders are `cu_seq_lens_q`, or
    of padded ones."""
    if hidden_states.dtype != torch.bfloat16:  # a model that is used as it stands, beside training
        return type(self).forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **given,
        )
    assert position_embeddings is not None
    shape, x = hidden_states.shape, hidden_states.flatten(0, 1)
    first, second, attention, mlp = (
        self.input_layernorm,
        self.post_attention_layernorm,
        self.self_attn,
        self.mlp,
    )
    size = attention.head_dim
    readers = (attention.q_proj, attention.k_proj, attention.v_proj)
    if all(type(part) is nn.Linear for part in readers):
        q, k, v = operators.norm_linears(
            x,
            first.weight,
            first.variance_epsilon,
            *((part.weight, part.bias) for part in readers),
        )
    else:  # with adapters
        normed = operators.rms_norm(x, first.weight, first.variance_epsilon)
        q, k, v = (_linear(part, normed) for part in readers)
    if hasattr(attention, "q_norm"):
        q, k = (
            operators.rms_norm(rows.view(-1, size), norm.weight, norm.variance_epsilon).view_as(
                rows
            )
            for rows, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
    cos, sin = (_half(turn, len(x)) for turn in position_embeddings)
    shared = given.get("shared")
    if shared is None:
        spans = spans_between(_borders(shape, given.get("cu_seq_lens_q")))
    else:
        spans = shared.spans
    answer = causal_attention(q, k, v, cos, sin, spans, size=size, scale=attention.scaling)
    return operators.add_norm_mlp(
        hidden_states,
        _linear(attention.o_proj, answer),
        second.weight,
        second.variance_epsilon,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


_halves = WeakTensorKeyDictionary()
"""The result of `_half` for the cosines and sines of the pass: all its layers are given the same
ones, and each would keep a copy for the backward pass."""


def _half(turn: Tensor, tokens: int) -> Tensor:
    """The first half of the features of cosines or sines [B, L, D], which the second repeats, as
    float32 [tokens, D / 2]; B is 1 where all rows have the same."""
    if turn not in _halves:
        half = turn[..., : turn.shape[-1] // 2].float()
        rows = tokens // half.shape[1]
        _halves[turn] = half.expand(rows, -1, -1).reshape(tokens, -1).contiguous()
    kept: Tensor = _halves[turn]
    return kept


def _linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`, by our operator unless the layer has adapters."""
    if type(layer) is nn.Linear:
        return operators.linear(x, layer.weight, layer.bias)
    out: Tensor = layer(x)
    return out


def _borders(shape: torch.Size, packed: Tensor | None) -> tuple[int, ...]:
    if packed is not None:
        return tuple(packed.tolist())
    return tuple(range(0, shape[0] * shape[1] + 1, shape[1]))


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attention over packed sequences for dtypes other than bfloat16, one sequence at a time:
    [B, heads, L, D] in, [B, L, heads, D] out."""
    assert attention_mask is None
    borders = given.get("cu_seq_lens_q")
    ends = [0, query.shape[2]] if borders is None else borders.tolist()
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
