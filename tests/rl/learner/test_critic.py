"""The critic: its first word, and that it learns what it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emberl.rl.batch import sft_batch
from emberl.rl.config.load import CriticConfig, ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank


@pytest.fixture
def learner(tmp_path: Path) -> LearnerRank:
    small = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    path = str(make_tiny(tmp_path, small, seed=1))
    rank = LearnerRank(
        RankSpec(
            rank=0,
            world=1,
            device="cpu",
            threads=1,
            model=ModelConfig(path=path, dtype="float32"),
            timeout=60.0,
        )
    )
    rank.connect(rank.address())
    rank.load(path)
    yield rank
    rank.close()


@pytest.mark.slow
def test_it_says_nothing_at_first_and_then_what_it_was_told(learner: LearnerRank) -> None:
    batch = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1)])
    returns = np.where(
        batch.loss_mask_T, batch.sequence_ids_T * 2.0 - 1.0, np.nan
    )  # -1 for the first, 1 for the second
    learner.begin_stage(OptimConfig(), 100, CriticConfig(lr=1e-2, clip=None))
    before = learner.values(batch)
    assert not before.any()
    policy = learner.logprobs(batch)
    for _ in range(60):
        metrics = learner.critic_step(replace(batch, values_T=before, returns_T=returns))
    assert metrics["critic/vf_loss"] < 0.01, "it began at 0.5"
    np.testing.assert_allclose(
        learner.values(batch)[batch.loss_mask_T], returns[batch.loss_mask_T], atol=0.2
    )
    np.testing.assert_array_equal(
        learner.logprobs(batch), policy, "the policy has a body of its own"
    )


@pytest.mark.slow
def test_it_starts_from_the_body_of_the_policy_as_it_is(learner: LearnerRank) -> None:
    learner.begin_stage(OptimConfig(lr=1e-2), 1)
    from emberl.rl.algorithm.losses import Objective

    learner.step(sft_batch([((3, 4, 7, 8, 1), 2)]), Objective.sft())
    learner.begin_stage(OptimConfig(), 1, CriticConfig())
    assert learner.critic is not None
    critic = dict(learner.critic.module.body.named_parameters())
    for name, parameter in learner.policy.model.model.named_parameters():
        assert torch.equal(critic[name].full_tensor(), parameter.full_tensor()), name
