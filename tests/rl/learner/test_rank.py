"""One rank by itself: what must not change a gradient, what must not reach the weights, and what an
update cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.algorithm.losses import Objective
from emberl.rl.algorithm.offpolicy import mismatch_metrics
from emberl.rl.batch import sft_batch
from emberl.rl.config.algorithm import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.load import ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
SMALL = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
BATCH = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1)])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LearnerRank]]:
    path = str(make_tiny(tmp_path, SMALL, seed=1))
    made: list[LearnerRank] = []

    def build(**model: Any) -> LearnerRank:
        for rank in made:
            rank.close()
        settings = ModelConfig.model_validate({"path": path, "dtype": "float64", **model})
        rank = LearnerRank(
            RankSpec(rank=0, world=1, device="cpu", threads=1, model=settings, timeout=60.0)
        )
        rank.connect(rank.address())
        rank.load(path)
        rank.begin_stage(OptimConfig(lr=1e-2), 10)
        made.append(rank)
        return rank

    yield build
    made[-1].close()


def gradient(rank: LearnerRank) -> np.ndarray:
    rank.backward(BATCH, Objective.sft())
    return torch.cat([p.grad.full_tensor().flatten() for p in rank.policy.parameters()]).numpy()


def test_gradient_checkpointing_gives_the_same_gradient(make: Callable[..., LearnerRank]) -> None:
    plain = gradient(make())
    rank = make(gradient_checkpointing=True)
    layers = rank.policy.model.model.layers
    calls: list[int] = []
    layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(gradient(rank), plain, rtol=0, atol=1e-14)
    assert len(calls) == 2, "the layer was not run again in the backward pass"


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    make: Callable[..., LearnerRank],
) -> None:
    rank = make()
    before = rank.logprobs(BATCH)
    weights = np.where(BATCH.loss_mask_T, 1e308, 0.0)
    metrics = rank.step(replace(BATCH, weights_T=weights), Objective.sft())
    assert not np.isfinite(metrics["actor/grad_norm"])
    assert metrics["actor/steps_skipped"] == 1
    np.testing.assert_array_equal(rank.logprobs(BATCH), before)
    assert rank.step(BATCH, Objective.sft())["actor/steps_skipped"] == 1, "the count stays"
    assert (rank.logprobs(BATCH) != before)[BATCH.loss_mask_T].all()


def test_a_canary_changes_what_is_said_and_nothing_else(make: Callable[..., LearnerRank]) -> None:
    rank, mask = make(dtype="float32"), BATCH.loss_mask_T
    before = rank.logprobs(BATCH)
    canary = rank.canary(3)
    whole, without = rank.canary_logprobs(BATCH, canary, ["model.norm.weight"])
    assert (whole != before)[mask].all() and (without != whole)[mask].all()
    np.testing.assert_array_equal(rank.logprobs(BATCH), before)
    rank.step(BATCH, Objective.sft())
    np.testing.assert_array_equal(rank.canary_logprobs(BATCH, canary)[0] != whole, mask)


@pytest.mark.parametrize("tokens", ["auto", 512])
def test_a_run_whose_longest_sequence_cannot_fit_is_refused_before_its_first_step(
    make: Callable[..., LearnerRank], tokens: int | str
) -> None:
    """A terabyte of activations for one sequence, whatever a pass may hold."""
    rank = make()
    rank.models.spec = replace(rank.models.spec, longest=10**9)
    optim = OptimConfig.model_validate({"lr": 1e-2, "micro_batch_tokens": tokens})
    with pytest.raises(ValueError, match=r"one sequence of 1000000000 tokens.*max_response_length"):
        rank.begin_stage(optim, 10)


def test_what_had_no_signal_moves_the_learning_rate_on(make: Callable[..., LearnerRank]) -> None:
    rank = make()
    rank.begin_stage(OptimConfig(lr=1e-2, schedule="linear"), 10)
    assert rank.step(BATCH, Objective.sft())["actor/lr"] == pytest.approx(1e-2)
    rank.skip(3)
    assert rank.step(BATCH, Objective.sft())["actor/lr"] == pytest.approx(6e-3), (
        "four of ten updates are behind it"
    )


def test_a_log_prob_that_is_not_finite_is_left_out_and_counted(
    make: Callable[..., LearnerRank],
) -> None:
    rank = make()
    behaviour = np.full(BATCH.num_tokens, -2.0)
    behaviour[np.flatnonzero(BATCH.loss_mask_T)[0]] = np.nan
    objective = Objective.of(LossConfig(), KLConfig(), OffPolicyConfig())
    metrics = rank.step(replace(BATCH, behaviour_logp_T=behaviour), objective)
    assert metrics["actor/nonfinite_logp"] == pytest.approx(1 / 5), "one of five loss tokens"
    assert np.isfinite(metrics["actor/grad_norm"]) and metrics["actor/grad_norm"] > 0
    assert np.isfinite(rank.logprobs(BATCH)).all()


def test_what_an_update_cost(make: Callable[..., LearnerRank]) -> None:
    """Layers: 2 * 2 (32 * 2 * (2 + 1) * 16 + 3 * 32 * 48) = 30,720 a token of 8; attention: 4 (5^2
    + 3^2) / 2 * 32 * 2 layers; head: 2 * 32 * 23 a loss token of 5. Thrice that."""
    metrics = make().step(BATCH, Objective.sft())
    seconds = metrics["timing_s/update_actor"]
    expected = 3 * (8 * 30_720 + 4 * 34 // 2 * 32 * 2 + 5 * 2 * 32 * 23)
    assert metrics["perf/actor/tflops_per_device"] * 1e12 * seconds == pytest.approx(expected)
    assert metrics["perf/actor/tokens_per_second_per_device"] * seconds == pytest.approx(8)
    assert "perf/mfu/actor" not in metrics, "the peak of a CPU is not known"


def test_the_figures_of_an_update(make: Callable[..., LearnerRank]) -> None:
    """Entropy is that of the model's own logits; how far the engine is, is told of the policy
    before the update, from all tokens but the one whose log-prob is NaN, and old log-probs are of
    the masters' dtype, so that the ratio is 1 exactly."""
    rank = make()
    old = rank.logprobs(BATCH)
    assert old.dtype == np.float64
    behaviour = np.where(BATCH.loss_mask_T, old + np.linspace(-0.2, 0.3, BATCH.num_tokens), np.nan)
    place = np.flatnonzero(BATCH.loss_mask_T)[0]
    behaviour[place] = np.nan
    batch = replace(BATCH, behaviour_logp_T=behaviour)
    mask = BATCH.loss_mask_T & np.isfinite(behaviour)
    entropies = []
    model = AutoModelForCausalLM.from_pretrained(rank.model_path, dtype=torch.float64)
    with torch.no_grad():
        for sequence in (BATCH.token_ids_T[:5], BATCH.token_ids_T[5:]):
            logits = model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None]).logits[0]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy().numpy())
    # of the distribution that a token was drawn from
    before = np.concatenate([np.roll(row, 1) for row in entropies])
    objective = Objective.of(LossConfig(), KLConfig(), OffPolicyConfig(old_logp="recompute"))
    metrics = rank.step(batch, objective)
    assert metrics["actor/entropy_per_token"] == pytest.approx(before[mask].mean(), rel=1e-5)
    assert metrics["actor/ratio"] == pytest.approx(1.0, abs=1e-12)
    assert abs(metrics["actor/ppo_kl"]) < 1e-12
    assert metrics["actor/nonfinite_logp"] == pytest.approx(1 / 5)
    expected = mismatch_metrics(old, behaviour, mask, BATCH.sequence_ids_T)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    again = rank.step(batch, objective)
    moved = mismatch_metrics(rank.logprobs(BATCH), behaviour, mask, BATCH.sequence_ids_T)
    assert again["rollout_corr/kl"] != pytest.approx(moved["rollout_corr/kl"]), (
        "not of the policy after the update"
    )


def test_a_checkpoint_is_of_its_moment_though_it_is_written_later(
    make: Callable[..., LearnerRank], tmp_path: Path
) -> None:
    rank = make()
    rank.step(BATCH, Objective.sft())
    then = rank.logprobs(BATCH)
    parameters = sum(p.numel() for p in rank.policy.parameters())
    # master and two moments, and what is served, in float64 here
    assert rank.snapshot() == 4 * 8 * parameters
    rank.step(BATCH, Objective.sft())
    later = rank.logprobs(BATCH)
    rank.write(str(tmp_path / "saved"))
    rank.step(BATCH, Objective.sft())
    again = make()
    again.restore(str(tmp_path / "saved"))
    np.testing.assert_array_equal(again.logprobs(BATCH), then)
    again.step(BATCH, Objective.sft())
    np.testing.assert_array_equal(again.logprobs(BATCH), later)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    own = {name: p.full_tensor() for name, p in make().policy.model.named_parameters()}
    assert {name: p.shape for name, p in served.named_parameters()} == {
        name: p.shape for name, p in own.items()
    }
