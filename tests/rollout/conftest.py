"""A decoder small enough to reason about, with weights from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emberl.rollout.embedded.architecture import parse_architecture
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Prompt

TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    """make_decoder(seed, dtype=float64, **config) -> Decoder with distributions far from
    uniform."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> Decoder:
        decoder = Decoder(parse_architecture(TINY | config), dtype)
        generator = torch.Generator().manual_seed(seed)
        for weight in decoder.weights.values():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if weight.ndim == 1 else 0.4 * noise)
        return decoder

    return make


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """make_prompt(id, length) -> a prompt whose tokens follow from its id."""

    def make(name: str, length: int = 5) -> Prompt:
        tokens = tuple((7 * i + sum(map(ord, name))) % 23 + 1 for i in range(length))
        return Prompt(id=name, token_ids=tokens, answer="", source="test")

    return make
