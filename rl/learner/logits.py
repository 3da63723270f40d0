"""The step from a causal language model's last hidden states to its logits, as the fused output
layer must reproduce it.

Some families scale their logits, some cap them, and adapters may sit in the output layer. A wrong
guess would train on log-probs that no engine samples from, so the configuration's values are
compared with the model's own logits before they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.loss.head import Head

PROBE = 50.0
"""Largest logit of the probe: above the usual soft-caps of about 30, so that a missed one shows."""
TOLERANCE = 0.02
"""Largest difference as a share of `PROBE`: several times the rounding of bfloat16, and of
accelerators' float32 products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearHead:
    """The `logit_scale` and `softcap` that the kernels need for a model."""

    scale: float = 1.0
    softcap: float | None = None


def linear_head(model: Any) -> LinearHead | None:
    """The scaling from the output layer's product to the model's logits; None where it is not that
    simple (adapters in the output layer, a family with a formula of its own), and the model must
    make its logits itself (`own_logits`)."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    head = _stated(model.config)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, layer.in_features, generator=generator).to(
        layer.weight.device, layer.weight.dtype
    )
    with torch.no_grad():
        hidden *= PROBE / layer(hidden).abs().max().clamp(min=1e-6)
        known = Head(weight=layer.weight, logit_scale=head.scale, softcap=head.softcap)
        expected, logits = (
            known.logits(layer(hidden).float(), head.scale),
            own_logits(model, hidden).float(),
        )
    same = expected.shape == logits.shape and bool(
        (expected - logits).abs().max() <= TOLERANCE * PROBE
    )
    return head if same else None


def _stated(config: Any) -> LinearHead:
    """The scaling that a transformers configuration states: Cohere multiplies, Granite divides,
    Falcon-H1 multiplies, Gemma 2 caps."""
    config = config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value else None

    scale = (
        (number("logit_scale") or 1.0)
        * (number("lm_head_multiplier") or 1.0)
        / (number("logits_scaling") or 1.0)
    )
    return LinearHead(scale=scale, softcap=number("final_logit_softcapping"))


def own_logits(model: Any, hidden_nH: Tensor) -> Tensor:
    """The logits [n, V] of the model's own forward for these last hidden states; differentiable."""
    tokens = torch.zeros(1, len(hidden_nH), dtype=torch.int64, device=hidden_nH.device)
    with _body_returns(model, hidden_nH[None]):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0]


@contextmanager
def _body_returns(model: Any, hidden_BLH: Tensor) -> Iterator[None]:
    # this output type has the fields that mixtures of experts and others read
    from transformers.modeling_outputs import MoeModelOutputWithPast

    body = getattr(model, model.base_model_prefix)
    before = vars(body).get("forward")  # whoever wraps modules may have put one there
    body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden_BLH)
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
