"""The loop: sample groups with the newest weights, mark them, keep those with a signal, step, publish, log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..rewards.suite import check_errors
from .algorithm.advantages import group_advantages, overlong_penalty
from .algorithm.losses import Objective
from .batch import denominator, make_batch, make_batches
from .evaluate import evaluate
from .feed import Feed, GroupFeed
from .groups import Batch, Group
from .run import Run
from .watch.lengths import record_lengths


def train_rl(run: Run) -> None:
    """RL steps from where the run stands to `schedule.steps`; every token is at most `schedule.max_staleness` versions older
    than the weights that it trains (0: on-policy, rollouts and learners take turns)."""
    config, schedule = run.config, run.config.schedule
    objective = Objective.of(config.loss, config.kl, config.offpolicy, temperature=config.rollout.temperature)
    run.tracker.begin("rl", run.progress.step, schedule.steps)
    if run.progress.step == 0 and config.eval.size:
        run.progress = run.progress.advance(accuracy_start=evaluate(run).accuracy)

    with GroupFeed(run) as feed:
        while run.progress.step < schedule.steps:
            run.stop_if_asked()
            rl_step(run, feed, objective)
            step, last = run.progress.step, run.progress.step == schedule.steps
            if config.eval.size and (last or (config.eval.every and step % config.eval.every == 0)):
                run.progress = run.progress.advance(accuracy_end=evaluate(run).accuracy)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                run.save()
        run.settle()


def rl_step(run: Run, feed: GroupFeed, objective: Objective) -> None:
    """Takes the groups of one step, trains on them, publishes and logs. Raises `TooManyErrors` where graders rather than
    answers fail."""
    config, step, start = run.config, run.progress.step + 1, time.perf_counter()
    train = train_whole if config.schedule.stream_parts == 1 else train_in_parts
    fed, trained, metrics = train(run, feed, step, objective)
    sampled = fed.groups
    record_lengths(run.run_dir, step, run.progress.version, sampled)
    metrics |= fed.metrics
    tokens = sum(len(c) for group in sampled for c in group.completions)
    seconds = time.perf_counter() - start
    run.progress = run.progress.advance(
        step=step, tokens=run.progress.tokens + tokens, train_seconds=run.progress.train_seconds + seconds
    )
    metrics |= group_metrics(sampled, trained) | run.suite.metrics()
    metrics |= {"timing_s/gen": fed.waited, "timing_s/step": seconds, "sched/learner_idle": fed.waited / seconds}
    metrics["perf/throughput"] = tokens / seconds
    show = {"reward": f"{metrics['critic/score/mean']:.3f}", "accuracy": f"{metrics['training/accuracy']:.1%}"}
    run.tracker.log(step, metrics, show=show | {"tokens/s": f"{tokens / seconds:,.0f}"})


def train_whole(
    run: Run, feed: GroupFeed, step: int, objective: Objective
) -> tuple[Feed, list[Group], dict[str, float]]:
    """Waits for all groups of the step, trains on them and publishes: what was sampled, what trained, and the metrics."""
    fed = feed.take(step)
    ages, trained = admitted(run, fed.groups)
    with run.learning():
        return fed, trained, ages | update(run, trained, objective)


def train_in_parts(
    run: Run, feed: GroupFeed, step: int, objective: Objective
) -> tuple[Feed, list[Group], dict[str, float]]:
    """As `train_whole`, but the learners begin as soon as the first part's groups are there, with the same gradient.

    A part's loss has the part's own denominator D_p (tokens or completions), so the step's gradient is
    sum_p D_p g_p / sum_p D_p: each part is weighted by its D_p, and one factor mends the sum at the end.
    """
    config, learners = run.config, run.learners
    feeds: list[Feed] = []
    trained: list[Group] = []
    weights: list[int] = []
    done: list[dict[str, float]] = []
    whole = 0
    for part in feed.stream(step, config.schedule.stream_parts):
        feeds.append(part)
        _, groups = admitted(run, part.groups)
        trained += groups
        counted = denominator(groups, config.loss, mask_cut=config.filter.overlong_mask)
        whole += counted
        batch = make_batch(
            groups,
            config.loss,
            config.advantage,
            max_length=config.rollout.max_response_length,
            keep_all=objective.needs_all_tokens,
            mask_cut=config.filter.overlong_mask,
        )
        if batch is not None:
            batch = replace(batch, weights_T=batch.weights_T * counted)
            done.append(learners.accumulate(with_estimates(run, objective, batch), objective))
            weights.append(batch.num_loss_tokens)
    fed = Feed(
        groups=[group for part in feeds for group in part.groups],
        waited=sum(part.waited for part in feeds),
        metrics=summed(feeds),
    )
    metrics = staleness(fed.groups, run.progress.version, config.schedule.max_staleness)
    metrics["training/updates"] = float(bool(done))
    if not done:
        learners.skip(1)
    else:
        metrics |= pooled(done, weights) | learners.finish(1 / whole)
        metrics["actor/pg_loss"] /= whole
        refresh_reference(run)
        metrics |= run.publish(wait=False)
    return fed, trained, metrics


def summed(feeds: Sequence[Feed]) -> dict[str, float]:
    """The schedule's figures of a step from those of its parts: counts add up, what describes a moment is the last one's."""
    found = dict(feeds[-1].metrics)
    for name in ("groups_issued", "groups_reissued", "groups_evicted", "workers_restarted"):
        found[f"sched/{name}"] = sum(feed.metrics[f"sched/{name}"] for feed in feeds)
    return found


def pooled(done: Sequence[dict[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """A step's metrics from those of its parts: means over loss tokens, of which part i has weights[i]; sums of times and
    of the loss, the largest of maxima."""
    metrics = {name: float(np.average([each[name] for each in done], weights=weights)) for name in done[0]}
    for name in done[0]:
        values = [each[name] for each in done]
        if name == "actor/pg_loss" or name.startswith("timing_s/"):
            metrics[name] = sum(values)
        elif name.endswith("_max"):
            metrics[name] = max(values)
    return metrics


def admitted(run: Run, sampled: Sequence[Group]) -> tuple[dict[str, float], list[Group]]:
    """How old these groups are, and those of them that train, with their advantages."""
    config = run.config
    check_errors([v for group in sampled for v in group.verdicts], config.reward.max_error_fraction)
    ages = staleness(sampled, run.progress.version, config.schedule.max_staleness)
    return ages, with_advantages(run, [g for g in sampled if g.has_signal or not config.filter.zero_variance])


def staleness(groups: Sequence[Group], version: int, bound: int) -> dict[str, float]:
    """How many versions older than `version` the tokens are: mean and maximum over all; none is above `bound`."""
    spans = [span for group in groups for completion in group.completions for span in completion.spans]
    if not spans:
        return {}
    ages = np.array([version - span.version for span in spans])
    counts = np.array([span.stop - span.start for span in spans])
    assert ages.min() >= 0 and ages.max() <= bound, f"tokens are {ages.max()} versions old, the bound is {bound}"
    mean = float((ages * counts).sum() / counts.sum())
    return {"sched/staleness/mean": mean, "sched/staleness/max": float(ages.max())}


def update(run: Run, trained: Sequence[Group], objective: Objective) -> dict[str, float]:
    """The optimizer steps of one RL step, then a new version of the weights if there were any; means over the updates,
    but for the learning rate and counts, which are the last one's."""
    config, schedule, learners = run.config, run.config.schedule, run.learners
    has_critic = config.advantage.needs_critic
    batches = make_batches(
        trained,
        config.loss,
        config.advantage,
        parts=schedule.minibatches,
        max_length=config.rollout.max_response_length,
        keep_all=objective.needs_all_tokens or has_critic,
        mask_cut=config.filter.overlong_mask,
        kl=config.kl,
        estimate=partial(with_estimates, run, objective),
    )
    metrics = {"perf/total_num_tokens": float(sum(b.num_tokens for b in batches))}
    with_policy = not has_critic or run.progress.step >= config.critic.warmup
    done: list[dict[str, float]] = []
    for _ in range(schedule.epochs):
        for batch in batches:
            found = learners.critic_step(batch) if has_critic else {}
            done.append(found | (learners.step(batch, objective) if with_policy else {}))
    metrics["training/updates"] = float(len(done) if with_policy else 0)
    if missing := schedule.minibatches * schedule.epochs - len(done):
        learners.skip(missing)
    if not done:
        return metrics
    metrics |= averages(done)
    if has_critic:
        metrics |= critic_metrics(batches)
    refresh_reference(run)
    return metrics | (run.publish(wait=False) if with_policy else {})


def refresh_reference(run: Run) -> None:
    """The policy of this moment becomes the reference where this step is to end with that."""
    kl = run.config.kl
    if kl.ref_refresh_steps and (run.progress.step + 1) % kl.ref_refresh_steps == 0 and kl.active:
        run.learners.refresh_reference()


def with_estimates(run: Run, objective: Objective, batch: Batch) -> Batch:
    """The step's batch with what the learners say of it before its first update: the critic's values, and log-probs of
    the reference and of the old policy where these are needed."""
    config, learners = run.config, run.learners
    updates = config.schedule.minibatches * config.schedule.epochs
    if objective.needs_old_logp and (updates > 1 or config.kl.place == "reward"):  # a single update does this by itself
        batch = replace(batch, old_logp_T=learners.logprobs(batch, objective.temperature))
    if config.kl.active:
        batch = replace(batch, reference_logp_T=learners.reference_logprobs(batch, objective.temperature))
    if config.advantage.needs_critic:
        batch = replace(batch, values_T=learners.values(batch))
    return batch


def averages(done: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over a step's updates; times are sums, learning rates and counts the last one's."""
    metrics = {name: float(np.mean([each[name] for each in done])) for name in done[0]}
    metrics |= {name: done[-1][name] for name in done[0] if name.endswith(("/lr", "/steps_skipped"))}
    return metrics | {name: value * len(done) for name, value in metrics.items() if name.startswith("timing_s/")}


def critic_metrics(batches: Sequence[Batch]) -> dict[str, float]:
    """How good the critic's values were before the step: their mean, and the share of the returns' variance that they
    explain (verl's names)."""
    values, returns = (
        np.concatenate([row[b.loss_mask_T] for b in batches if (row := getattr(b, name)) is not None])
        for name in ("values_T", "returns_T")
    )
    explained = 1 - np.var(returns - values) / np.var(returns) if np.var(returns) > 0 else 0.0
    return {
        "critic/values/mean": float(values.mean()),
        "critic/returns/mean": float(returns.mean()),
        "critic/vf_explained_var": float(explained),
    }


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
