"""The learner's step on `npu:0`: loading, FSDP2, passes, the fused loss, AdamW. Its values are the
CPU's, as `values.py` computes them; memory, copies, dispatch and autograd are torch-npu's.

That the result is the CPU's bit for bit shows that nothing on the way (casts, views, layouts, an
operation that only the device's autograd has) changes what is computed. It shows nothing of a
card's own arithmetic.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_npu  # noqa: F401 -- registers the device
from emberl.kernels import ascend, platform
from emberl.kernels.transformer import fused
from emberl.rl.algorithm.losses import Objective
from emberl.rl.config.algorithm import LossConfig
from emberl.rl.config.load import ModelConfig, OptimConfig, load_config
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Batch
from emberl.rl.learner.rank import LearnerRank, RankSpec
from torch.testing._internal.distributed import fake_pg
from values import ByTheCPU, slopes

SHOWS = {
    "the quickstart's learner step on npu:0 equals the CPU's, bit for bit": "test_a_step_is_the_cpus",
    "no float64 tensor on npu in a learner step": "test_a_step_is_the_cpus",
    "a learner step through the fused operators, bfloat16 (references of the CPU)": "test_a_step_by_the_operators",
}
ROOT = Path(__file__).parents[3]
ALONE = "emberl_alone"
"""A process group of one, whose collectives do nothing; HCCL's would need a card."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = load_config(ROOT / "configs" / "quickstart.yaml", []).model.tiny
    assert tiny is not None
    return str(make_tiny(tmp_path_factory.mktemp("model"), tiny, seed=0))


def batch() -> Batch:
    """Five answers of unlike lengths, from a fixed seed."""
    rng = np.random.default_rng(3)
    lengths = [9, 21, 14, 6, 17]
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    mask = positions >= 3
    behaviour = np.where(mask, -2.5 + 0.3 * rng.standard_normal(len(ids)), np.nan)
    return Batch(
        token_ids_T=rng.integers(4, 20, len(ids)).astype(np.int32),
        positions_T=positions,
        sequence_ids_T=ids,
        loss_mask_T=mask,
        behaviour_logp_T=behaviour,
        advantages_T=np.repeat(rng.standard_normal(len(lengths)), lengths),
        weights_T=np.where(mask, 1.0 / mask.sum(), 0.0),
        num_loss_tokens=int(mask.sum()),
    )


def steps(device: str, model: str, dtype: str, attention: str, count: int = 2) -> tuple[Any, Any]:
    """Metrics of so many steps, and the weights after them."""
    spec = RankSpec(
        rank=0, world=1, device=device, threads=1, timeout=60.0,
        model=ModelConfig.model_validate({"path": model, "dtype": dtype, "attention": attention}),
    )  # fmt: skip
    learner = LearnerRank(spec)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner.connect(f"127.0.0.1:{port}")
    try:
        learner.load(model)
        learner.begin_stage(OptimConfig(lr=1e-3, micro_batch_tokens=48), 10)
        objective = Objective(loss=LossConfig(clip_high=0.28, entropy_coef=0.01))
        found = [learner.step(batch(), objective) for _ in range(count)]
        weights = {
            name: parameter.to_local().detach().cpu().clone()
            for name, parameter in learner.policy.named_parameters()
        }
    finally:
        learner.close()
    return found, weights


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if ALONE not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            ALONE, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "npu"]
        )
    changed = {
        "npu": replace(platform.NPU, collective=ALONE),
        # sums in the same dtype on both
        "cpu": replace(platform.CPU, collective=ALONE, float64=False),
    }
    for name, target in changed.items():
        monkeypatch.setitem(platform.PLATFORMS, name, target)


def test_a_step_is_the_cpus(model: str) -> None:
    expected, weights = steps("cpu", model, "float32", "eager")
    with ByTheCPU() as mode:
        found, ours = steps("npu", model, "float32", "eager")
    assert mode.seen["aten::_fused_adamw_"] == 2, "AdamW as one operator"
    assert mode.float64 == [], "float64 on the device"
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl"):
        assert [row.get(name) for row in found] == [row.get(name) for row in expected], name
    assert found[0]["actor/grad_norm"] > 0
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(ours[name], value), name
    start = dict(steps("cpu", model, "float32", "eager", 0)[1].items())
    assert any(not torch.equal(start[k], weights[k]) for k in start), "the steps changed something"


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


def test_a_step_by_the_operators(model: str) -> None:
    """In bfloat16 the learner takes the fused layers by itself, after comparing one with
    transformers' own on the device; loss and gradient are those of plain layers, but for
    rounding."""
    ascend._triangle.cache_clear()
    with ByTheCPU(REFERENCES) as mode:
        found, _ = steps("npu", model, "bfloat16", "auto", 1)
    with ByTheCPU(SDPA) as plain:
        expected, _ = steps("npu", model, "bfloat16", "sdpa", 1)
    for operator in ascend.OPERATORS.values():
        # once each layer at least, beside the two of the comparison
        assert mode.seen.get(operator, 0) > 4 and operator not in plain.seen
    assert mode.seen["npu::npu_fusion_attention_grad"] > 0
    assert mode.float64 == [], "float64 on the device"
    for name in ("actor/loss", "actor/grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=0.05), name
