"""Groups to batch: alignment, weights over the whole step, what is left out and what still
counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.batch import (
    flat_batch,
    make_batch,
    sft_batch,
    updates_of,
    with_token_advantages,
)
from emberl.rl.config.algorithm import AdvantageConfig, KLConfig, LossConfig
from emberl.rl.groups import Batch, Group
from emberl.rollout.samples import Completion, Prompt, Span


def completion(sample: int, tokens: list[int], logprobs: list[float]) -> Completion:
    return Completion(
        prompt_id="p",
        sample=sample,
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        spans=(Span(0, 0, len(tokens)),),
        finish_reason="stop",
    )


def group(advantages: list[float], *verdicts: Verdict) -> Group:
    completions = (
        completion(0, [7, 8, 1], [-0.1, -0.2, -0.3]),
        completion(1, [9, 1], [-0.4, -0.5]),
        completion(2, [1], [-0.6]),
    )
    return Group(
        prompt=Prompt(id="p", token_ids=(3, 4), answer="", source="s"),
        completions=completions,
        verdicts=verdicts,
        advantages=np.array(advantages, np.float32),
    )


RIGHT, WRONG = Verdict(status=Status.CORRECT, score=1.0), Verdict(status=Status.WRONG, score=0.0)


def make(groups: list[Group], *, aggregation: str = "token-mean", **options: bool) -> Batch | None:
    loss = LossConfig.model_validate({"aggregation": aggregation})
    advantage = AdvantageConfig(whiten=options.pop("whiten", False))
    return make_batch(groups, loss, advantage, max_length=10, **options)


def split(groups: list[Group], parts: int) -> list[Batch]:
    whole = check(flat_batch(groups, LossConfig(), max_length=10))
    return updates_of(whole, groups, LossConfig(), parts=parts, max_length=10)


def check(batch: Batch | None) -> Batch:
    assert batch is not None
    return batch


def test_tokens_masks_and_log_probs_are_aligned() -> None:
    batch = check(make([group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG)]))
    assert batch.token_ids_T.tolist() == [3, 4, 7, 8, 1, 3, 4, 9, 1, 3, 4, 1]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.sequence_ids_T.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert np.flatnonzero(batch.loss_mask_T).tolist() == [2, 3, 4, 7, 8, 11]
    np.testing.assert_allclose(
        batch.behaviour_logp_T[batch.loss_mask_T], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]
    )
    np.testing.assert_allclose(batch.advantages_T[batch.loss_mask_T], [1, 1, 1, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(batch.weights_T[batch.loss_mask_T], [1 / 6] * 6)
    assert batch.num_loss_tokens == 6


def test_zero_advantage_is_left_out_but_counts_in_the_denominator() -> None:
    batch = check(make([group([1.0, 0.0, -1.0], RIGHT, WRONG, WRONG)]))
    assert batch.token_ids_T.tolist() == [3, 4, 7, 8, 1, 3, 4, 1]
    assert batch.sequence_ids_T.tolist() == [0] * 5 + [1] * 3
    np.testing.assert_allclose(batch.weights_T[batch.loss_mask_T], [1 / 6] * 4)
    kept = check(make([group([1.0, 0.0, -1.0], RIGHT, WRONG, WRONG)], keep_all=True))
    assert kept.num_tokens == 12


def test_a_completion_without_a_verdict_counts_nowhere() -> None:
    batch = check(make([group([1.0, 0.0, -1.0], RIGHT, verifier_error("killed"), WRONG)]))
    np.testing.assert_allclose(
        batch.weights_T[batch.loss_mask_T], [1 / 4] * 4
    )  # 3 + 1 tokens; the lost one's 2 do not count
    assert batch.num_loss_tokens == 4


def test_nothing_to_train_on() -> None:
    assert make([]) is None
    assert make([group([0.0, 0.0, 0.0], RIGHT, RIGHT, RIGHT)]) is None


def test_supervised_batch_trains_on_answers_only() -> None:
    batch = sft_batch([((3, 4, 7, 1), 2), ((5, 9, 9, 1), 1)])
    assert np.flatnonzero(batch.loss_mask_T).tolist() == [2, 3, 5, 6, 7]
    np.testing.assert_allclose(batch.weights_T[batch.loss_mask_T], [0.2] * 5)


def test_select_renumbers_and_keeps_weights() -> None:
    batch = check(make([group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG)])).select([2, 0])
    assert batch.token_ids_T.tolist() == [3, 4, 1, 3, 4, 7, 8, 1]
    assert batch.sequence_ids_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(batch.weights_T[batch.loss_mask_T], [1 / 6] * 4)


def test_misaligned_arrays_are_refused() -> None:
    batch = check(make([group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG)]))
    fields = {name: getattr(batch, name) for name in batch.__slots__} | {
        "positions_T": batch.positions_T[:-1]
    }
    with pytest.raises(AssertionError, match="must be aligned"):
        Batch(**fields)


def test_whitening_is_over_all_tokens_and_revives_a_zero() -> None:
    batch = check(make([group([1.0, 0.0, -1.0], RIGHT, WRONG, WRONG)], whiten=True))
    # Advantages of the six tokens 1 1 1 0 0 -1: mean 1/3, unbiased variance (3 (2/3)^2 + 2 (1/3)^2
    # + (4/3)^2) / 5 = 2/3.
    expected = (
        [(1 - 1 / 3) / (2 / 3) ** 0.5] * 3
        + [(-1 / 3) / (2 / 3) ** 0.5] * 2
        + [(-4 / 3) / (2 / 3) ** 0.5]
    )
    np.testing.assert_allclose(batch.advantages_T[batch.loss_mask_T], expected, rtol=1e-6)


def test_dr_grpo_divides_by_the_longest_answer() -> None:
    batch = check(
        make([group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG)], aggregation="seq-mean-token-sum-norm")
    )
    np.testing.assert_allclose(batch.weights_T[batch.loss_mask_T], [1 / 30] * 6)


def test_cut_answers_may_be_kept_out() -> None:
    cut = group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG)
    shortened = replace(cut.completions[0], finish_reason="length")
    batch = check(
        make([replace(cut, completions=(shortened, *cut.completions[1:]))], mask_cut=True)
    )
    assert batch.token_ids_T.tolist() == [3, 4, 9, 1, 3, 4, 1]


def test_minibatches_are_whole_groups_with_denominators_of_their_own() -> None:
    signal, flat = (
        group([1.0, -0.5, -0.5], RIGHT, WRONG, WRONG),
        group([0.0, 0.0, 0.0], RIGHT, RIGHT, RIGHT),
    )
    two, three = split([signal, flat, flat, signal, signal], 2)
    assert len(two.sequence_lengths) == 3, "of groups 0 to 2 only group 0 has a signal"
    np.testing.assert_allclose(two.weights_T[two.loss_mask_T], [1 / 18] * 6)
    assert (two.num_loss_tokens, three.num_loss_tokens) == (18, 12)
    np.testing.assert_allclose(three.weights_T[three.loss_mask_T], [1 / 12] * 12)
    only = split([flat, signal], 2)
    assert [batch.num_loss_tokens for batch in only] == [6], (
        "a part without a signal makes no update"
    )


def ragged(batch: Batch, values: list[float]) -> np.ndarray:
    """These values at the batch's loss tokens, NaN elsewhere."""
    row = np.full(batch.num_tokens, np.nan)
    row[batch.loss_mask_T] = values
    return row


def test_a_penalty_in_the_reward_is_taken_from_what_follows() -> None:
    """k1 of completion 0 is [0.1, 0, -0.2] against a reference of [-0.2, -0.2, -0.1]; half of it is
    taken from the reward of each token, so the returns to go are 1 + 0.1, that - 0, that - 0.05."""

    def estimate(batch: Batch) -> Batch:
        return replace(batch, reference_logp_T=ragged(batch, [-0.2, -0.2, -0.1, -0.4, -0.5, -0.6]))

    kl = KLConfig(place="reward", estimator="k1", coef=0.5)
    groups = [group([1.0, 0.0, 0.0], RIGHT, WRONG, WRONG)]
    whole = estimate(check(flat_batch(groups, LossConfig(), max_length=10)))
    batch = with_token_advantages(whole, AdvantageConfig(kind="return"), kl)
    np.testing.assert_allclose(
        batch.advantages_T[batch.loss_mask_T], [1.05, 1.1, 1.1, 0, 0, 0], atol=1e-7
    )


def test_the_old_policy_is_what_the_penalty_compares_where_it_was_recomputed() -> None:
    def estimate(batch: Batch) -> Batch:
        same = ragged(batch, [-0.7] * 6)
        return replace(batch, reference_logp_T=same, old_logp_T=same)

    kl = KLConfig(place="reward", estimator="k2", coef=0.5)
    groups = [group([1.0, 0.0, 0.0], RIGHT, WRONG, WRONG)]
    whole = estimate(check(flat_batch(groups, LossConfig(), max_length=10)))
    batch = with_token_advantages(whole, AdvantageConfig(kind="return"), kl)
    np.testing.assert_allclose(batch.advantages_T[batch.loss_mask_T], [1, 1, 1, 0, 0, 0])


def test_a_critics_values_give_advantages_and_targets() -> None:
    """gamma = lambda = 1: the advantage is the score minus the value before the token, the target
    the score itself."""
    groups = [group([1.0, 0.0, -1.0], RIGHT, WRONG, WRONG)]
    whole = check(flat_batch(groups, LossConfig(), max_length=10))
    whole = replace(whole, values_T=ragged(whole, [0.5, 0.25, 0.75, 0.1, -0.2, 0.3]))
    batch = with_token_advantages(whole, AdvantageConfig(kind="gae"), None)
    np.testing.assert_allclose(
        batch.advantages_T[batch.loss_mask_T], [0.5, 0.75, 0.25, -0.1, 0.2, -1.3]
    )
    assert batch.returns_T is not None and batch.correct_T is not None
    np.testing.assert_allclose(batch.returns_T[batch.loss_mask_T], [1, 1, 1, 0, 0, -1], atol=1e-12)
    assert batch.correct_T.tolist() == [True] * 5 + [False] * 7
