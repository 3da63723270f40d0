"""The learner's whole step on `npu` under FakeTensor, as one of two ranks: forward, fused loss,
backward, FSDP2 with its collectives, the norm over the ranks, clipping, AdamW.

Shown: each operation on the way exists for the device, takes what it is given (shapes, dtypes,
devices: torch-npu's own meta functions) and has a gradient there; what is sharded, gathered and
reduced, in which dtype; nothing is float64; what waits for the device. Not shown: any value, any
constraint that only a kernel checks, HCCL itself (the group is torch's fake one), and what is read
back by the host, which is invented here (`NUMBER`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 -- registers the device
from emberl.kernels import ascend, platform
from emberl.kernels.loss import fused_loss
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import sft_batch
from emberl.rl.config.algorithm import KLConfig, LossConfig
from emberl.rl.config.load import CriticConfig, ModelConfig, OptimConfig
from emberl.rl.groups import Batch
from emberl.rl.learner import layers
from emberl.rl.learner.model_loader import ModelLoader, RankSpec
from emberl.rl.learner.rank import LearnerRank
from references import ALONE, register
from seen import Seen
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

SHOWS = {
    "the whole learner step with FSDP2 on npu: Llama, Qwen2, Qwen3 (FakeTensor)": (
        "test_a_step_of_one_rank_of_two, test_a_critic_step_too"
    ),
    "a reference in host memory beside the policy, KL in the loss, FSDP2 on npu (FakeTensor)": (
        "test_a_reference_lies_in_host_memory_between_its_passes"
    ),
}
FAMILIES = ("llama", "qwen2", "qwen3")
LAYERS, WORLD = 2, 2
NUMBER = 0.01
"""What every number is that the host reads."""


class Recorded(Seen):
    """Gives the host its numbers, too, and notes what is reduced and copied."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: set[torch.dtype] = set()
        self.copied: set[tuple[str, str]] = set()
        """From which kind of device to which other one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if args[0].dtype == torch.bool:
                return True
            return NUMBER if args[0].dtype.is_floating_point else 1 << 36
        if name == "aten::nonzero" and isinstance(args[0], FakeTensor):
            # rows that are out of bounds or not finite: none; rows with a gradient: all
            rows = 0 if args[0].dtype == torch.bool else len(args[0])
            return torch.empty((rows, args[0].ndim), dtype=torch.long, device=args[0].device)
        if name == "aten::_unique2" and isinstance(args[0], FakeTensor):  # no token twice
            return args[0], torch.empty_like(args[0]), torch.empty_like(args[0])
        if name == "c10d::_reduce_scatter_base_":
            self.reduced.add(args[1].dtype)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("aten::copy_", "aten::_to_copy"):
            source = args[1] if name == "aten::copy_" else args[0]
            self.copied.add((source.device.type, out.device.type))
        return out


class Unread(ModelLoader):
    """Its models have the configuration of the files and no weights of them, and are made on the
    device: a fake tensor cannot be moved to another in its place."""

    def _read(self, auto: Any, path: str) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
        with self.device:
            made = auto.from_config(config, attn_implementation=self.attention, dtype=torch.float32)
        if self.spec.model.gradient_checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made


def configuration(folder: Path, family: str) -> str:
    """The vocabulary is beyond what the loss takes whole."""
    sizes = {
        "model_type": family, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.joinpath("config.json").write_text(json.dumps(sizes))
    return str(folder)


def batch() -> Batch:
    lengths = [9, 21, 14, 6, 17, 30]
    found = sft_batch([([7] * n, 3) for n in lengths])
    return replace(
        found,
        behaviour_logp_T=np.where(found.loss_mask_T, -2.0, 0.0).astype(np.float32),
        advantages_T=np.repeat(np.array([1.0, -1.0] * 3), lengths),
    )


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two ranks, of which this is the first; what the host reads of a tensor is NUMBER."""
    whole = {"tolist": torch.Tensor.tolist, "numpy": torch.Tensor.numpy}

    def tolist(tensor: Any) -> Any:
        fakes = isinstance(tensor, FakeTensor)
        return np.full(tensor.shape, NUMBER).tolist() if fakes else whole["tolist"](tensor)

    def numpy(tensor: Any, **given: Any) -> Any:
        fakes = isinstance(tensor, FakeTensor)
        return np.full(tensor.shape, NUMBER) if fakes else whole["numpy"](tensor, **given)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    # unknown to FakeTensorMode; `test_runtime.py` has real ones
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(platform, "memory_statistics", lambda *_: {})
    # whether the layers agree needs values: `test_learner.py`
    monkeypatch.setattr(layers, "_distance", lambda *_: 0.0)
    ascend._triangle.cache_clear()
    register()
    dist.init_process_group(ALONE, store=FakeStore(), rank=0, world_size=WORLD)
    yield
    dist.destroy_process_group()
    ascend._triangle.cache_clear()


def learner(path: str, **model: Any) -> LearnerRank:
    settings = ModelConfig.model_validate({"path": path, "dtype": "bfloat16", **model})
    made = LearnerRank(
        RankSpec(rank=0, world=WORLD, device="npu", threads=1, model=settings, timeout=60.0)
    )
    made.models = Unread(made.spec)
    with unset_fake_temporarily():
        made.models.open(path)
    with Recorded():
        made.policy = made.models.load_policy()
    return made


CLIP = NUMBER / 2
"""Below every norm, so that clipping happens."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_step_of_one_rank_of_two(family: str, checkpointing: bool, tmp_path: Path) -> None:
    path = configuration(tmp_path, family)
    objective = Objective(loss=LossConfig(clip_high=0.28, entropy_coef=0.01))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = learner(path, gradient_checkpointing=checkpointing)
        assert made.models.fused and made.models.packed, "the operators' layers, packed rows"
        assert made.models.shares_prompts, "three tokens that all six sequences begin with"
        assert made.models.vocabulary > fused_loss.SMALL_VOCABULARY, "the loss goes by chunks"
        made.begin_stage(OptimConfig(lr=1e-3, grad_clip=CLIP, micro_batch_tokens=64), 10)
        before = {name: p.to_local() for name, p in made.policy.named_parameters()}
        with Recorded() as seen:
            metrics = made.step(batch(), objective)
    passes = seen.count["c10d::_reduce_scatter_base_"]
    assert passes % (LAYERS + 1) == 0, "each layer's gradients, and those of the rest"
    assert seen.reduced == {torch.float32}, "gradients are summed in float32"
    assert seen.count["c10d::_allgather_base_"] >= LAYERS + 1
    for operator in ascend.OPERATORS.values():
        assert seen.count.get(operator, 0) >= LAYERS, operator
    assert seen.count["npu::npu_fusion_attention_grad"] >= LAYERS
    assert seen.count["aten::_foreach_mul_"] == 1, "clipped"
    assert seen.count["aten::_fused_adamw_"] == 1, "AdamW as one operator"
    assert seen.count["c10d::allreduce_"] == 3, "log-probs, the loss's sums, the norm"
    assert seen.float64 == set()
    assert metrics["actor/grad_norm"] == NUMBER and metrics["actor/steps_skipped"] == 0
    for name, parameter in made.policy.named_parameters():
        local = parameter.to_local()
        assert local is not None and local.shape == before[name].shape
        assert local.device == torch.device("npu", 0) and local.dtype == torch.float32, name
        assert parameter.shape[0] == local.shape[0] * WORLD, "half of each is here"


def test_a_critic_step_too(tmp_path: Path) -> None:
    path = configuration(tmp_path, "qwen3")
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = learner(path)
        optim = OptimConfig(lr=1e-3, grad_clip=CLIP, micro_batch_tokens=64)
        with Recorded() as seen:
            with made.models.device:  # the critic's own head, too
                made.begin_stage(optim, 10, CriticConfig())
            rows = batch()
            values = made.values(rows)
            rows = replace(rows, values_T=values, returns_T=values)
            found = made.critic_step(rows) | made.step(rows, Objective(loss=LossConfig()))
    assert seen.count["aten::_fused_adamw_"] == 2, "policy and critic"
    assert seen.float64 == set()
    assert {"critic/vf_loss", "critic/grad_norm", "actor/loss"} <= found.keys()


def test_a_reference_lies_in_host_memory_between_its_passes(tmp_path: Path) -> None:
    """FSDP2 brings one layer of it at a time to the device, in the dtype of the passes, and its
    log-probs go into the loss. Its weights are not trained."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = learner(configuration(tmp_path, "qwen2"))
        optim = OptimConfig(lr=1e-3, grad_clip=CLIP, micro_batch_tokens=64)
        with Recorded(), made.models.device:
            made.begin_stage(optim, 10, reference=True)
        assert made.reference is not None
        lies = {p.to_local().device.type for p in made.reference.parameters()}
        assert lies == {"cpu"}
        rows = batch()
        with Recorded() as seen:
            logp = made.reference_logprobs(rows)
        passes = seen.count["npu::npu_fusion_attention"] // LAYERS
        # each part is copied to the device, then gathered over the ranks
        assert seen.count["c10d::_allgather_base_"] == passes * (LAYERS + 1)
        assert ("cpu", "npu") in seen.copied
        assert {p.to_local().device.type for p in made.reference.parameters()} == {"cpu"}
        rows = replace(rows, reference_logp_T=logp)
        objective = Objective(loss=LossConfig(), kl=KLConfig(place="loss", coef=0.01))
        with Recorded() as step:
            found = made.step(rows, objective)
    assert seen.float64 | step.float64 == set()
    assert step.count["aten::_fused_adamw_"] == 1 and "actor/kl_loss" in found
