"""The RL training loop: sample groups with the newest weights, grade them, keep those with a
signal, update, publish, log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ..rewards.suite import check_errors
from .algorithm.advantages import Floats, group_advantages, overlong_penalty
from .algorithm.losses import Objective
from .batch import flat_batch, updates_of, with_teachers, with_token_advantages
from .config.load import Config
from .data.mixture import MixtureSource
from .evaluate import begin_evaluation
from .feed import GroupFeed
from .groups import Batch, Group
from .run import Run
from .watch.alarms import Alarms, failures
from .watch.console import figures
from .watch.lengths import record_lengths
from .watch.profiles import traced
from .watch.spans import LOOP, STEP
from .watch.step_metrics import (
    averages,
    batch_metrics,
    check_engine_logprobs,
    histograms,
    sample_metrics,
    speed_metrics,
    teacher_metrics,
)


async def train_rl(run: Run) -> None:
    """Runs RL steps from the run's progress to `schedule.steps`. Every token is at most
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
        await asyncio.to_thread(run.learners.load_teachers, config.distill)
    if isinstance(run.source, MixtureSource) and run.progress.curriculum is not None:
        run.source.restore(run.progress.curriculum)
    alarms = Alarms(config, run.progress.entropy_start)
    tracing = partial(
        traced,
        steps=config.profile.steps,
        run_dir=run.run_dir,
        learners=run.learners,
        workers=run.pool,
        alert=run.tracker.alert,
    )
    run.tracker.begin("rl", run.progress.step, schedule.steps)
    if config.eval.active and (run.progress.step == 0 or run.progress.evaluating is not None):
        await begin_evaluation(run)
    else:
        run.progress = run.progress.advance(evaluating=None)

    async with GroupFeed(run) as feed:
        while run.progress.step < schedule.steps:
            await run.stop_if_asked()
            async with tracing(run.progress.step + 1):
                metrics = await rl_step(run, feed, objective)
            step, last = run.progress.step, run.progress.step == schedule.steps
            for alarm in failures(step, metrics):
                run.tracker.alert(alarm.title, alarm.text)
            for alarm in [*alarms.after(step, metrics), *(alarms.at_end() if last else [])]:
                run.tracker.alert(alarm.title, alarm.text)
                run.progress = run.progress.advance(
                    warnings=(*run.progress.warnings, f"{alarm.title}: {alarm.text}")
                )
            run.progress = run.progress.advance(entropy_start=alarms.entropy_start)
            if config.eval.active and (
                last or (config.eval.every and step % config.eval.every == 0)
            ):
                await begin_evaluation(run)
            if last:
                await run.evaluated()
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                await run.save(needed=last)
        await run.weights.delivered()


async def rl_step(run: Run, feed: GroupFeed, objective: Objective) -> dict[str, float]:
    """Takes the groups of one step, trains on them, publishes and logs; returns the logged metrics.
    Raises `TooManyErrors` if graders, rather than answers, fail."""
    config, step, start = run.config, run.progress.step + 1, time.perf_counter()
    spans, version, began = run.tracker.spans, run.progress.version, time.time()
    spans.step = step
    with spans.span(LOOP, "waiting for answers"):
        fed = await feed.take(step)
    ages, trained = admitted(run, fed.groups)
    async with run.learning():
        metrics = ages | await update(run, trained, objective)
    sampled = fed.groups
    record_lengths(run.run_dir, step, version, sampled, trained)
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
    run.held = run.progress
    of_samples = sample_metrics(sampled, trained, shaped, **limits)
    # in this order: with rewards per token, whose metrics include the KL penalty, those replace the
    # scores' of the samples
    metrics = fed.metrics | of_samples | metrics | run.suite.metrics()
    metrics |= {"timing_s/gen": fed.waited, "sched/learner_idle": fed.waited / seconds}
    metrics |= run.weights.check_step(metrics, version)
    metrics |= speed_metrics(metrics["perf/total_num_tokens"], tokens, seconds, devices(config))
    metrics["rollout/version"] = float(version)
    spans.add(LOOP, STEP, began, time.time())
    for worker, since, until in run.pool.busy_spans():
        spans.add(f"rollout {worker}", "decoding", since, until)
    # "none" remains if no answer of the step has a verdict
    run.tracker.log(step, metrics, show={"reward": "none"} | figures(metrics))
    run.tracker.histograms(step, histograms(sampled, trained, version))
    await asyncio.to_thread(run.tracker.keep, "train", step, sampled, run.answers, trained)
    return metrics


def admitted(run: Run, sampled: Sequence[Group]) -> tuple[dict[str, float], list[Group]]:
    """(staleness metrics of these groups, those of them that train, with advantages). Raises
    `TooManyErrors`."""
    config = run.config
    check_errors([v for group in sampled for v in group.verdicts], config.reward.max_error_fraction)
    ages = staleness(sampled, run.progress.version, config.schedule.max_staleness)
    return ages, with_advantages(config, sampled)


def staleness(groups: Sequence[Group], version: int, bound: int) -> dict[str, float]:
    """Metrics of the tokens' age in versions before `version`: mean and maximum. Asserts that none
    is above `bound`."""
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


async def update(run: Run, trained: Sequence[Group], objective: Objective) -> dict[str, float]:
    """Makes the optimizer steps of one RL step, then publishes a new version of the weights if
    there were any; returns the metrics."""
    config, schedule, learners = run.config, run.config.schedule, run.learners
    has_critic = config.advantage.needs_critic
    seen: list[Batch] = []
    batches: list[Batch] = []
    longest, mask_cut = config.rollout.max_response_length, config.filter.overlong_mask
    whole = flat_batch(
        trained, config.loss, max_length=longest, mask_cut=mask_cut, distill=config.distill
    )
    spans = run.tracker.spans
    if whole is not None:
        with spans.span(LOOP, "estimates"):
            whole = await with_estimates(run, objective, whole)
        whole = with_token_advantages(whole, config.advantage, config.kl)
        whole = with_teachers(whole, config.distill)
        seen.append(whole)
        batches = updates_of(
            whole,
            trained,
            config.loss,
            parts=schedule.minibatches,
            max_length=longest,
            keep_all=objective.needs_all_tokens or has_critic,
            mask_cut=mask_cut,
        )
    check_engine_logprobs(seen)
    with_policy = not has_critic or run.progress.step >= config.critic.warmup
    run.held = None  # a failure within the step must not save its half-updated weights (`rescue`)
    done: list[dict[str, float]] = []
    with spans.span(LOOP, "update"):
        for batch in [*batches] * schedule.epochs:
            part_metrics = (
                await asyncio.to_thread(learners.critic_step, batch) if has_critic else {}
            )
            if with_policy:
                part_metrics |= await asyncio.to_thread(learners.step, batch, objective)
            done.append(part_metrics)
    metrics = {"training/updates": float(len(done) if with_policy else 0)}
    if missing := schedule.minibatches * schedule.epochs - len(done):
        await asyncio.to_thread(learners.skip, missing)
    # the whole batch's metrics come last and win: those of updates are of parts of it
    metrics |= (averages(done) if done else {}) | batch_metrics(
        seen, config.offpolicy, config.kl.coef
    )
    metrics |= teacher_metrics(seen, config.distill)
    if not done:
        return metrics
    await refresh_reference(run)
    with spans.span(LOOP, "publish"):
        return metrics | (await run.publish(wait=False) if with_policy else {})


async def refresh_reference(run: Run) -> None:
    """Makes the current policy the reference, every `kl.ref_refresh_steps` steps."""
    kl = run.config.kl
    if kl.ref_refresh_steps and (run.progress.step + 1) % kl.ref_refresh_steps == 0 and kl.active:
        await asyncio.to_thread(run.learners.refresh_reference)


async def with_estimates(run: Run, objective: Objective, batch: Batch) -> Batch:
    """The step's batch with the learners' estimates before its first update: the critic's values,
    and log-probs of the reference, the teachers and the old policy, as far as they are needed."""
    config, learners, temperature = run.config, run.learners, objective.temperature
    updates = config.schedule.minibatches * config.schedule.epochs
    # a single update recomputes them itself (`LearnerRank.step`)
    if objective.needs_old_logp and (updates > 1 or config.kl.place == "reward"):
        logp_T = await asyncio.to_thread(learners.logprobs, batch, temperature)
        batch = replace(batch, old_logp_T=logp_T)
    if config.kl.active:
        logp_T = await asyncio.to_thread(learners.reference_logprobs, batch, temperature)
        batch = replace(batch, reference_logp_T=logp_T)
    if config.distill.on_samples:
        logp_T = await asyncio.to_thread(learners.teacher_logprobs, batch, temperature)
        batch = replace(batch, teacher_logp_T=logp_T)
    if config.advantage.needs_critic:
        batch = replace(batch, values_T=await asyncio.to_thread(learners.values, batch))
    return batch


def with_advantages(config: Config, sampled: Sequence[Group]) -> list[Group]:
    """The groups that train, with the advantage of each completion; 0 for one without a verdict."""
    kept = [g.has_signal or not config.filter.zero_variance for g in sampled]
    # the deviation of a step is of all its scores; everything else compares within a group
    whole = config.advantage.std == "batch"
    groups = [g for g, keep in zip(sampled, kept, strict=True) if keep or whole]
    advantages = group_advantages([shaped_scores(g, config) for g in groups], config.advantage)
    scored = [group.with_advantages(a) for group, a in zip(groups, advantages, strict=True)]
    return [g for g, keep in zip(scored, kept, strict=True) if keep] if whole else scored


def shaped_scores(group: Group, config: Config) -> Floats:
    """The scores [G] to train on: with the penalty on answers near the maximum length."""
    scores, longest = group.scores, config.rollout.max_response_length
    if not config.filter.overlong_share:
        return scores
    buffer = max(1, round(config.filter.overlong_share * longest))
    lengths = np.array([len(c) for c in group.completions])
    return scores + config.filter.overlong_penalty * overlong_penalty(lengths, longest, buffer)


def devices(config: Config) -> int:
    """Number of devices that the run computes on."""
    cluster = config.cluster
    if cluster.colocated:
        return cluster.learners
    return cluster.learners + (
        len(config.rollout.servers) or cluster.rollouts * config.rollout.cards
    )
