"""The loop: sample groups with the newest weights, mark them, keep those with a signal, step,
publish, log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ..rewards.suite import check_errors
from .algorithm.advantages import Floats, group_advantages, overlong_penalty
from .algorithm.losses import Objective
from .batch import denominator, make_batch, make_batches
from .config.load import Config
from .data.mixture import MixtureSource
from .evaluate import evaluate
from .feed import Feed, GroupFeed
from .groups import Batch, Group
from .run import Run
from .watch.alarms import Alarms
from .watch.lengths import record_lengths
from .watch.step_metrics import (
    averages,
    batch_metrics,
    check_engine_logprobs,
    of_whole_step,
    pooled,
    sample_metrics,
    speed_metrics,
    teacher_metrics,
)


def train_rl(run: Run) -> None:
    """RL steps from where the run stands to `schedule.steps`; every token is at most
    `schedule.max_staleness` versions older than the weights that it trains (0: on-policy, rollouts
    and learners take turns)."""
    config, schedule = run.config, run.config.schedule
    objective = Objective.of(
        config.loss,
        config.kl,
        config.offpolicy,
        distill=config.distill,
        temperature=config.rollout.temperature,
    )
    if config.distill.active:
        run.learners.load_teachers(config.distill)
    alarms = Alarms(config, run.progress.entropy_start)
    run.tracker.begin("rl", run.progress.step, schedule.steps)
    if run.progress.step == 0 and config.eval.active:
        run.progress = run.progress.advance(accuracy_start=evaluate(run).accuracy)

    if isinstance(run.source, MixtureSource) and run.progress.curriculum is not None:
        run.source.restore(run.progress.curriculum)
    with GroupFeed(run) as feed:
        while run.progress.step < schedule.steps:
            run.stop_if_asked()
            metrics = rl_step(run, feed, objective)
            step, last = run.progress.step, run.progress.step == schedule.steps
            for alarm in [*alarms.after(step, metrics), *(alarms.at_end() if last else [])]:
                run.tracker.alert(alarm.title, alarm.text)
                run.progress = run.progress.advance(
                    warnings=(*run.progress.warnings, f"{alarm.title}: {alarm.text}")
                )
            run.progress = run.progress.advance(entropy_start=alarms.entropy_start)
            if config.eval.active and (
                last or (config.eval.every and step % config.eval.every == 0)
            ):
                run.progress = run.progress.advance(accuracy_end=evaluate(run).accuracy)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                run.save()
        run.wait_published()


def rl_step(run: Run, feed: GroupFeed, objective: Objective) -> dict[str, float]:
    """Takes the groups of one step, trains on them, publishes and logs; returns what was logged.
    Raises `TooManyErrors` where graders rather than answers fail."""
    config, step, start = run.config, run.progress.step + 1, time.perf_counter()
    train = train_whole if config.schedule.stream_parts == 1 else train_in_parts
    fed, trained, metrics = train(run, feed, step, objective)
    sampled = fed.groups
    record_lengths(run.run_dir, step, run.progress.version, sampled)
    tokens = sum(c.num_sampled for group in sampled for c in group.completions)
    seconds = time.perf_counter() - start
    run.progress = run.progress.advance(
        step=step,
        tokens=run.progress.tokens + tokens,
        train_seconds=run.progress.train_seconds + seconds,
        updates=run.progress.updates + int(metrics["training/updates"]),
    )
    shaped = [shaped_scores(group, config) for group in sampled]
    limits = {
        "longest": config.rollout.max_response_length,
        "longest_prompt": config.data.max_prompt_length,
    }
    if isinstance(run.source, MixtureSource):
        graded = [(group.prompt, group.verdicts) for group in sampled]
        position, pending = run.progress.position, run.progress.pending
        metrics |= run.source.observe(graded, step, position, pending)
        run.progress = run.progress.advance(curriculum=run.source.state())
    of_samples = sample_metrics(sampled, trained, shaped, **limits)
    # rewards of tokens have the KL penalty in them
    metrics = fed.metrics | of_samples | metrics | run.suite.metrics()
    metrics |= {"timing_s/gen": fed.waited, "sched/learner_idle": fed.waited / seconds}
    metrics |= speed_metrics(metrics["perf/total_num_tokens"], tokens, seconds, devices(config))
    show = {
        "reward": f"{metrics['critic/score/mean']:.3f}",
        "accuracy": f"{metrics['training/accuracy']:.1%}",
    }
    run.tracker.log(step, metrics, show=show | {"tokens/s": f"{tokens / seconds:,.0f}"})
    return metrics


def train_whole(
    run: Run, feed: GroupFeed, step: int, objective: Objective
) -> tuple[Feed, list[Group], dict[str, float]]:
    """Waits for all groups of the step, trains on them and publishes: what was sampled, what
    trained, and the metrics."""
    fed = feed.take(step)
    ages, trained = admitted(run, fed.groups)
    with run.learning():
        return fed, trained, ages | update(run, trained, objective)


def train_in_parts(
    run: Run, feed: GroupFeed, step: int, objective: Objective
) -> tuple[Feed, list[Group], dict[str, float]]:
    """As `train_whole`, but the learners begin as soon as the first part's groups are there, with
    the same gradient.

    A part's loss has the part's own denominator D_p (tokens or completions), so the step's gradient
    is sum_p D_p g_p / sum_p D_p: each part is weighted by its D_p, and the accumulated
    gradient is rescaled once.
    """
    config, learners = run.config, run.learners
    feeds: list[Feed] = []
    trained: list[Group] = []
    weights: list[int] = []
    counts: list[int] = []
    done: list[dict[str, float]] = []
    seen: list[Batch] = []
    whole = passed = 0
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
            observe=seen.append,
        )
        if batch is not None:
            batch = replace(batch, weights_T=batch.weights_T * counted)
            done.append(learners.accumulate(with_estimates(run, objective, batch), objective))
            weights.append(int(batch.loss_mask_T.sum()))
            counts.append(batch.num_loss_tokens)
            passed += counted
    fed = Feed(
        groups=[group for part in feeds for group in part.groups],
        waited=sum(part.waited for part in feeds),
        metrics=summed(feeds),
    )
    metrics = staleness(fed.groups, run.progress.version, config.schedule.max_staleness)
    check_engine_logprobs(seen)
    metrics |= batch_metrics(seen, config.offpolicy, config.kl.coef) | {
        "training/updates": float(bool(done))
    }
    if not done:
        learners.skip(1)
    else:
        every = sum(b.num_loss_tokens for b in seen) if config.loss.kind == "ppo_clip" else None
        metrics |= of_whole_step(
            pooled(done, weights), done, counts, whole=whole, trained=passed, every=every
        )
        metrics |= learners.finish(1 / whole)
        refresh_reference(run)
        metrics |= run.publish(wait=False)
    return fed, trained, metrics


def summed(feeds: Sequence[Feed]) -> dict[str, float]:
    """The schedule's figures of a step from those of its parts: counts add up, what describes a
    moment is the last one's."""
    found = dict(feeds[-1].metrics)
    for name in ("groups_issued", "groups_reissued", "groups_evicted", "workers_restarted"):
        found[f"sched/{name}"] = sum(feed.metrics[f"sched/{name}"] for feed in feeds)
    return found


def admitted(run: Run, sampled: Sequence[Group]) -> tuple[dict[str, float], list[Group]]:
    """How old these groups are, and those of them that train, with their advantages."""
    config = run.config
    check_errors([v for group in sampled for v in group.verdicts], config.reward.max_error_fraction)
    ages = staleness(sampled, run.progress.version, config.schedule.max_staleness)
    return ages, with_advantages(config, sampled)


def staleness(groups: Sequence[Group], version: int, bound: int) -> dict[str, float]:
    """How many versions older than `version` the tokens are: mean and maximum over all; none is
    above `bound`."""
    sampled = [
        pair
        for group in groups
        for completion in group.completions
        for pair in completion.sampled_by_version
    ]
    if not sampled:
        return {}
    ages = np.array([version - by for by, _ in sampled])
    counts = np.array([count for _, count in sampled])
    assert ages.min() >= 0 and ages.max() <= bound, (
        f"tokens are {ages.max()} versions old, the bound is {bound}"
    )
    mean = float((ages * counts).sum() / counts.sum())
    return {"sched/staleness/mean": mean, "sched/staleness/max": float(ages.max())}


def update(run: Run, trained: Sequence[Group], objective: Objective) -> dict[str, float]:
    """The optimizer steps of one RL step, then a new version of the weights if there were any, and
    their figures."""
    config, schedule, learners = run.config, run.config.schedule, run.learners
    has_critic = config.advantage.needs_critic
    seen: list[Batch] = []
    batches = make_batches(
        trained,
        config.loss,
        config.advantage,
        parts=schedule.minibatches,
        max_length=config.rollout.max_response_length,
        keep_all=objective.needs_all_tokens or has_critic,
        mask_cut=config.filter.overlong_mask,
        kl=config.kl,
        distill=config.distill,
        estimate=partial(with_estimates, run, objective),
        observe=seen.append,
    )
    check_engine_logprobs(seen)
    with_policy = not has_critic or run.progress.step >= config.critic.warmup
    done: list[dict[str, float]] = []
    for _ in range(schedule.epochs):
        for batch in batches:
            found = learners.critic_step(batch) if has_critic else {}
            done.append(found | (learners.step(batch, objective) if with_policy else {}))
    metrics = {"training/updates": float(len(done) if with_policy else 0)}
    if missing := schedule.minibatches * schedule.epochs - len(done):
        learners.skip(missing)
    # the whole batch's figures come last: those of updates are of parts of it
    metrics |= (averages(done) if done else {}) | batch_metrics(
        seen, config.offpolicy, config.kl.coef
    )
    metrics |= teacher_metrics(seen, config.distill)
    if not done:
        return metrics
    refresh_reference(run)
    return metrics | (run.publish(wait=False) if with_policy else {})


def refresh_reference(run: Run) -> None:
    """The policy of this moment becomes the reference where this step is to end with that."""
    kl = run.config.kl
    if kl.ref_refresh_steps and (run.progress.step + 1) % kl.ref_refresh_steps == 0 and kl.active:
        run.learners.refresh_reference()


def with_estimates(run: Run, objective: Objective, batch: Batch) -> Batch:
    """The step's batch with what the learners say of it before its first update: the critic's
    values, and log-probs of the reference and of the old policy where these are needed."""
    config, learners = run.config, run.learners
    updates = config.schedule.minibatches * config.schedule.epochs
    # a single update does this by itself
    if objective.needs_old_logp and (updates > 1 or config.kl.place == "reward"):
        batch = replace(batch, old_logp_T=learners.logprobs(batch, objective.temperature))
    if config.kl.active:
        batch = replace(
            batch, reference_logp_T=learners.reference_logprobs(batch, objective.temperature)
        )
    if config.distill.on_samples:
        batch = replace(
            batch, teacher_logp_T=learners.teacher_logprobs(batch, objective.temperature)
        )
    if config.advantage.needs_critic:
        batch = replace(batch, values_T=learners.values(batch))
    return batch


def with_advantages(config: Config, sampled: Sequence[Group]) -> list[Group]:
    """The groups that train, with the advantage of each completion, NaN scores (no verdict) at
    0."""
    kept = [g.has_signal or not config.filter.zero_variance for g in sampled]
    # the deviation of a step is of all its scores; everything else compares within a group
    whole = config.advantage.std == "batch"
    groups = [g for g, keep in zip(sampled, kept, strict=True) if keep or whole]
    advantages = group_advantages([shaped_scores(g, config) for g in groups], config.advantage)
    scored = [group.with_advantages(a) for group, a in zip(groups, advantages, strict=True)]
    return [g for g, keep in zip(scored, kept, strict=True) if keep] if whole else scored


def shaped_scores(group: Group, config: Config) -> Floats:
    """[G] scores as they are trained on: with the penalty on answers near the longest."""
    scores, longest = group.scores, config.rollout.max_response_length
    if not config.filter.overlong_share:
        return scores
    buffer = max(1, round(config.filter.overlong_share * longest))
    lengths = np.array([len(c) for c in group.completions])
    return scores + config.filter.overlong_penalty * overlong_penalty(lengths, longest, buffer)


def devices(config: Config) -> int:
    """Devices that the run computes on."""
    cluster = config.cluster
    if cluster.colocated:
        return cluster.learners
    return cluster.learners + (
        len(config.rollout.servers) or cluster.rollouts * config.rollout.cards
    )
