"""Llama, Qwen2 and Qwen3 with the operators of torch-npu in their layers, forward and backward, under
FakeTensor: shapes, dtypes, devices, dispatch and autograd's formulas are torch-npu's own, and so is
FSDP2's wiring on a mesh of `npu` devices. No value is computed; constraints that only a kernel
checks (alignment, limits) are not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import accumulate
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 -- registers the device
from emberl.kernels import ascend
from emberl.kernels.transformer.fused import Parts
from emberl.rl.learner.fused_layers import fused_forward
from emberl.rl.learner.layers import ATTENTION, packed_attention
from emberl.rl.learner.trainable import shard
from seen import Seen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

SHOWS = {
    "fused layers of Llama, Qwen2, Qwen3: forward and backward on npu (FakeTensor)": "test_every_layer_uses_the_operators",
    "transformers' own flash attention on npu (FakeTensor)": "test_transformers_own_layers_run_too",
    "FSDP2 on a mesh of npu devices, bfloat16 passes (FakeTensor)": "test_sharded_layers_on_a_mesh",
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
NPU = torch.device("npu", 0)


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTensorMode]:
    AttentionInterface.register(ATTENTION, packed_attention)
    ascend._triangle.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    ascend._triangle.cache_clear()


def model(family: str, attention: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = copy.deepcopy(FAMILIES[family](**SIZES))
    with NPU:
        made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if attention == ATTENTION:
        forward = fused_forward(NPU)
        for layer in made.model.layers:
            layer.forward = MethodType(forward, layer)
    return made


def packed(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of a model's body, as the learner gives them."""
    total = sum(lengths)
    return {
        "input_ids": torch.zeros(1, total, dtype=torch.long, device=NPU),
        "position_ids": torch.zeros(1, total, dtype=torch.long, device=NPU),
        "ends": tuple(accumulate(lengths)),
        "use_cache": False,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_uses_the_operators(family: str) -> None:
    made, layers = model(family, ATTENTION), SIZES["num_hidden_layers"]
    with Seen() as seen:
        hidden = made.model(**packed((17, 40, 7))).last_hidden_state
        assert (
            hidden.shape == (1, 64, 64) and hidden.device == NPU and hidden.dtype == torch.bfloat16
        )
        hidden.float().sum().backward()
    for parameter in made.model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape and parameter.grad.device == NPU
    norms = 4 if family == "qwen3" else 2
    assert seen.count["npu::npu_fusion_attention"] == layers
    assert seen.count["npu::npu_rms_norm"] == norms * layers
    assert (
        seen.count["npu::npu_swiglu"] == layers and seen.count["npu::npu_rotary_mul"] == 2 * layers
    )
    for name in (
        "npu_fusion_attention_grad",
        "npu_rms_norm_backward",
        "npu_swiglu_backward",
        "npu_rotary_mul_backward",
    ):
        assert seen.count[f"npu::{name}"] % layers == 0 and seen.count[f"npu::{name}"], name
    assert not any(name.endswith("_local_scalar_dense") for name in seen.count), (
        "no wait for the device"
    )
    assert seen.float64 == set()


def test_the_switch_takes_an_operator_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBERL_FUSED", "norm")
    assert Parts.of(NPU).on == {"norm"}
    made = model("qwen2", ATTENTION)
    with Seen() as seen:
        made.model(**packed((16, 16))).last_hidden_state.float().sum().backward()
    assert "npu::npu_rms_norm" in seen.count and "npu::npu_swiglu" not in seen.count
    assert "npu::npu_fusion_attention" not in seen.count


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_transformers_own_layers_run_too(attention: str) -> None:
    made = model("qwen3", attention)
    with Seen() as seen:
        ids = torch.zeros(2, 64, dtype=torch.long, device=NPU)
        out = made(input_ids=ids, use_cache=False).logits
        out.float().sum().backward()
    assert out.shape == (2, 64, 64) and out.device == NPU
    assert ("npu::npu_fusion_attention" in seen.count) == (attention == "flash_attention_2")


class Body(nn.Module):
    """As the learner's policy wraps it: what is sharded runs inside one forward."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, **given: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.made.model(**given).last_hidden_state
        return hidden


def test_sharded_layers_on_a_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with unset_fake_temporarily():
            mesh = init_device_mesh("npu", (2,))
        made = model("qwen3", ATTENTION, torch.float32)
        shapes = {name: p.shape for name, p in made.named_parameters()}
        root = Body(made)
        shard(root, made.model.layers, mesh, torch.bfloat16, device=NPU, master=torch.float32)
        hidden = root(**packed((24, 40)))
        assert hidden.dtype == torch.bfloat16
        hidden.float().sum().backward()
        for name, parameter in made.named_parameters():
            if name == "lm_head.weight":
                continue
            assert parameter.shape == shapes[name], "the whole"
            grad = parameter.grad.to_local()
            assert grad.shape[0] == -(-shapes[name][0] // 2) and grad.dtype == torch.float32, name
            assert grad.device == NPU
    finally:
        dist.destroy_process_group()
