"""Parts of a transformer layer for which some devices have a fused operator: each in plain torch,
and the choice between the two.

Shape legend: T tokens, sequences one behind the other; H features; D features of a head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ascend, platform


def rms_norm_reference(x_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 up to the last product."""
    wide = x_TH.float() if x_TH.dtype != torch.float64 else x_TH
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x_TH.dtype)


def gated_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by cos and sin [T, D], whose two halves are equal."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float
) -> Tensor:
    """[T, heads, D] causal attention within each sequence; k and v may have fewer heads."""
    parts = []
    for a, b in pairwise((0, *ends)):
        one, two, three = (rows[a:b].transpose(0, 1)[None] for rows in (q, k, v))
        answer = F.scaled_dot_product_attention(
            one, two, three, is_causal=True, scale=scale, enable_gqa=True
        )
        parts.append(answer[0].transpose(0, 1))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a layer in two implementations."""

    name: str
    operator: str
    """torch's name of the device's operator."""
    reference: Callable[..., Tensor]
    fused: Callable[..., Tensor]


PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part(
            name="norm",
            operator=ascend.OPERATORS["norm"],
            reference=rms_norm_reference,
            fused=ascend.rms_norm,
        ),
        Part(
            name="gate",
            operator=ascend.OPERATORS["gate"],
            reference=gated_reference,
            fused=ascend.gated,
        ),
        Part(
            name="rotary",
            operator=ascend.OPERATORS["rotary"],
            reference=rotary_reference,
            fused=ascend.rotary,
        ),
        Part(
            name="attention",
            operator=ascend.OPERATORS["attention"],
            reference=attention_reference,
            fused=ascend.attention,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a layer on one device: calls the fused operator of those in `on`, plain torch
    for the others."""

    on: frozenset[str]

    @classmethod
    def of(cls, device: torch.device, environ: Mapping[str, str] = os.environ) -> Parts:
        has = platform.PLATFORMS[device.type].fused_layers
        return cls(ascend.switched_on(environ) if has else frozenset())

    def __call__(self, name: str, *given: Any) -> Tensor:
        part = PARTS[name]
        return (part.fused if name in self.on else part.reference)(*given)
