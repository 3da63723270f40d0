"""The supervised loss and its gradient against a plain implementation, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import example_batch
from emberl.rl.config.load import ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.demonstrations import Example
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.learner.rates import learning_rate
from transformers import AutoModelForCausalLM, get_scheduler

pytestmark = pytest.mark.slow
SMALL = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
EXAMPLES = [  # two answers in one, an answer at the end, one of a single token
    Example(
        token_ids=(3, 4, 7, 8, 1, 5, 6, 9, 2, 1),
        learnt=np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 1], bool),
    ),
    Example(token_ids=(5, 9, 9, 4), learnt=np.array([0, 0, 1, 1], bool)),
    Example(token_ids=(6, 1), learnt=np.array([0, 1], bool)),
]


def plain(path: str) -> tuple[float, torch.Tensor]:
    """Each sequence by itself through transformers; the mean cross entropy of the learnt tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in EXAMPLES:
        ids = torch.tensor([example.token_ids])
        logp = model(ids).logits[0].log_softmax(-1)
        for at in np.flatnonzero(example.learnt):
            total = total - logp[at - 1, example.token_ids[at]]
            count += 1
    (total / count).backward()
    return float(total.detach()) / count, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("tokens", [4, 1024])
def test_loss_and_gradient_are_those_of_a_plain_implementation(
    tmp_path: Path, packing: str, tokens: int
) -> None:
    """Packed or padded, in one pass or in several: no answer sees another document."""
    path = str(make_tiny(tmp_path, SMALL, seed=1))
    settings = ModelConfig.model_validate({"path": path, "dtype": "float64", "packing": packing})
    rank = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=settings, timeout=60.0)
    )
    rank.connect(rank.address())
    try:
        rank.load(path)
        rank.begin_stage(OptimConfig(micro_batch_tokens=tokens), 10)
        loss, _ = rank.backward(example_batch(EXAMPLES), Objective.sft())
        found = torch.cat([p.grad.full_tensor().flatten() for p in rank.policy.parameters()])
    finally:
        rank.close()
    expected, gradient = plain(path)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert float((found - gradient).abs().max()) < 1e-12 * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("schedule", "least", "theirs"),
    [
        ("constant", 0.0, "constant_with_warmup"),
        ("linear", 0.0, "linear"),
        ("cosine", 0.0, "cosine"),
        ("cosine", 0.1, "cosine_with_min_lr"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_is_that_of_transformers(
    schedule: str, least: float, theirs: str, warmup: int
) -> None:
    """To the bit, and DeepSeek-R1's supervised stages go from 5e-5 down to 5e-6."""
    optimizer, other = (torch.optim.SGD([torch.zeros(1)], lr=5e-5) for _ in range(2))
    settings = OptimConfig(schedule=schedule, min_lr_ratio=least, warmup_steps=warmup)
    ours = learning_rate(optimizer, settings, 10)
    ends = {"min_lr_rate": least} if least else None
    expected = get_scheduler(theirs, other, warmup, 10, scheduler_specific_kwargs=ends)
    for update in range(12):
        assert ours.get_last_lr() == expected.get_last_lr(), update
        if (schedule, least, update) == ("cosine", 0.1, 10):
            assert ours.get_last_lr() == pytest.approx([5e-6])
        for each in (optimizer, other, ours, expected):
            each.step()
