"""Padded and packed micro-batches, and the learner's log-probs beside a plain forward pass of the
same model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels import platform
from emberl.rl.batch import sft_batch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Batch
from emberl.rl.learner.policy import (
    MicroBatchTensors,
    Policy,
    _packed_width,
    pick_attention,
    takes_packed,
    to_tensors,
)
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations import npu_flash_attention


def test_rows_point_one_position_before_their_target() -> None:
    batch = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1)])
    micro = to_tensors(batch, (1, 0), torch.device("cpu"))
    # two sequences, the longer of five tokens, both sizes padded to eight
    assert micro.token_ids_BL.shape == (8, 8)
    assert micro.token_ids_BL[0].tolist() == [5, 9, 1, 0, 0, 0, 0, 0]
    assert micro.token_ids_BL[1].tolist() == [3, 4, 7, 8, 1, 0, 0, 0]
    assert micro.rows_n.tolist() == [0, 1, 8 + 1, 8 + 2, 8 + 3]
    assert micro.targets_n.tolist() == [9, 1, 7, 8, 1]
    assert micro.index_n.tolist() == [6, 7, 2, 3, 4]
    assert micro.sequence_ids_n.tolist() == [1, 1, 0, 0, 0]


def test_a_rank_without_sequences_still_makes_a_pass() -> None:
    micro = to_tensors(sft_batch([((3, 4, 1), 1)]), (), torch.device("cpu"))
    assert micro.token_ids_BL.sum() == 0
    assert len(micro.rows_n) == len(micro.targets_n) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_sequence_alone(tmp_path: Path, temperature: float) -> None:
    small = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    model = AutoModelForCausalLM.from_pretrained(
        make_tiny(tmp_path, small, seed=1), dtype=torch.float64
    )
    sequences = [(3, 4, 7, 8, 1), (5, 9, 1), (6, 6, 6, 7, 9, 8, 10, 11, 1)]
    batch = sft_batch([(tokens, 2) for tokens in sequences])
    micro = to_tensors(batch, (2, 0, 1), torch.device("cpu"))
    with torch.no_grad():
        _, stats, _ = Policy(model)(micro, None, None, temperature)
        alone = []
        for i in (2, 0, 1):
            logits = model(torch.tensor([sequences[i]])).logits[0] / temperature
            picked = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequences[i][1:])[:, None])[
                :, 0
            ]
            alone.append(picked[1:])
    np.testing.assert_allclose(stats.logp.numpy(), torch.cat(alone).numpy(), rtol=0, atol=1e-6)


CPU = torch.device("cpu")


def test_packed_sequences_stand_one_behind_the_other() -> None:
    batch = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1), ((6, 1), 1)])
    micro = to_tensors(batch, (1, 0, 2), CPU, packed=True)
    assert micro.token_ids_BL.shape == (1, 16)  # 10 tokens and a filling of 6
    assert micro.token_ids_BL[0].tolist() == [5, 9, 1, 3, 4, 7, 8, 1, 6, 1, *[0] * 6]
    assert micro.positions_BL is not None and micro.borders is not None
    assert micro.positions_BL[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5]
    assert micro.borders.tolist() == [0, 3, 8, 10, 16]
    assert (micro.borders.dtype, micro.longest) == (torch.int32, 6)
    assert micro.rows_n.tolist() == [0, 1, 3 + 1, 3 + 2, 3 + 3, 8]
    assert micro.targets_n.tolist() == [9, 1, 7, 8, 1, 1]
    assert micro.index_n.tolist() == [6, 7, 2, 3, 4, 9]
    assert micro.sequence_ids_n.tolist() == [1, 1, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("used", "device", "width"),
    [(0, "cpu", 8), (9, "cpu", 16), (300, "cpu", 304), (900, "cpu", 912), (1025, "cpu", 1056),
     (1024, "cpu", 1024), (5000, "cpu", 5120), (9, "cuda", 128), (900, "cuda", 1024)],
)  # fmt: skip
def test_a_cpus_row_is_filled_up_little(used: int, device: str, width: int) -> None:
    assert _packed_width(used, torch.device(device)) == width


def test_a_full_packed_row_has_no_filling() -> None:
    micro = to_tensors(sft_batch([((4,) * 100, 1), ((5,) * 28, 1)]), (0, 1), CPU, packed=True)
    assert micro.borders is not None
    assert (micro.borders.tolist(), micro.longest) == ([0, 100, 128], 100)


def test_a_packed_rank_without_sequences_still_makes_a_pass() -> None:
    micro = to_tensors(sft_batch([((3, 4, 1), 1)]), (), CPU, packed=True)
    assert micro.borders is not None
    assert (micro.token_ids_BL.shape, micro.borders.tolist()) == ((1, 8), [0, 8])
    assert len(micro.rows_n) == len(micro.targets_n) == 0


def test_a_padded_pass_gives_the_model_nothing_but_tokens() -> None:
    assert to_tensors(sft_batch([((3, 4, 1), 1)]), (0,), CPU).layout() == {}


@pytest.mark.parametrize("on_host", [True, False])
def test_borders_stay_on_the_host_where_attention_reads_them_there(
    monkeypatch: pytest.MonkeyPatch, on_host: bool
) -> None:
    device = replace(platform.CPU, device="meta", lengths_on_host=on_host)
    monkeypatch.setitem(platform.PLATFORMS, "meta", device)
    micro = to_tensors(sft_batch([((3, 4, 1), 1)]), (0,), torch.device("meta"), packed=True)
    assert micro.borders is not None and micro.positions_BL is not None
    assert (micro.borders.device.type, micro.positions_BL.device.type) == (
        "cpu" if on_host else "meta",
        "meta",
    )


@pytest.mark.parametrize(
    ("attention", "packs"),
    [
        ("flash_attention_2", True),
        ("kernels-community/vllm-flash-attn3", True),
        ("flex_attention", True),
        ("sdpa", False),
        ("eager", False),
    ],
)
def test_which_attention_gains_by_packing(attention: str, packs: bool) -> None:
    assert takes_packed(attention) == packs


SMALL = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
}


def apart(query: Any, key: Any, value: Any, ends: tuple[int, ...], scale: float) -> torch.Tensor:
    """Causal attention in each of the spans that end there; query, key, value and result are [1,
    heads, N, head_dim]."""
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        for a, b in pairwise([0, *ends])
    ]
    return torch.cat(parts, dim=2)


def varlen(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **given: Any
) -> Any:
    """Attention as the variable-length kernels have it: no mask and no positions, just the
    borders."""
    assert attention_mask is None
    borders = given["cu_seq_lens_q"].tolist()
    assert given["cu_seq_lens_k"].tolist() == borders
    assert (
        given["max_length_q"] == given["max_length_k"] == max(b - a for a, b in pairwise(borders))
    )
    return apart(query, key, value, tuple(borders[1:]), scaling).transpose(1, 2), None


def tnd(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **given: Any
) -> Any:
    """transformers' attention for NPUs, as its flash attention calls it there."""
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = npu_flash_attention.npu_flash_attn_varlen_func(
        *rows, given["cu_seq_lens_q"], given["cu_seq_lens_k"], softmax_scale=scaling, causal=True
    )
    return out[None], None


def fusion_attention(
    query: Any,
    key: Any,
    value: Any,
    head_num: int,
    *,
    input_layout: str,
    scale: float,
    sparse_mode: int,
    actual_seq_qlen: tuple[int, ...],
    actual_seq_kvlen: tuple[int, ...],
    **other: Any,
) -> tuple[torch.Tensor]:
    """The NPU operator in place of the real one: [N, heads, head_dim], the ends of the sequences as
    numbers on the host."""
    assert (input_layout, sparse_mode, head_num) == ("TND", 3, query.shape[1])
    assert actual_seq_qlen == actual_seq_kvlen and all(
        isinstance(end, int) for end in actual_seq_qlen
    )
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return (apart(*heads_first, actual_seq_qlen, scale)[0].transpose(0, 1),)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention takes its softmax in float32 whatever the model computes in, so
    that the width of a row would show in the seventh digit; here it stays in float64. The stand-ins
    are made known to transformers."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)
    )
    monkeypatch.setattr(
        npu_flash_attention, "npu_fusion_attention", fusion_attention, raising=False
    )
    AttentionInterface.register("varlen", varlen)
    AttentionInterface.register("tnd", tnd)


def make_policy(name: str, attention: str) -> Policy:
    torch.manual_seed(7)
    return Policy(
        AutoModelForCausalLM.from_config(
            CONFIGS[name], dtype=torch.float64, attn_implementation=attention
        )
    )


def ragged() -> Batch:
    """Sequences of 1 to 40 tokens; the second, a single token, has nothing to learn from."""
    rng = np.random.default_rng(3)
    lengths = [17, 1, 5, 40, 9, 2, 12]
    return sft_batch([(tuple(rng.integers(1, 30, n).tolist()), 1 + n // 8) for n in lengths])


def logp_and_gradients(
    policy: Policy, batch: Batch, micro: MicroBatchTensors
) -> tuple[np.ndarray, dict[str, Any]]:
    """[T] the log-probs, and the gradients of their sum, each token weighed by its own number."""
    policy.zero_grad()
    _, stats, _ = policy(micro, None, None, 1.0)
    (stats.logp * (1 + micro.index_n % 5)).sum().backward()
    logp_T = np.zeros(batch.num_tokens)
    logp_T[micro.index_n.numpy()] = stats.logp.detach().numpy()
    return logp_T, {
        n: p.grad.numpy().copy() for n, p in policy.named_parameters() if p.grad is not None
    }


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen", "tnd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_padded_are_the_same(name: str, attention: str) -> None:
    batch = ragged()
    packed_policy = make_policy(name, attention)
    packed = to_tensors(batch, (4, 1, 3, 0, 6, 5, 2), CPU, packed=True)
    padded = to_tensors(batch, (0, 1, 2, 3, 4, 5, 6), CPU)
    padded_policy = make_policy(name, "eager" if attention == "eager" else "sdpa")
    expected, expected_gradients = logp_and_gradients(padded_policy, batch, padded)
    found, gradients = logp_and_gradients(packed_policy, batch, packed)
    assert np.count_nonzero(expected) == batch.num_loss_tokens
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=0)
    assert (
        gradients.keys()
        == expected_gradients.keys()
        == dict(packed_policy.named_parameters()).keys()
    )
    for parameter, gradient in expected_gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0
        np.testing.assert_allclose(
            gradients[parameter], gradient, rtol=0, atol=1e-10 * scale, err_msg=parameter
        )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen", "tnd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_nothing_beyond_its_sequences_borders(name: str, attention: str) -> None:
    batch, policy = ragged(), make_policy(name, attention)
    micro = to_tensors(batch, (0, 3, 6, 4), CPU, packed=True)
    changed_ids = micro.token_ids_BL.clone()
    changed_ids[0, 17] = (changed_ids[0, 17] + 1) % 30  # the first token of the second sequence
    with torch.no_grad():
        before = policy(micro, None, None, 1.0)[1].logp
        after = policy(replace(micro, token_ids_BL=changed_ids), None, None, 1.0)[1].logp
    own = micro.sequence_ids_n == 3
    assert torch.equal(before[~own], after[~own])
    assert (before[own] != after[own]).all()


@pytest.mark.usefixtures("exact")
def test_packing_goes_through_gradient_checkpointing() -> None:
    batch, policy = ragged(), make_policy("qwen3", "varlen")
    micro = to_tensors(batch, (0, 3, 6), CPU, packed=True)
    expected, expected_gradients = logp_and_gradients(policy.train(), batch, micro)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    found, gradients = logp_and_gradients(policy, batch, micro)
    np.testing.assert_array_equal(found, expected)
    for parameter, gradient in expected_gradients.items():
        np.testing.assert_array_equal(gradients[parameter], gradient, err_msg=parameter)


@pytest.mark.parametrize(
    ("target", "dtype", "installed", "expected"),
    [
        (platform.CPU, torch.bfloat16, True, "eager"),
        (platform.CPU, torch.float64, True, "sdpa"),
        (platform.CUDA, torch.bfloat16, True, "flash_attention_2"),
        (platform.CUDA, torch.bfloat16, False, "sdpa"),
        (platform.CUDA, torch.float32, True, "sdpa"),
        (platform.NPU, torch.bfloat16, False, "flash_attention_2"),
    ],
)
def test_which_attention_auto_is(
    monkeypatch: pytest.MonkeyPatch,
    target: platform.Platform,
    dtype: torch.dtype,
    installed: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(
        "transformers.utils.import_utils.is_flash_attn_2_available", lambda: installed
    )
    assert pick_attention(target, dtype) == expected
    assert takes_packed(expected) == (expected == "flash_attention_2")
