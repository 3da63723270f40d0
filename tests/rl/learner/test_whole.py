"""A model that one rank has all of, beside the same under FSDP2: bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import sft_batch
from emberl.rl.config.load import CriticConfig, ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner import model_loader
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.learner.trainable import shard

pytestmark = pytest.mark.slow
SMALL = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
BATCH = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1), ((4, 4, 6, 2, 9, 1), 3)])


def updated(path: str, dtype: str) -> dict[str, torch.Tensor]:
    """The weights after two updates of two passes each, and what the ranks say of each token."""
    model = ModelConfig.model_validate({"path": path, "dtype": dtype})
    rank = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=model, timeout=60.0)
    )
    rank.connect(rank.address())
    try:
        rank.load(path)
        optim = OptimConfig(lr=1e-2, micro_batch_tokens=12)
        rank.begin_stage(optim, 10, CriticConfig(), reference=True)
        for _ in range(2):
            rank.step(BATCH, Objective.sft())
        found = {n: p.full_tensor().clone() for n, p in rank.policy.named_parameters()}
        for name, said in (
            ("policy", rank.logprobs(BATCH)),
            ("reference", rank.reference_logprobs(BATCH)),
            ("critic", rank.values(BATCH)),
        ):
            found[name] = torch.from_numpy(said)
        return found
    finally:
        rank.close()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_it_trains_as_fsdp_does(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_tiny(tmp_path, SMALL, seed=1))
    whole = updated(path, dtype)

    def by_fsdp(module: Any, mesh: Any, compute: torch.dtype) -> None:
        layers = module.body.layers if hasattr(module, "body") else []
        if hasattr(module, "model"):
            layers = module.model.model.layers
        master = torch.float64 if dtype == "float64" else torch.float32
        cpu = torch.device("cpu")
        shard(module, layers, mesh, compute, device=cpu, master=master, keep=True)

    monkeypatch.setattr(model_loader, "keep_whole", by_fsdp)
    sharded = updated(path, dtype)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert not torch.equal(whole["policy"], whole["reference"]), "nothing was learnt"
