"""What torch-npu's operators compute, by their documentation, for `values.ByTheCPU`; and a process
group of one, so that a learner can be alone on a device without HCCL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from emberl.kernels import platform
from emberl.kernels.transformer import fused
from torch.testing._internal.distributed import fake_pg
from values import slopes

ALONE = "emberl_alone"
"""A process group of one, whose collectives do nothing; HCCL's would need a card."""


def register() -> None:
    """Torch's fake group, which does nothing, for both devices."""
    if ALONE not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            ALONE, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "npu"]
        )


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both platforms form such groups, and sums in the same dtype."""
    register()
    changed = {
        "npu": replace(platform.NPU, collective=ALONE),
        "cpu": replace(platform.CPU, collective=ALONE, float64=False),
    }
    for name, target in changed.items():
        monkeypatch.setitem(platform.PLATFORMS, name, target)


Given = dict[str, Any]


def scales(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def norm_backward(given: Given) -> Any:
    dx, dgamma = slopes(
        lambda x, gamma: (x.float() * scales(x) * gamma.float()).to(x.dtype),
        (given["input"], given["gamma"]),
        given["dy"],
    )
    return dx, dgamma.float()


def gate(x: torch.Tensor, dim: int) -> torch.Tensor:
    return fused.gated_reference(*x.chunk(2, dim))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def turn_backward(given: Given) -> Any:
    cos, sin = given["r1"], given["r2"]
    (dx,) = slopes(lambda x: turn(x, cos, sin), (given["input"],), given["grad"])
    return dx, torch.zeros_like(cos), torch.zeros_like(sin)


def attend(given: Given, scale: str) -> Callable[..., torch.Tensor]:
    assert given["input_layout"] == "TND" and given["sparse_mode"] == 3
    mask = given["atten_mask"]
    assert mask.shape == (2048, 2048) and bool(mask[0, 1]) and not bool(mask[1, 0])
    assert given["actual_seq_qlen"] == given["actual_seq_kvlen"]
    ends = tuple(given["actual_seq_qlen"])
    return lambda q, k, v: fused.attention_reference(q, k, v, ends, given[scale])


def attention(given: Given) -> Any:
    q, k, v = given["query"], given["key"], given["value"]
    assert given["head_num"] == q.shape[1]
    sums = torch.zeros(len(q), q.shape[1], 8)
    return (
        attend(given, "scale")(q, k, v),
        sums,
        sums.clone(),
        torch.empty(0, dtype=q.dtype),
        0,
        0,
        0,
    )


def attention_backward(given: Given) -> Any:
    rows = given["query"], given["key"], given["value"]
    found = slopes(attend(given, "scale_value"), rows, given["dy"])
    return *found, torch.empty(0, dtype=rows[0].dtype), torch.empty(0)


def by_sdpa(given: Given, scale: str) -> Callable[..., torch.Tensor]:
    """What torch-npu makes of scaled_dot_product_attention: heads first, causal by a mask."""
    assert given["input_layout"] == "BNSD"
    mask = None if given["atten_mask"] is None else ~given["atten_mask"].bool()
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if given["sparse_mode"] == 0 else None,
        is_causal=given["sparse_mode"] != 0, scale=given[scale], enable_gqa=True,
    )  # fmt: skip


def sdpa(given: Given) -> Any:
    q, k, v = given["query"], given["key"], given["value"]
    sums, none = torch.zeros(*q.shape[:3], 8), torch.zeros(1, dtype=torch.int64)
    return by_sdpa(given, "scale")(q, k, v), sums, sums.clone(), torch.empty(0), none, none.clone()


def sdpa_backward(given: Given) -> Any:
    rows = given["query"], given["key"], given["value"]
    found = slopes(by_sdpa(given, "scale_value"), rows, given["dy"])
    return *found, torch.empty(0), torch.empty(0)


SDPA: dict[str, Callable[[Given], Any]] = {
    "npu_fusion_attention_v3": sdpa,
    "npu_fusion_attention_grad_v3": sdpa_backward,
}
REFERENCES: dict[str, Callable[[Given], Any]] = SDPA | {
    "npu_rms_norm": lambda g: (
        fused.rms_norm_reference(g["input"], g["gamma"], g["epsilon"]),
        scales(g["input"], g["epsilon"]),
    ),
    "npu_rms_norm_backward": norm_backward,
    "npu_swiglu": lambda g: gate(g["input"], g["dim"]),
    "npu_swiglu_backward": lambda g: slopes(
        lambda x: gate(x, g["dim"]), (g["input"],), g["grad_output"]
    )[0],
    "npu_rotary_mul": lambda g: turn(g["input"], g["r1"], g["r2"]),
    "npu_rotary_mul_backward": turn_backward,
    "npu_fusion_attention": attention,
    "npu_fusion_attention_grad": attention_backward,
}
"""What the operators compute, by their documentation; the gradients are torch's."""
