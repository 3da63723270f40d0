"""Conversion of groups, or of worked solutions, to the flat `Batch` that the learners train on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rewards.verdict import Status, Verdict
from ..rollout.samples import Completion
from .algorithm.advantages import batch_advantages, kl_estimate, token_rewards
from .config.algorithm import AdvantageConfig, Aggregation, KLConfig, LossConfig
from .config.distill import DistillConfig
from .config.load import Config, ConfigError, user_errors
from .data.demonstrations import Example
from .data.sources import PromptSource
from .data.templates import end_token, supervised_ids
from .groups import Batch, Group

_WORK = re.compile(r"(?<=<think>).*(?=</think>)", re.DOTALL)


def token_weights(
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    aggregation: Aggregation,
    *,
    norm_const: float | None = None,
    num_sequences: int | None = None,
) -> NDArray[np.float64]:
    """The share [T] of each loss token in the step's loss; 0 where `mask` is false.

    The denominators are counted before the step is split over ranks and micro-batches, so that
    partial losses are plain sums and no split changes the result. (A mean per micro-batch, as in
    TRL's bnpo, lets short micro-batches weigh more.)

    With N loss tokens, S sequences and n_i loss tokens in sequence i:

    - token-mean: 1 / N (DAPO, arXiv 2503.14476, eq. 8)
    - seq-mean-token-mean: 1 / (S n_i) (GRPO, arXiv 2402.03300, eq. 3)
    - seq-mean-token-sum: 1 / S (REINFORCE on whole sequences, RLOO)
    - seq-mean-token-sum-norm: 1 / (S norm_const) (Dr.GRPO, arXiv 2503.20783; TRL divides by the
      same number)

    Tokens that are rejected later (off-policy masks) get a weight of 0 in the loss, but stay in
    these counts, as in AReaL, TRL and OpenRLHF: else the kept ones would grow by N / N_kept. For
    the other way pass the narrowed mask.

    Args:
        mask: [T] which tokens train.
        sequence_ids: [T] integers from 0.
        norm_const: of seq-mean-token-sum-norm, e.g. the largest length of an answer.
        num_sequences: S, where sequences without a loss token are to count; default: those that
            have one.

    Raises:
        ValueError: no token trains, or `norm_const` is missing.
    """
    mask = np.asarray(mask, bool)
    counts = np.bincount(np.asarray(sequence_ids)[mask]) if mask.any() else np.zeros(0, np.int64)
    sequences = int(np.count_nonzero(counts)) if num_sequences is None else num_sequences
    if not len(counts) or sequences < 1:
        raise ValueError(
            f"the loss mask leaves none of {len(mask)} tokens to train; skip this step"
        )
    weights = np.zeros(len(mask), np.float64)
    if aggregation == "token-mean":
        weights[mask] = 1.0 / mask.sum()
    elif aggregation == "seq-mean-token-mean":
        weights[mask] = 1.0 / (sequences * counts[np.asarray(sequence_ids)[mask]])
    elif aggregation == "seq-mean-token-sum":
        weights[mask] = 1.0 / sequences
    else:
        if norm_const is None:
            raise ValueError(
                f"loss.aggregation={aggregation} needs loss.norm_const, e.g."
                " rollout.max_response_length"
            )
        weights[mask] = 1.0 / (sequences * norm_const)
    return weights


def make_batch(
    groups: Sequence[Group],
    loss: LossConfig,
    advantage: AdvantageConfig,
    *,
    max_length: int,
    keep_all: bool = False,
    mask_cut: bool = False,
) -> Batch | None:
    """The batch of a step with one update, without any estimates by the learners; None if no token
    is left that could train. The arguments are those of `flat_batch` and `updates_of`."""
    whole = flat_batch(groups, loss, max_length=max_length, mask_cut=mask_cut)
    if whole is None:
        return None
    whole = with_token_advantages(whole, advantage, None)
    batches = updates_of(
        whole, groups, loss, max_length=max_length, keep_all=keep_all, mask_cut=mask_cut
    )
    return batches[0] if batches else None


def flat_batch(
    groups: Sequence[Group],
    loss: LossConfig,
    *,
    max_length: int,
    mask_cut: bool = False,
    distill: DistillConfig | None = None,
) -> Batch | None:
    """A batch of all completions with a verdict, group by group; None if there is none. The
    advantages are those of the groups.

    max_length: the longest answer, `seq-mean-token-sum-norm`'s constant if `loss.norm_const` is
    None. mask_cut: completions that were cut at that length do not train (`filter.overlong_mask`).
    distill: gives each sequence its teacher.
    """
    rows = [
        (group.prompt, completion, advantage_of, verdict.status == Status.CORRECT)
        for group in groups
        for completion, verdict, advantage_of in zip(
            group.completions, group.verdicts, _advantages(group), strict=True
        )
        if _trains(completion, verdict, mask_cut)
    ]
    if not rows:
        return None
    whole = _flat(
        [
            np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int32)
            for prompt, completion, _, _ in rows
        ],
        [len(prompt.token_ids) for prompt, _, _, _ in rows],
        [completion.logprobs for _, completion, _, _ in rows],
        [float(advantage_of) for _, _, advantage_of, _ in rows],
        loss,
        float(loss.norm_const or max_length),
        [completion.mask for _, completion, _, _ in rows],
    )
    right = np.array([correct for *_, correct in rows])
    whole = replace(whole, correct_T=right[whole.sequence_ids_T])
    workers = np.array([completion.worker for _, completion, _, _ in rows], np.int32)
    if workers.max() > 0:
        whole = replace(whole, worker_ids_T=workers[whole.sequence_ids_T])
    if distill is None or not distill.active:
        return whole
    teachers = np.array([distill.teacher_of(prompt.source) for prompt, *_ in rows], np.int32)
    return replace(whole, teacher_ids_T=teachers[whole.sequence_ids_T])


def updates_of(
    whole: Batch,
    groups: Sequence[Group],
    loss: LossConfig,
    *,
    parts: int = 1,
    max_length: int,
    keep_all: bool = False,
    mask_cut: bool = False,
) -> list[Batch]:
    """The whole batch of these groups (`flat_batch`) as up to `parts` batches, one for each update,
    of whole groups in their order.

    Weights and denominators are a part's own (as verl's mini-batches). A completion whose advantage
    is exactly 0 is left out of the passes, since its gradient is exactly 0 (`keep_all` keeps it,
    for a loss with a KL or entropy term); the denominators still count it. A part in which no token
    is left that could train is left out.
    """
    batches = [whole]
    if parts > 1:
        owner = np.array(
            [
                number
                for number, group in enumerate(groups)
                for completion, verdict in zip(group.completions, group.verdicts, strict=True)
                if _trains(completion, verdict, mask_cut)
            ]
        )
        shares = [
            np.flatnonzero(np.isin(owner, share))
            for share in np.array_split(np.arange(len(groups)), parts)
        ]
        norm_const = float(loss.norm_const or max_length)
        batches = [
            _own_weights(whole.select(share.tolist()), loss, norm_const)
            for share in shares
            if len(share)
        ]
    counts_tokens = loss.aggregation == "token-mean"
    return [
        live
        for batch in batches
        if (live := batch if keep_all else _live(batch, counts_tokens)).num_tokens
    ]


def _trains(completion: Completion, verdict: Verdict, mask_cut: bool) -> bool:
    return (
        verdict.trains
        and completion.num_sampled > 0
        and not (mask_cut and completion.finish_reason == "length")
    )


def with_token_advantages(batch: Batch, advantage: AdvantageConfig, kl: KLConfig | None) -> Batch:
    """A batch whose advantages are scores, with each token's advantage instead and, with a critic,
    its targets. Whitening is over all updates together. kl: with kl.place=reward the penalty is
    subtracted from the tokens' rewards."""
    if not advantage.per_token:
        return batch
    penalty = None
    if kl is not None and kl.active and kl.place == "reward":
        assert batch.reference_logp_T is not None, "kl.place=reward, but there is no reference"
        old_T = batch.behaviour_logp_T if batch.old_logp_T is None else batch.old_logp_T
        estimate = kl_estimate(old_T, batch.reference_logp_T, kl.estimator, bound=kl.bound)
        batch = replace(batch, kl_T=np.where(batch.loss_mask_T, estimate, 0.0))
        penalty = kl.coef * estimate
    if advantage.kind in ("return", "gae"):
        rewards = token_rewards(
            batch.advantages_T, batch.loss_mask_T, batch.sequence_ids_T, penalty
        )
        batch = replace(batch, rewards_T=rewards)
    advantages, returns = batch_advantages(
        batch.advantages_T,
        batch.loss_mask_T,
        batch.sequence_ids_T,
        advantage,
        values=batch.values_T,
        kl_penalty=penalty,
    )
    return replace(batch, advantages_T=advantages, returns_T=returns)


def with_teachers(batch: Batch, distill: DistillConfig) -> Batch:
    """The batch with its advantages times `distill.reward_coef` and, if teachers score the sampled
    tokens, plus `distill.coef` times log(teacher / policy) of each token. The policy is the one
    that sampled, so that the mean is minus the reverse KL at its own prefixes."""
    if not distill.active:
        return batch
    advantages = distill.reward_coef * np.asarray(batch.advantages_T, np.float64)
    if distill.on_samples:
        assert batch.teacher_logp_T is not None and batch.teacher_ids_T is not None
        old_T = batch.behaviour_logp_T if batch.old_logp_T is None else batch.old_logp_T
        gap = batch.teacher_logp_T - np.asarray(old_T, np.float64)
        taught = batch.loss_mask_T & (batch.teacher_ids_T >= 0) & np.isfinite(gap)
        advantages += distill.coef * np.where(taught, gap, 0.0)
    return replace(batch, advantages_T=advantages)


def _own_weights(batch: Batch, loss: LossConfig, norm_const: float) -> Batch:
    weights = token_weights(
        batch.loss_mask_T, batch.sequence_ids_T, loss.aggregation, norm_const=norm_const
    )
    return replace(batch, weights_T=weights, num_loss_tokens=int(batch.loss_mask_T.sum()))


def _live(batch: Batch, counts_tokens: bool) -> Batch:
    """The batch without the sequences whose advantages are all 0."""
    live = np.zeros(len(batch.sequence_lengths), bool)
    np.logical_or.at(live, batch.sequence_ids_T, batch.loss_mask_T & (batch.advantages_T != 0))
    left = batch.select(np.flatnonzero(live).tolist())
    if counts_tokens:
        share = int(left.loss_mask_T.sum()) / left.num_loss_tokens
    else:
        share = _sequences(left) / _sequences(batch)
    return replace(left, share=share)


def _sequences(batch: Batch) -> int:
    """Number of sequences with a loss token."""
    return len(np.unique(batch.sequence_ids_T[batch.loss_mask_T]))


def demonstrations(source: PromptSource, tokenizer: Any, config: Config, position: int) -> Batch:
    """The worked solutions of the `sft.batch_size` problems from `position` on, as a batch.

    Raises:
        ConfigError: the source has no solution to one of them, or the tokenizer no end token.
    """
    with user_errors():
        end = end_token(tokenizer)
    examples = []
    for i in range(position, position + config.sft.batch_size):
        prompt = source.train(i)
        solution = source.solution(prompt)
        if solution is None:
            raise ConfigError(
                f"stages has sft, but problem {prompt.id} of data.source={config.data.source!r} has"
                " no worked solution; set data.solution_column, or leave sft out of stages"
            )
        shown = demonstration(solution, i, config.sft.direct)
        examples.append((supervised_ids(prompt, shown, tokenizer, end), len(prompt.token_ids)))
    return sft_batch(examples)


def demonstration(solution: str, position: int, direct: float) -> str:
    """The solution to imitate: for a share `direct` of all positions with an empty
    `<think></think>`."""
    # a stream of its own: a problem must not tell whether its work is shown
    draw = Random(f"demonstration {position}").random()
    return _WORK.sub("", solution) if draw < direct else solution


def sft_batch(examples: Sequence[tuple[Sequence[int], int]]) -> Batch:
    """(token ids, length of the prompt in them) pairs as a batch whose loss is the answers' mean
    negative log-likelihood."""
    return example_batch(
        [
            Example(token_ids=tuple(ids), learnt=np.arange(len(ids)) >= start)
            for ids, start in examples
        ]
    )


def example_batch(examples: Sequence[Example]) -> Batch:
    """A batch of these sequences whose loss is the learnt tokens' mean negative log-likelihood."""
    starts = [int(each.learnt.argmax()) for each in examples]
    masks = [each.learnt[start:] for each, start in zip(examples, starts, strict=True)]
    return _flat(
        [np.array(each.token_ids, dtype=np.int32) for each in examples],
        starts,
        [np.zeros(len(mask), np.float32) for mask in masks],
        [1.0] * len(examples),
        LossConfig(aggregation="token-mean"),
        1.0,
        masks,
    )


def _flat(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    logprobs: Sequence[np.ndarray],
    advantages: Sequence[float],
    loss: LossConfig,
    norm_const: float,
    masks: Sequence[np.ndarray] | None = None,
) -> Batch:
    """A batch of sequences with one advantage each. logprobs, masks: of the tokens after the
    prompt; masks: which of them train (None: all)."""
    lengths = [len(s) for s in sequences]
    answers = np.concatenate(
        [np.arange(n) >= start for n, start in zip(lengths, prompt_lengths, strict=True)]
    )
    mask, behaviour = answers.copy(), np.zeros(len(answers), np.float32)
    if masks is not None:
        mask[answers] = np.concatenate(masks)
    behaviour[answers] = np.concatenate(logprobs)
    behaviour[~mask] = 0.0
    sequence_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Batch(
        token_ids_T=np.concatenate(sequences),
        positions_T=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        sequence_ids_T=sequence_ids,
        loss_mask_T=mask,
        behaviour_logp_T=behaviour,
        advantages_T=np.repeat(np.array(advantages, np.float64), lengths),
        weights_T=token_weights(mask, sequence_ids, loss.aggregation, norm_const=norm_const),
        num_loss_tokens=int(mask.sum()),
    )


def _advantages(group: Group) -> np.ndarray:
    assert group.advantages is not None, f"group {group.prompt.id} has no advantages yet"
    return group.advantages
