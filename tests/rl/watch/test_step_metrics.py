"""Each metric that has verl's name has verl's value: recorded results of its own functions, and
hand-computed numbers for what they do not cover (tokens that were left out, log-probs that are not
finite, several updates, parts of a step)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.loss.terms import TokenStats
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective, token_loss
from emberl.rl.algorithm.offpolicy import correction, mismatch_metrics
from emberl.rl.algorithm.surrogates import value_loss
from emberl.rl.batch import flat_batch, with_token_advantages
from emberl.rl.config.algorithm import AdvantageConfig, KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.evaluate import summarise
from emberl.rl.groups import Batch, Group
from emberl.rl.learner.training_step import token_means
from emberl.rl.watch.step_metrics import (
    averages,
    batch_metrics,
    check_engine_logprobs,
    explained_variance,
    sample_metrics,
    speed_metrics,
)
from emberl.rollout.samples import Completion, Prompt, Span

RECORDED = json.loads((Path(__file__).parent / "verl_metrics.json").read_text())
GIVEN, VERL = RECORDED["inputs"], RECORDED["verl"]


def flat(name: str) -> np.ndarray:
    return np.array([value for row in GIVEN[name] for value in row])


def groups() -> list[Group]:
    """One group for each sequence, since their prompts have different lengths."""
    found = []
    for i, (row, score, length) in enumerate(
        zip(GIVEN["rollout"], GIVEN["scores"], GIVEN["prompt_lengths"], strict=True)
    ):
        completion = Completion(
            prompt_id=str(i), sample=0, token_ids=np.arange(len(row), dtype=np.int32),
            logprobs=np.array(row, np.float64), spans=(Span(0, 0, len(row)),), finish_reason="stop",
        )  # fmt: skip
        status = {1.0: Status.CORRECT, 0.0: Status.WRONG}.get(score, Status.PARTIAL)
        found.append(
            Group(
                prompt=Prompt(id=str(i), token_ids=tuple(range(length)), answer="", source="math"),
                completions=(completion,),
                verdicts=(Verdict(status=status, score=score),),
                advantages=np.array([score]),
            )
        )
    return found


def estimated(batch: Batch) -> Batch:
    """The batch with the recorded log-probs and values at its loss tokens, and the engine's in
    float64."""

    def row(name: str) -> np.ndarray:
        values = np.full(batch.num_tokens, np.nan)
        values[batch.loss_mask_T] = flat(name)
        return values

    return replace(
        batch,
        behaviour_logp_T=row("rollout"),
        old_logp_T=row("old"),
        reference_logp_T=row("reference"),
        values_T=row("values"),
    )


def whole(
    advantage: AdvantageConfig, kl: KLConfig | None = None, aggregation: Any = "token-mean"
) -> Batch:
    flat = flat_batch(groups(), LossConfig(aggregation=aggregation), max_length=7)
    assert flat is not None
    return with_token_advantages(estimated(flat), advantage, kl)


PPO = AdvantageConfig(kind="gae", lam=GIVEN["lam"], whiten=True)
IN_REWARD = KLConfig(place="reward", estimator="k1", coef=GIVEN["kl_coef"])


def close(found: dict[str, float], expected: dict[str, float], rel: float = 2e-6) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=rel, abs=1e-8)


def test_figures_of_samples_and_of_the_batch() -> None:
    batch = whole(PPO, IN_REWARD)
    shaped = [group.scores for group in groups()]
    found = sample_metrics(groups(), groups(), shaped, longest=GIVEN["longest"], longest_prompt=5)
    found |= batch_metrics([batch], OffPolicyConfig(), GIVEN["kl_coef"])
    close(found, {name: value for name, value in VERL["data"].items() if "non_aborted" not in name})
    close(found, VERL["rollout"])
    speed = speed_metrics(found["perf/total_num_tokens"], 22, GIVEN["seconds"], GIVEN["devices"])
    close(found | speed, VERL["speed"])


@pytest.mark.parametrize(
    ("recorded", "settings"),
    [
        ("token 1.3", {"weight": "token", "high": 1.3}),
        ("sequence 1.3", {"weight": "sequence", "high": 1.3}),
        ("token 0.7_1.3", {"weight": "token", "mode": "mask", "low": 0.7, "high": 1.3}),
    ],
)
def test_figures_of_importance_weights(recorded: str, settings: dict[str, Any]) -> None:
    batch = whole(PPO)
    config = OffPolicyConfig(old_logp="recompute", **settings)
    assert batch.old_logp_T is not None
    found = correction(
        batch.old_logp_T, batch.behaviour_logp_T, batch.loss_mask_T, batch.sequence_ids_T, config
    )
    close(found.metrics, VERL["weights"][recorded])
    close(batch_metrics([batch], config, 0.0), VERL["weights"][recorded] | VERL["rollout"])


def actor(
    aggregation: str, batch: Batch, advantages: np.ndarray, logp: np.ndarray, **loss: Any
) -> dict[str, float]:
    """The actor's metrics of one pass, as the learner's rank makes them."""
    settings = {
        "clip_low": 0.2,
        "clip_high": GIVEN["clip_high"],
        "dual_clip": GIVEN["dual_clip"],
        **loss,
    }
    objective = Objective.of(
        LossConfig(aggregation=aggregation, **settings),  # type: ignore[arg-type]
        KLConfig(place="loss", coef=0.1),
        OffPolicyConfig(old_logp="recompute"),
    )
    batch = replace(batch, advantages_T=advantages)
    index = np.flatnonzero(batch.loss_mask_T)
    function = token_loss(
        objective,
        batch,
        torch.device("cpu"),
        old_logp=batch.old_logp_T,
        reference_logp=batch.reference_logp_T,
    )
    entropy = torch.from_numpy(flat("entropy")[: len(index)])
    stats = TokenStats(logp=torch.from_numpy(logp[index]), one_minus_p=entropy, entropy=entropy)
    terms = function(stats, torch.from_numpy(index))
    sums = {name: float(values.double().sum()) for name, values in terms.metrics.items()}
    found = token_means(sums, batch, function)
    parts = (
        found["actor/pg_loss"]
        + 0.1 * found["actor/kl_loss"]
        - settings.get("entropy_coef", 0) * found["actor/entropy"]
    )
    assert float(terms.loss.sum()) == pytest.approx(parts), "the terms add up to the loss"
    return found


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
def test_terms_of_the_loss(aggregation: str, entropy_coef: float) -> None:
    """pg_loss is the policy-gradient term alone, whatever else is in the loss."""
    batch = whole(AdvantageConfig(), aggregation=aggregation)
    logp, advantages = (np.full(batch.num_tokens, np.nan) for _ in range(2))
    logp[batch.loss_mask_T] = flat("new")
    advantages = np.array(GIVEN["advantages"], np.float64)[batch.sequence_ids_T]
    close(
        actor(aggregation, batch, advantages, logp, entropy_coef=entropy_coef),
        VERL["actor"][aggregation],
    )


def test_the_critics_loss() -> None:
    values, returns = torch.from_numpy(flat("new_values")), whole(PPO, IN_REWARD)
    assert returns.returns_T is not None
    targets = torch.from_numpy(returns.returns_T[returns.loss_mask_T])
    loss, _, clipped = value_loss(
        values, torch.from_numpy(flat("values")), targets, clip=GIVEN["value_clip"]
    )
    close(
        {"critic/vf_loss": float(loss.mean()), "critic/vf_clipfrac": float(clipped.mean())},
        VERL["critic"],
    )


def test_figures_of_validation() -> None:
    """verl's best@k is a bootstrap of 1,000 draws, ours the value that it estimates."""
    problems = []
    for row in GIVEN["accuracy"]:
        first = groups()[0]
        verdicts = tuple(
            Verdict(status=Status.CORRECT if r else Status.WRONG, score=float(r)) for r in row
        )
        problems.append(
            replace(first, completions=first.completions * 4, verdicts=verdicts, advantages=None)
        )
    found = summarise(problems, [["1", "2", "3", "1"]] * 2).metrics
    assert found["val-core/math/acc/mean@4"] == pytest.approx(VERL["validation"]["mean@4"])
    assert found["val-aux/math/acc/std@4"] == pytest.approx(VERL["validation"]["std@4"])
    assert found["val-aux/math/acc/best@2/mean"] == pytest.approx(
        VERL["validation"]["best@2/mean"], abs=0.02
    )
    assert found["val-core/math/acc/best@4/mean"] == pytest.approx(
        VERL["validation"]["best@4/mean"], abs=0.02
    )


def test_means_are_over_the_tokens_that_they_count() -> None:
    """Of six sequences (22 tokens) the fourth, of one token, has no advantage and no pass: ratios
    and entropies are means over 21 tokens; of the fourth's token it is known that it is not
    clipped, so that pg_clipfrac is 4 of 22 as with it."""
    full = whole(AdvantageConfig(), aggregation="seq-mean-token-mean")
    advantages = np.array(GIVEN["advantages"], np.float64)[full.sequence_ids_T]
    logp = np.full(full.num_tokens, np.nan)
    logp[full.loss_mask_T] = flat("old")
    batch = replace(full.select([0, 1, 2, 4, 5]), share=5 / 6)
    kept = full.sequence_ids_T != 3
    found = actor("seq-mean-token-mean", batch, advantages[kept], logp[kept])
    assert found["actor/ratio"] == pytest.approx(1.0)
    assert found["actor/entropy_per_token"] == pytest.approx(flat("entropy")[:21].mean())
    rows = np.split(flat("entropy")[:21], np.cumsum([5, 2, 7, 4])[:4])
    assert found["actor/entropy"] == pytest.approx(np.mean([row.mean() for row in rows]))
    logp[full.loss_mask_T] = flat("new")
    clipped = actor("seq-mean-token-mean", batch, advantages[kept], logp[kept])
    assert clipped["actor/pg_clipfrac"] == pytest.approx(
        VERL["actor"]["token-mean"]["actor/pg_clipfrac"]
    )


def test_a_token_whose_log_prob_is_nan_is_counted_and_costs_no_other() -> None:
    batch = whole(PPO)
    broken = batch.behaviour_logp_T.copy()
    place = np.flatnonzero(batch.loss_mask_T)[0]
    broken[place] = np.nan
    assert batch.old_logp_T is not None
    mask = batch.loss_mask_T.copy()
    found = mismatch_metrics(batch.old_logp_T, broken, mask, batch.sequence_ids_T)
    mask[place] = False
    expected = mismatch_metrics(
        batch.old_logp_T, batch.behaviour_logp_T, mask, batch.sequence_ids_T
    )
    assert found == expected and all(map(math.isfinite, found.values()))
    one = replace(batch, old_logp_T=broken)  # an old log-prob does not train either
    logp = np.where(batch.loss_mask_T, batch.behaviour_logp_T, np.nan)
    advantages = np.array(GIVEN["advantages"], np.float64)[batch.sequence_ids_T]
    metrics = actor("token-mean", one, advantages, logp)
    assert metrics["actor/nonfinite_logp"] == pytest.approx(1 / 22)
    assert metrics["actor/ratio"] == pytest.approx(1.0), "a mean over the 21 others"


def test_log_probs_that_are_all_nan_end_the_run_with_the_reason() -> None:
    batch = whole(PPO)
    nothing = replace(batch, behaviour_logp_T=np.full(batch.num_tokens, np.nan))
    check_engine_logprobs([])
    check_engine_logprobs([nothing, batch])
    with pytest.raises(
        ValueError, match="all 22 log-probs that the engine gave for this step are NaN"
    ):
        check_engine_logprobs([nothing])


def test_a_nan_costs_its_token_of_the_penalty_in_the_reward() -> None:
    """The penalty is 0 there; without that the whitening would carry the NaN to every token."""

    def broken(batch: Batch) -> Batch:
        batch = estimated(batch)
        assert batch.old_logp_T is not None
        old = batch.old_logp_T.copy()
        old[np.flatnonzero(batch.loss_mask_T)[1]] = np.nan
        return replace(batch, old_logp_T=old)

    flat = flat_batch(groups(), LossConfig(), max_length=7)
    assert flat is not None
    seen = [with_token_advantages(broken(flat), PPO, IN_REWARD)]
    found = batch_metrics(seen, OffPolicyConfig(), 0.1)
    assert np.isfinite(seen[0].advantages_T[seen[0].loss_mask_T]).all()
    assert all(map(math.isfinite, found.values()))


def test_over_the_updates_of_a_step() -> None:
    first = {
        "actor/ppo_kl": 0.1,
        "training/rollout_probs_diff_max": 0.2,
        "rollout_corr/kl": 0.1,
        "actor/lr": 1.0,
        "x_max": 1.0,
        "rollout_corr/log_ppl_diff_min": 3.0,
        "timing_s/update_actor": 1.0,
        "y/min": 2.0,
    }
    second = {name: 2 * value for name, value in first.items()} | {"y/min": 1.0}
    assert averages([first, second]) == pytest.approx(
        {
            "actor/ppo_kl": 0.15,
            "training/rollout_probs_diff_max": 0.2,
            "rollout_corr/kl": 0.1,
            "actor/lr": 2.0,
            "x_max": 2.0,
            "rollout_corr/log_ppl_diff_min": 3.0,
            "timing_s/update_actor": 3.0,
            "y/min": 1.0,
        }
    )


def test_explained_variance_is_that_of_a_sample() -> None:
    values, returns = np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 2.0])  # variances 1/3 and 1
    assert explained_variance(values, returns) == pytest.approx(1 - (1 / 3) / (1 + 1e-5))
    assert explained_variance(values[:1], returns[:1]) == 0.0
