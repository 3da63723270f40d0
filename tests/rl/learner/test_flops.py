"""FLOPs of a model: by hand, of known models, and beside what torch counts while the model runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels import platform
from emberl.rl.batch import sft_batch
from emberl.rl.learner.flops import ModelFlops, peak_flops, speed
from emberl.rl.learner.policy import Policy, to_tensors
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
CONFIGS = {
    "llama, head_dim from the hidden size": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama, biases, own head_dim, no groups": LlamaConfig(
        **SMALL, head_dim=10, attention_bias=True, mlp_bias=True
    ),
    "qwen2, tied": Qwen2Config(**SMALL, num_key_value_heads=3, tie_word_embeddings=True),
    "qwen3, own head_dim": Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=12, tie_word_embeddings=False
    ),
}


def by_hand() -> ModelFlops:
    return ModelFlops(
        layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=10
    )


def test_hand_made_count() -> None:
    # Weights of a layer: q 8*8, k 8*4, v 8*4, output 8*8, MLP 3*8*16: 576. Two operations each, two
    # layers: 2304 a token. Attention over 3 tokens: 2 layers * 2 products * 2 operations * 3*3 * (2
    # heads * 4) = 576, half of it causal. The head: 2*8*10 = 160.
    flops = by_hand()
    assert (flops.token, flops.head) == (2304, 160)
    assert (flops.attention(3, causal=False), flops.attention(3)) == (576, 288)
    assert flops.sequence(3) == 3 * 2304 + 288
    assert flops.forward([3, 1], 2) == 4 * 2304 + (288 + 32) + 2 * 160
    assert flops.update([3, 1], 2) == 3 * flops.forward([3, 1], 2)
    assert flops.update([3, 1], 2, frozen_weights=True) == 3 * 320 + 2 * (4 * 2304 + 2 * 160)


@pytest.mark.parametrize(
    ("config", "weights", "head"),
    [
        # 0.49 B parameters of Qwen2.5-0.5B are 0.36 B beside the embedding; 8.03 B of Llama-3.1-8B
        # hold two times 0.525 B.
        (
            Qwen2Config(
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                vocab_size=151936,
            ),
            0.358e9,
            0.136e9,
        ),
        (
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            ),
            6.98e9,
            0.525e9,
        ),
    ],
)
def test_a_token_costs_two_operations_per_weight_of_a_known_model(
    config: Any, weights: float, head: float
) -> None:
    flops = ModelFlops.of(config)
    assert flops.token / 2 == pytest.approx(weights, rel=2e-3)
    assert flops.head / 2 == pytest.approx(head, rel=2e-3)


def test_the_full_square_is_palms_count() -> None:
    # arXiv 2204.02311, appendix B: 6 N + 12 layers * heads * head_dim * length for each token, N
    # the weights.
    flops, length = by_hand(), 1000
    weights = 2 * 576 + 8 * 10
    palm = length * (6 * weights + 12 * 2 * 2 * 4 * length)
    assert flops.update([length], length, causal=False) == palm


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# The counts are equal, except that transformers before 5 turns positions into angles by a small
# product; a loss token more or less would be three parts in ten thousand.
SAME = {"rel": 1e-4}


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_counts_the_same(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    flops, ids = ModelFlops.of(model.config), torch.randint(0, 50, (3, 40))
    lengths = [40] * 3
    with torch.no_grad():
        assert counted(lambda: model(ids)) == pytest.approx(
            flops.forward(lengths, 120, causal=False), **SAME
        )
    update = counted(lambda: model(ids).logits.sum().backward())
    assert update == pytest.approx(flops.update(lengths, 120, causal=False), **SAME)


def test_torch_counts_the_same_with_frozen_weights() -> None:
    model = AutoModelForCausalLM.from_config(
        CONFIGS["qwen3, own head_dim"], attn_implementation="eager"
    )
    model.requires_grad_(False)
    # as a layer sees what adapters below it have changed
    embedded = torch.randn(2, 40, 48, requires_grad=True)
    update = counted(lambda: model(inputs_embeds=embedded).logits.sum().backward())
    expected = ModelFlops.of(model.config).update([40, 40], 80, causal=False, frozen_weights=True)
    assert update == pytest.approx(expected, **SAME)


@pytest.mark.parametrize("packed", [False, True])
def test_torch_counts_the_same_for_the_policy(packed: bool) -> None:
    """Only loss tokens go through the head. The passes are full, so that there is no padding to
    count; eager attention multiplies the whole packed row by itself, where a variable-length kernel
    has eight squares."""
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen2, tied"], attn_implementation="eager")
    # 8 sequences of 16 tokens, 6 of them with a loss
    batch = sft_batch([(tuple(range(4, 20)), 10)] * 8)
    micro = to_tensors(batch, tuple(range(8)), torch.device("cpu"), packed=packed)
    policy, flops = Policy(model), ModelFlops.of(model.config)
    update = counted(lambda: policy(micro, None, None, 1.0)[1].logp.sum().backward())
    lengths = [128] if packed else [16] * 8
    assert update == pytest.approx(flops.update(lengths, 48, causal=False), **SAME)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen3MoeConfig(),
            "model_type='qwen3_moe' are not counted, only those of llama, qwen2, qwen3",
        ),
        (AutoConfig.for_model("gpt2"), "model_type='gpt2'"),
        (
            Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "not all of its layers have full attention",
        ),
    ],
)
def test_other_architectures_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelFlops.of(config)


def test_long_sequences_do_not_overflow() -> None:
    flops = replace(by_hand(), layers=80, heads=64, head_dim=128)
    lengths = np.array([1_000_000] * 8, np.int64)
    assert flops.forward(lengths, 0) == 8 * flops.sequence(1_000_000) > 2**63


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("Ascend910B3", 313e12),
        ("Ascend910B4-1", 280e12),
        ("Ascend910_9382", 376e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of a card
        ("NVIDIA A10", None),
        ("NVIDIA H2000", None),
        ("Ascend910B", None),
        ("", None),
        (None, None),
    ],
)
def test_peak_by_name(name: str | None, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_cpu_has_no_peak() -> None:
    assert platform.device_name(platform.CPU) is None


def test_speed() -> None:
    # 8e14 operations in 4 s on 2 devices are 1e14 a second and device, a quarter of 4e14; 4000
    # tokens are 500.
    known = speed(8 * 10**14, tokens=4000, seconds=4.0, devices=2, peak=4e14)
    assert known == {
        "perf/actor/tokens_per_second_per_device": 500.0,
        "perf/actor/tflops_per_device": 100.0,
        "perf/mfu/actor": 0.25,
    }
    unknown = speed(8 * 10**14, tokens=4000, seconds=4.0, devices=2, peak=None)
    assert unknown == {
        "perf/actor/tokens_per_second_per_device": 500.0,
        "perf/actor/tflops_per_device": 100.0,
    }
