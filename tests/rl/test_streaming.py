"""Steps in parts: the same gradient as of the whole step, whatever the aggregation and the
split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.advantages import group_advantages
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import denominator, make_batch
from emberl.rl.checkpoints import Progress
from emberl.rl.config.algorithm import AdvantageConfig, KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.data import TinyConfig
from emberl.rl.config.load import ModelConfig, OptimConfig, resolve
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Group
from emberl.rl.learner.rank import LearnerRank, RankSpec
from emberl.rl.trainer import pooled, update
from emberl.rollout.samples import Completion, Prompt, Span

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def group(number: int, lengths: Sequence[int], scores: Sequence[float | None]) -> Group:
    rng = np.random.default_rng(number)
    prompt = Prompt(id=f"p{number}", token_ids=(3, 4 + number % 5), answer="", source="test")
    completions = tuple(
        Completion(
            prompt_id=prompt.id,
            sample=i,
            token_ids=rng.integers(4, 18, n).astype(np.int32),
            logprobs=(-2.5 + 0.3 * rng.standard_normal(n)).astype(np.float32),
            spans=(Span(0, 0, n),),
            finish_reason="stop",
        )
        for i, n in enumerate(lengths)
    )
    verdicts = tuple(
        Verdict(
            status=Status.VERIFIER_ERROR if s is None else Status.CORRECT if s else Status.WRONG,
            score=s,
            parts={},
        )
        for s in scores
    )
    return Group(prompt=prompt, completions=completions, verdicts=verdicts)


GROUPS = [
    group(0, (3, 9, 5, 2), (1.0, 0.0, 0.0, 1.0)),
    # no signal: it trains nothing, and denominators count it
    group(1, (4, 4, 12, 7), (0.0, 0.0, 0.0, 0.0)),
    group(2, (6, 1, 3, 8), (1.0, None, 0.0, 0.0)),  # one without a verdict counts nowhere
    group(3, (10, 5, 2, 2), (0.0, 1.0, 1.0, 1.0)),
    group(4, (1, 7, 6, 11), (1.0, 1.0, 0.0, 1.0)),
]


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerRank]:
    tiny = TinyConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    path = str(make_tiny(tmp_path_factory.mktemp("model"), tiny, seed=1))
    model = ModelConfig.model_validate({"path": path, "dtype": "float64"})
    learner = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=model, timeout=60.0)
    )
    learner.connect(learner.address())
    learner.load(path)
    learner.begin_stage(OptimConfig(lr=1e-2, micro_batch_tokens=40), 100)
    yield learner
    learner.close()


def gradient(rank: LearnerRank) -> np.ndarray:
    row = torch.cat(
        [p.grad.full_tensor().flatten() for p in rank.policy.parameters() if p.grad is not None]
    )
    rank.policy.zero_grad(set_to_none=True)
    return row.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_parts_add_up_to_the_step(rank: LearnerRank, aggregation: str) -> None:
    loss = LossConfig.model_validate({"aggregation": aggregation})
    advantage = AdvantageConfig()
    objective = Objective.of(loss, KLConfig(), OffPolicyConfig())
    scored = [
        g.with_advantages(a)
        for g, a in zip(
            GROUPS, group_advantages([g.scores for g in GROUPS], advantage), strict=True
        )
    ]
    batch = make_batch(scored, loss, advantage, max_length=12)
    assert batch is not None
    whole_loss, _ = rank.backward(batch, objective)
    whole = gradient(rank)
    for split in ([[0, 1], [2, 3, 4]], [[4], [1], [3, 0, 2]]):
        total, losses = 0, 0.0
        for part in split:
            members = [scored[i] for i in part]
            counted = denominator(members, loss)
            total += counted
            piece = make_batch(members, loss, advantage, max_length=12)
            if piece is not None:
                losses += rank.backward(
                    replace(piece, weights_T=piece.weights_T * counted), objective
                )[0]
        # transformers' norms compute in float32, so a gradient of another scale is rounded
        # elsewhere
        np.testing.assert_allclose(
            gradient(rank) / total, whole, rtol=0, atol=1e-6 * np.abs(whole).max()
        )
        assert losses / total == pytest.approx(whole_loss, rel=1e-10)


@pytest.mark.slow
def test_finish_is_the_step_with_the_mended_gradient(rank: LearnerRank) -> None:
    """The gradient norm, which is not invariant under scaling as Adam's first step is, shows that
    the factor was applied."""
    loss, advantage = LossConfig(), AdvantageConfig()
    objective = Objective.of(loss, KLConfig(), OffPolicyConfig())
    scored = [
        g.with_advantages(a)
        for g, a in zip(
            GROUPS, group_advantages([g.scores for g in GROUPS], advantage), strict=True
        )
    ]
    batch = make_batch(scored, loss, advantage, max_length=12)
    assert batch is not None
    rank.backward(batch, objective)
    norm = float(np.linalg.norm(gradient(rank)))
    for part in (scored[:2], scored[2:]):
        piece = make_batch(part, loss, advantage, max_length=12)
        assert piece is not None
        rank.accumulate(
            replace(piece, weights_T=piece.weights_T * denominator(part, loss)), objective
        )
    assert rank.finish(1 / denominator(scored, loss))["actor/grad_norm"] == pytest.approx(
        norm, rel=1e-6
    )


def test_denominators_by_hand() -> None:
    token_mean, sequences = (
        LossConfig(aggregation="token-mean"),
        LossConfig(aggregation="seq-mean-token-sum"),
    )
    assert denominator(GROUPS[:2], token_mean) == 3 + 9 + 5 + 2 + 4 + 4 + 12 + 7
    assert denominator(GROUPS[2:3], token_mean) == 6 + 3 + 8
    assert denominator(GROUPS[:3], sequences) == 4 + 4 + 3


def test_metrics_of_parts_are_pooled_by_their_tokens() -> None:
    parts = [{"actor/pg_loss": 2.0, "x": 1.0, "y_max": 5.0, "timing_s/update_actor": 1.0}] * 2
    parts[1] = {"actor/pg_loss": 3.0, "x": 4.0, "y_max": 2.0, "timing_s/update_actor": 0.5}
    found = pooled(parts, [30, 10])
    assert found == {"actor/pg_loss": 5.0, "x": 1.75, "y_max": 5.0, "timing_s/update_actor": 1.5}


def test_parts_without_a_signal_are_told_to_the_learners() -> None:
    """Of two minibatches over two epochs one had a signal: two updates, and two that count without
    being made."""
    tree = {"name": "x", "model": {"path": "m"}, "data": {"source": "arithmetic"}}
    config = resolve(
        {**tree, "schedule": {"minibatches": 2, "epochs": 2}, "filter": {"zero_variance": False}}
    )
    calls: list[object] = []
    learners = SimpleNamespace(
        step=lambda batch, objective: calls.append("step") or {},
        logprobs=lambda batch, temperature: batch.behaviour_logp_T,
        skip=calls.append,
    )
    run: Any = SimpleNamespace(
        config=config, learners=learners, progress=Progress(), publish=lambda wait: {}
    )
    scored = [
        g.with_advantages(a)
        for g, a in zip(GROUPS[:2], ([1.0, -1.0, -1.0, 1.0], [0.0] * 4), strict=True)
    ]
    objective = Objective.of(config.loss, config.kl, config.offpolicy)
    assert update(run, scored, objective)["training/updates"] == 2
    assert calls == ["step", "step", 2]
    calls.clear()
    assert update(run, [], objective)["training/updates"] == 0
    assert calls == [4]


def test_what_needs_the_whole_step_is_refused() -> None:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"source": "arithmetic"},
        "schedule": {"stream_parts": 2},
    }
    assert resolve(tree).schedule.stream_parts == 2
    with pytest.raises(
        ValueError, match=r"schedule.stream_parts=2 .* advantage.std=batch needs all"
    ):
        resolve({**tree, "advantage": {"std": "batch"}})
    with pytest.raises(ValueError, match=r"schedule.epochs=2"):
        resolve({**tree, "schedule": {"stream_parts": 2, "epochs": 2}})
