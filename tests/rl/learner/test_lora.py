"""Adapters: what is trained, what is served, and what a resumed run has again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import sft_batch
from emberl.rl.config.load import CriticConfig, LoraConfig, ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner.checkpoint import full_tensors
from emberl.rl.learner.lora import inject_adapters, merged_tensors
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("peft", reason="peft (the extra `lora`) is not installed")
SMALL = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
BATCH = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1)])


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(make_tiny(tmp_path / "model", SMALL, seed=1))


def test_merged_weights_are_the_adapted_model_under_the_plain_names(path: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    adapted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    inject_adapters(adapted, LoraConfig(rank=2, alpha=6, targets=("q_proj", "down_proj")))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2, "A and B of two layers' two weights"
    torch.manual_seed(0)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.3)
    merged = dict(merged_tensors(adapted))
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    down, up = (trained[f"model.layers.1.mlp.down_proj.lora_{x}.default.weight"] for x in "AB")
    base = plain.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(
        merged["model.layers.1.mlp.down_proj.weight"], base + 3.0 * up @ down
    )
    ids = torch.tensor([[3, 4, 7, 8, 1]])
    with torch.no_grad():
        expected, before = adapted(ids).logits, plain(ids).logits
        plain.load_state_dict(merged, strict=False)
        torch.testing.assert_close(plain(ids).logits, expected)
    assert (expected - before).abs().max() > 0.1


def test_a_target_that_no_layer_has(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match=r"model.lora.targets=\['nonsense'\] cannot be adapted"):
        inject_adapters(model, LoraConfig(targets=("nonsense",)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "lm_head shares its weight with another layer"),
        ("embed_tokens", "embed_tokens is of type Embedding"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_whose_merged_weight_could_not_be_served(
    path: str, device: str, target: str, message: str
) -> None:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, LoraConfig(targets=("q_proj", target)))


def rank(path: str, *targets: str) -> LearnerRank:
    settings = ModelConfig(path=path, dtype="float32", lora=LoraConfig(rank=2, targets=targets))
    learner = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=settings, timeout=60.0)
    )
    learner.connect(learner.address())
    learner.load(path)
    learner.begin_stage(OptimConfig(lr=1e-2), 10, reference=True)
    return learner


def served(learner: LearnerRank) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in full_tensors(learner.policy, torch.float32)}


@pytest.fixture
def untied(path: str) -> str:
    config = AutoConfig.from_pretrained(path)
    config.tie_word_embeddings = False
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.slow
def test_only_adapters_move_and_they_come_back(untied: str, tmp_path: Path) -> None:
    path, targets = untied, ("q_proj", "lm_head")
    learner = rank(path, *targets)
    before = served(learner)
    first = learner.logprobs(BATCH)
    for _ in range(3):
        learner.step(BATCH, Objective.sft())
    after = served(learner)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)),
    }
    trained, reference = learner.logprobs(BATCH), learner.reference_logprobs(BATCH)
    assert (reference == first).all() and not (trained == first).all()
    learner.save(str(tmp_path / "saved"))
    learner.close()
    again = rank(path, *targets)
    again.restore(str(tmp_path / "saved"))
    assert (again.logprobs(BATCH) == trained).all()
    again.begin_stage(OptimConfig(), 1, CriticConfig())
    assert again.critic is not None
    body = {
        f"model.{name}": p.full_tensor() for name, p in again.critic.module.body.named_parameters()
    }
    merged = {name: p.detach().numpy().tobytes() for name, p in body.items()}
    assert merged == {n: t for n, t in after.items() if n in merged}, (
        "a critic starts from what is served, not from the model's files"
    )
    again.close()
    anybodys = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert {name: p.detach().numpy().tobytes() for name, p in anybodys.named_parameters()} == after
