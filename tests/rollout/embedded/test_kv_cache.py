"""The memory of keys and values."""

from __future__ import annotations

import psutil
import pytest
import torch
from emberl.rollout.embedded.architecture import parse_architecture
from emberl.rollout.embedded.kv_cache import KVCache, PromptState
from transformers import LlamaConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_for_long_sequences_is_taken_as_they_grow(dtype: torch.dtype) -> None:
    """512 slots of 4,096 tokens: 2 or 1 GiB, of which eight short sequences touch next to
    nothing."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    arch = parse_architecture(config.to_dict())
    me = psutil.Process()
    before = me.memory_info().rss
    cache = KVCache(arch, 512, 4096, dtype, torch.device("cpu"))
    keys = torch.ones(2, arch.num_kv_heads, 5, arch.head_dim, dtype=dtype)
    cache.fill(0, 8, PromptState(keys=keys, values=keys, logits=torch.zeros(32)))
    assert me.memory_info().rss - before < 128 * 2**20
    assert cache.keys[1].data_ptr() % 64 == 0
    assert bool((cache.keys[0][:8, :, :5] == 1).all()), "what was filled in"
    assert float(cache.keys[0].abs().sum()) == 8 * 64 * 5, "and zeros elsewhere"
