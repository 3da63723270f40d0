"""The metrics of an RL step: of its graded samples, of the batch that trains and of its updates.

Names and definitions are verl's if it has the metric (`verl/trainer/ppo/metric_utils.py`,
`rollout_corr_helper.py`). Metrics of samples are over all that were sampled; those of tokens are
over the loss tokens of the groups that train.

Shape legend: T tokens of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ...rollout.samples import EpisodeStatus
from ..algorithm.offpolicy import correction, mismatch_metrics, worker_mismatch
from ..config.algorithm import OffPolicyConfig
from ..config.distill import DistillConfig
from ..groups import Batch, Group

Array = NDArray[Any]
VARIANCE_EPS = 1e-5
"""Added to the variance of the returns, as verl does."""
_LARGEST, _SMALLEST = re.compile(r"[_/]max($|[_/])"), re.compile(r"[_/]min($|[_/])")
_ONCE = ("rollout_corr/", "training/rollout_")


def spread(name: str, values: Array) -> dict[str, float]:
    """`name`/mean, /max and /min of the values that are not NaN; {} if there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {}
    return {
        f"{name}/mean": float(known.mean()),
        f"{name}/max": float(known.max()),
        f"{name}/min": float(known.min()),
    }


def sample_metrics(
    groups: Sequence[Group],
    trained: Sequence[Group],
    shaped: Sequence[Array],
    *,
    longest: int,
    longest_prompt: int,
) -> dict[str, float]:
    """The metrics of a step's samples. shaped: the scores of each group as they are trained on,
    overlong penalty included. longest, longest_prompt: the most tokens of an answer and a
    prompt."""
    whole = np.array([len(c) for group in groups for c in group.completions], np.float64)
    lengths = np.array([c.num_sampled for group in groups for c in group.completions], np.float64)
    prompts = np.repeat(
        [len(group.prompt.token_ids) for group in groups],
        [len(group.completions) for group in groups],
    )
    finish = [c.finish_reason for group in groups for c in group.completions]
    metrics = {
        **spread("critic/score", np.concatenate([group.scores for group in groups])),
        **spread("critic/rewards", np.concatenate(shaped)),
        **spread("response_length", lengths),
        "response_length/clip_ratio": (whole == longest).mean(),
        "response/aborted_ratio": (lengths == 0).mean(),
        **spread("prompt_length", prompts.astype(np.float64)),
        "prompt_length/clip_ratio": (prompts == longest_prompt).mean(),
        "training/cut_fraction": np.mean([reason == "length" for reason in finish]),
        "training/accuracy": correct(groups),
        "training/filter_groups/dropped": len(groups) - len(trained),
        "training/filter_groups/solved_all": sum(
            not g.has_signal and bool((g.scores > 0).all()) for g in groups
        ),
        "training/filter_groups/solved_none": sum(
            not g.has_signal and bool((g.scores <= 0).all()) for g in groups
        ),
        "training/verifier_errors": sum(not v.trains for group in groups for v in group.verdicts),
        "perf/total_num_tokens": whole.sum() + prompts.sum(),
    }
    return {name: float(value) for name, value in (metrics | episode_metrics(groups)).items()}


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics of samples with an environment: turns, tokens of observations (which no other
    metric of lengths counts but `clip_ratio`), and the share of each status with which episodes
    ended. {} without an environment."""
    played = [
        (c, c.episode) for group in groups for c in group.completions if c.episode is not None
    ]
    if not played:
        return {}
    observed = np.array(
        [len(completion) - completion.num_sampled for completion, _ in played], np.float64
    )
    metrics = spread(
        "num_turns", np.array([len(episode.turns) for _, episode in played], np.float64)
    )
    metrics |= spread("observation_length", observed)
    statuses = [episode.status for _, episode in played]
    return metrics | {
        f"episode/{name}": statuses.count(name) / len(played) for name in get_args(EpisodeStatus)
    }


def correct(groups: Sequence[Group]) -> float:
    """The fraction of completions whose verdict is correct."""
    return float(np.mean([v.status == "correct" for group in groups for v in group.verdicts]))


def histograms(groups: Sequence[Group], trained: Sequence[Group], version: int) -> dict[str, Array]:
    """Name -> values of a step's answers: lengths in tokens, staleness of the first token in
    versions, and by source scores and, of the groups that train, advantages."""
    by_name: dict[str, Array] = {
        "response_length": np.array([c.num_sampled for g in groups for c in g.completions]),
        "staleness": np.array(
            [version - c.oldest_version for g in groups for c in g.completions if len(c)]
        ),
    }
    for name, chosen, values in (
        ("score", groups, [g.scores for g in groups]),
        ("advantage", trained, [g.advantages for g in trained]),
    ):
        for source in dict.fromkeys(g.prompt.source for g in chosen):
            own = [
                v
                for g, v in zip(chosen, values, strict=True)
                if g.prompt.source == source and v is not None
            ]
            joined = np.concatenate(own) if own else np.zeros(0)
            by_name[f"{name}/{source}"] = joined[np.isfinite(joined)]
    return {name: values for name, values in by_name.items() if len(values)}


def speed_metrics(tokens: float, sampled: int, seconds: float, devices: int) -> dict[str, float]:
    """The throughput of a step. tokens: of prompts and answers (`perf/total_num_tokens`). sampled:
    of answers alone, by the whole system."""
    return {
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / (seconds * devices),
        "perf/sampled_tokens_per_second": sampled / seconds,
        "timing_s/step": seconds,
    }


def batch_metrics(
    batches: Sequence[Batch], offpolicy: OffPolicyConfig, kl_coef: float
) -> dict[str, float]:
    """The metrics of the tokens that train, before any update: advantages as the loss sees them,
    returns, token rewards, the critic's values, and the distance of the rollouts' policy from the
    old one if that was recomputed."""
    if not batches:
        return {}
    mask = np.concatenate([b.loss_mask_T for b in batches])
    advantages = _column(batches, "advantages_T")
    assert advantages is not None
    returns, values = _column(batches, "returns_T"), _column(batches, "values_T")
    metrics = spread("critic/advantages", advantages[mask])
    metrics |= spread("critic/returns", (advantages if returns is None else returns)[mask])
    if values is not None and returns is not None:
        metrics |= spread("critic/values", values[mask])
        metrics["critic/vf_explained_var"] = explained_variance(values[mask], returns[mask])
    ids = _numbered(batches)
    if (rewards := _column(batches, "rewards_T")) is not None:
        metrics |= spread("critic/rewards", _per_sequence(rewards, mask, ids))
    if (kl := _column(batches, "kl_T")) is not None:
        counts = _per_sequence(np.ones(len(mask)), mask, ids)
        metrics["actor/reward_kl_penalty"] = float((_per_sequence(kl, mask, ids) / counts).mean())
        metrics["actor/reward_kl_penalty_coeff"] = kl_coef
    old, behaviour = _column(batches, "old_logp_T"), _column(batches, "behaviour_logp_T")
    if old is not None and behaviour is not None:
        if offpolicy.active:
            metrics |= correction(old, behaviour, mask, ids, offpolicy).metrics
        else:
            metrics |= mismatch_metrics(old, behaviour, mask, ids)
        metrics |= worker_mismatch(old, behaviour, mask, _column(batches, "worker_ids_T"))
    return metrics


def explained_variance(values: Array, returns: Array) -> float:
    """1 - var(returns - values) / (var(returns) + 1e-5), with N - 1 as in verl; 0 if N < 2."""
    if len(values) < 2:
        return 0.0
    return float(1 - np.var(returns - values, ddof=1) / (np.var(returns, ddof=1) + VARIANCE_EPS))


def _column(batches: Sequence[Batch], name: str) -> Array | None:
    rows = [getattr(batch, name) for batch in batches]
    return None if any(row is None for row in rows) else np.concatenate(rows)


def _numbered(batches: Sequence[Batch]) -> Array:
    """[T of all batches] ids of sequences, made distinct across the batches."""
    starts = np.cumsum([0, *(len(b.sequence_lengths) for b in batches)])
    return np.concatenate(
        [b.sequence_ids_T + start for b, start in zip(batches, starts, strict=False)]
    )


def _per_sequence(values: Array, mask: Array, ids: Array) -> Array:
    """[sequences with loss tokens] sums over the loss tokens of each."""
    _, dense = np.unique(ids[mask], return_inverse=True)
    return np.bincount(dense, weights=values[mask])


def check_engine_logprobs(batches: Sequence[Batch]) -> None:
    """Raises ValueError if no token at all has a finite log-prob: then nothing can train, and the
    engines hold broken weights. Single ones only cost their own tokens
    (`actor/nonfinite_logp`)."""
    given = [batch.behaviour_logp_T[batch.loss_mask_T] for batch in batches]
    total = sum(len(row) for row in given)
    if total and not any(np.isfinite(row).any() for row in given):
        raise ValueError(
            f"all {total} log-probs that the engine gave for this step are NaN or infinite, so that"
            " no token can train; its weights or its arithmetic are broken: look at"
            " actor/grad_norm and actor/loss of the steps before, and try model.dtype=float32"
        )


def averages(done: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates in one: means, the largest of maxima and the smallest of
    minima. Times are summed; learning rates and counts are the last update's; the mismatch with the
    rollouts' policy is the first update's, when the policy was still the old one."""
    metrics = {name: _over(name, [each[name] for each in done if name in each]) for name in done[0]}
    for name, first in done[0].items():
        if name.endswith(("/lr", "/steps_skipped")):
            metrics[name] = done[-1][name]
        elif name.startswith("timing_s/"):
            metrics[name] = sum(each[name] for each in done)
        elif name.startswith(_ONCE) and not name.endswith("opsm_masked_fraction"):
            metrics[name] = first
    return metrics


def _over(name: str, values: Sequence[float]) -> float:
    if _LARGEST.search(name):
        return float(np.max(values))
    return float(np.min(values)) if _SMALLEST.search(name) else float(np.mean(values))


def teacher_metrics(batches: Sequence[Batch], distill: DistillConfig) -> dict[str, float]:
    """For each teacher its number of loss tokens and, if it scored these, the mean of log(policy /
    teacher) on them: the reverse KL to it. Also the number of tokens without a teacher."""
    if not batches or not distill.active:
        return {}
    untaught = 0
    tokens = dict.fromkeys(distill.teachers, 0)
    gaps: dict[str, list[NDArray[Any]]] = {name: [] for name in distill.teachers}
    for batch in batches:
        assert batch.teacher_ids_T is not None
        mask, old_T = batch.loss_mask_T, batch.old_logp_T
        old_T = batch.behaviour_logp_T if old_T is None else old_T
        teachers = batch.teacher_ids_T[mask]
        untaught += int((teachers < 0).sum())
        for number, name in enumerate(distill.teachers):
            own = teachers == number
            tokens[name] += int(own.sum())
            if batch.teacher_logp_T is not None:
                gap = (old_T - batch.teacher_logp_T)[mask][own]
                gaps[name].append(gap[np.isfinite(gap)])
    metrics = {"distill/untaught_tokens": float(untaught)}
    for name in distill.teachers:
        metrics[f"distill/tokens/{name}"] = float(tokens[name])
        if sum(map(len, gaps[name])):
            metrics[f"distill/reverse_kl/{name}"] = float(np.concatenate(gaps[name]).mean())
    return metrics
