"""The loop: sample groups with the newest weights, mark them, keep those with a signal, step, publish, log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..rewards.suite import check_errors
from .algorithm.advantages import group_advantages, overlong_penalty
from .algorithm.losses import Objective
from .batch import make_batches
from .evaluate import evaluate
from .groups import Group
from .run import Run


def train_rl(run: Run) -> None:
    """RL steps from where the run stands to `schedule.steps`, on-policy: every token is sampled by the newest weights."""
    config, schedule = run.config, run.config.schedule
    objective = Objective.of(config.loss, config.kl, config.offpolicy, temperature=config.rollout.temperature)
    run.tracker.begin("rl", run.progress.step, schedule.steps)
    if run.progress.step == 0 and config.eval.size:
        run.progress = run.progress.advance(accuracy_start=evaluate(run).accuracy)

    while run.progress.step < schedule.steps:
        run.stop_if_asked()
        step, start = run.progress.step + 1, time.perf_counter()
        sampled = sample_step(run, step)
        sampled_at = time.perf_counter()

        trained = with_advantages(run, [g for g in sampled if g.has_signal or not config.filter.zero_variance])
        metrics = update(run, trained, objective)
        tokens = sum(len(c) for group in sampled for c in group.completions)
        seconds = time.perf_counter() - start
        run.progress = run.progress.advance(
            step=step,
            tokens=run.progress.tokens + tokens,
            train_seconds=run.progress.train_seconds + seconds,
        )
        metrics |= group_metrics(sampled, trained) | run.suite.metrics()
        metrics |= {"timing_s/gen": sampled_at - start, "timing_s/step": seconds, "perf/throughput": tokens / seconds}
        show = {"reward": f"{metrics['critic/score/mean']:.3f}", "accuracy": f"{metrics['training/accuracy']:.1%}"}
        run.tracker.log(step, metrics, show=show | {"tokens/s": f"{tokens / seconds:,.0f}"})

        last = step == schedule.steps
        if config.eval.size and (last or (config.eval.every and step % config.eval.every == 0)):
            run.progress = run.progress.advance(accuracy_end=evaluate(run).accuracy)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            run.save()


def sample_step(run: Run, step: int) -> list[Group]:
    """The graded groups of one step. With dynamic sampling further prompts are asked for until enough groups have a
    signal; raises `TooManyErrors` where graders rather than answers fail."""
    config = run.config
    groups: list[Group] = []
    for _ in range(config.filter.max_rounds if config.filter.dynamic_sampling else 1):
        wanted = config.schedule.prompts_per_step - sum(group.has_signal for group in groups)
        wanted = wanted if config.filter.dynamic_sampling else config.schedule.prompts_per_step
        if wanted <= 0:
            break
        position = run.progress.position
        prompts = [run.source.train(i) for i in range(position, position + wanted)]
        groups += run.sample_groups(prompts, config.rollout.group_size, run.sampling(step))
        run.progress = run.progress.advance(position=position + wanted)
    check_errors([v for group in groups for v in group.verdicts], config.reward.max_error_fraction)
    return groups


def update(run: Run, trained: Sequence[Group], objective: Objective) -> dict[str, float]:
    """The optimizer steps of one RL step, then a new version of the weights if there were any; means over the updates,
    but for the learning rate and counts, which are the last one's."""
    config, schedule = run.config, run.config.schedule
    batches = make_batches(
        trained,
        config.loss,
        config.advantage,
        parts=schedule.minibatches,
        max_length=config.rollout.max_response_length,
        keep_all=objective.needs_all_tokens,
        mask_cut=config.filter.overlong_mask,
    )
    if objective.needs_old_logp and len(batches) * schedule.epochs > 1:  # before the first update moves the policy
        batches = [replace(b, old_logp_T=run.learners.logprobs(b, objective.temperature)) for b in batches]
    done = [run.learners.step(batch, objective) for _ in range(schedule.epochs) for batch in batches]
    metrics = {"training/updates": float(len(done)), "perf/total_num_tokens": float(sum(b.num_tokens for b in batches))}
    if not done:
        return metrics
    metrics |= {name: float(np.mean([each[name] for each in done])) for name in done[0]}
    metrics |= {name: done[-1][name] for name in ("actor/lr", "actor/steps_skipped")}
    metrics["timing_s/update_actor"] *= len(done)
    return metrics | run.publish()


def with_advantages(run: Run, groups: Sequence[Group]) -> list[Group]:
    """The groups with the advantage of each completion, NaN scores (no verdict) at 0."""
    config = run.config
    longest = config.rollout.max_response_length
    scores = [group.scores for group in groups]
    if config.filter.overlong_share:
        buffer = max(1, round(config.filter.overlong_share * longest))
        for row, group in zip(scores, groups, strict=True):
            lengths = np.array([len(c) for c in group.completions])
            row += config.filter.overlong_penalty * overlong_penalty(lengths, longest, buffer)
    advantages = group_advantages(scores, config.advantage)
    return [group.with_advantages(a) for group, a in zip(groups, advantages, strict=True)]


def correct(groups: Sequence[Group]) -> float:
    """The fraction of completions whose verdict is correct."""
    return float(np.mean([v.status == "correct" for group in groups for v in group.verdicts]))


def group_metrics(groups: Sequence[Group], trained: Sequence[Group]) -> dict[str, float]:
    """Figures of a step's samples; names are verl's where it has one."""
    scores = np.concatenate([group.scores for group in groups])
    scores = scores[~np.isnan(scores)]
    lengths = np.array([len(c) for group in groups for c in group.completions])
    cut = [c.finish_reason == "length" for group in groups for c in group.completions]
    found: dict[str, Any] = {
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": np.mean(cut),
        "prompt_length/mean": np.mean([len(group.prompt.token_ids) for group in groups]),
        "training/accuracy": correct(groups),
        "training/filter_groups/dropped": len(groups) - len(trained),
        "training/filter_groups/solved_all": sum(not g.has_signal and bool((g.scores > 0).all()) for g in groups),
        "training/filter_groups/solved_none": sum(not g.has_signal and bool((g.scores <= 0).all()) for g in groups),
        "training/verifier_errors": sum(not v.trains for group in groups for v in group.verdicts),
    }
    for name, values in (("critic/score", scores), ("critic/advantages", advantages_of(trained))):
        if len(values):
            found |= {f"{name}/mean": values.mean(), f"{name}/max": values.max(), f"{name}/min": values.min()}
    return {name: float(value) for name, value in found.items()}


def advantages_of(groups: Sequence[Group]) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """All advantages in one array."""
    return np.concatenate([g.advantages for g in groups if g.advantages is not None] or [np.zeros(0)])
