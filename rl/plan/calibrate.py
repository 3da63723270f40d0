"""A scenario from what a run measured: its metrics, its recorded answers and its configuration.

What is measured is kept, and what is asked otherwise (`schedule.max_staleness=2`,
`cluster.rollouts=4`, ...) replaces the run's own setting. So a short run at one setting predicts
others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `pa.compute` is there only then

from ..config.load import load_config
from ..run_directory import METRICS
from ..watch.lengths import read_lengths
from .devices import DecodeTable, Floats
from .settings import PlanSchedule, Publication, RewardTime, Scenario, TraceLengths

Steps = Sequence[dict[str, Any]]
SKIPPED = 2  # steps at the beginning of a run that are not used: they compile and warm up
SPREAD = 1.5  # of steps' tokens, large over small, from which a line through their times is sound
EQUAL = 1e-9  # of two fits whose errors differ by a smaller share, the one with fewer terms wins
STEPS, WARMUP, GRADERS = 80, 10, 64  # of the simulation


def calibrate(
    run_dir: Path, overrides: Sequence[str] = (), also: Sequence[Path] = ()
) -> tuple[Scenario, dict[str, str]]:
    """The scenario of a run, with these settings changed, and where each of its numbers is from.
    `also`: runs of the same model on the same learners with other batches, which tell the learners'
    fixed time from that of the tokens."""
    source, target = (load_config(run_dir / "config.yaml", keys) for keys in ((), overrides))
    recordings = [read_recording(folder) for folder in (run_dir, *also)]
    steps, answers = recordings[0]
    timed = [step for steps, _ in recordings for step in steps]
    fixed, per_token = learner_time(timed)
    workers, slots = target.cluster.rollouts, target.rollout.max_num_seqs
    table, offset, speed = decoding(answers, workers=source.cluster.rollouts, slots=slots)
    commits = [step.get("sync/apply_s", 0.0) for step in steps]
    updates = np.array([step["timing_s/update_weights"] for step in steps])
    encode, commit = float(np.mean(updates - commits)), float(np.mean(commits))
    if source.schedule.max_staleness == 0:
        # what a step waited beyond its longest decoding, for dealing, delivery and marking
        waited = [s["timing_s/gen"] - (s["ended_max"] - s["started_min"]) for s in steps]
        latency = max(0.0, float(np.median(waited)))
    else:
        latency = float(np.mean(np.asarray(answers["grade_s"])))
    latency = max(0.0, latency + offset)
    lengths = recorded_lengths(answers, target.rollout.max_response_length)
    mean = np.concatenate([own for _, own in lengths.groups]).mean()
    us = 1e6 * per_token
    own_keys = target.schedule.model_dump(include=set(PlanSchedule.model_fields))
    scenario = Scenario(
        workers=workers,
        slots=slots,
        table=table,
        lengths=lengths,
        schedule=PlanSchedule(group_size=target.rollout.group_size, **own_keys),
        learner_fixed=fixed,
        learner_per_token=per_token * source.cluster.learners / target.cluster.learners,
        reward=RewardTime(seconds=latency, cv=0, graders=GRADERS),
        publication=Publication(encode=encode, commit=commit),
        steps=STEPS,
        warmup=WARMUP,
    )
    return scenario, {
        "answers": f"{answers.num_rows} recorded, mean {mean:.0f} tokens",
        "learner": f"{fixed:.3g} s a step and {us:.3g} us a token, of {len(timed)} steps",
        "decoding": speed,
        "publication": (
            f"{encode:.3g} s; decoding stands still {commit:.3g} s, as measured with"
            f" rollout.engine={source.rollout.engine}, sync.mode={source.sync.mode}"
        ),
        "delivery and marking": f"{latency:.3g} s a group",
    }


def read_recording(run_dir: Path) -> tuple[Steps, pa.Table]:
    """Metrics of a run's RL steps after the first `SKIPPED` (of steps that were done twice the
    later), each with the sums and the times of its answers (`prompt_length_sum`, `started_min`,
    ...), and the answers of these steps."""
    metrics = run_dir / METRICS
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: --from-run needs the folder of a run")
    rows = map(json.loads, metrics.read_text().splitlines())
    by_step = {row["step"]: row for row in rows if row["stage"] == "rl" and row["axis"] == "train"}
    answers = read_lengths(run_dir)
    answers = answers.filter(pa.compute.greater(answers["step"], SKIPPED))
    ended = pa.compute.add(answers["started"], answers["decode_s"])
    by = answers.append_column("ended", ended).group_by("step")
    sums = [("prompt_length", "sum"), ("response_length", "sum")]
    of_steps = by.aggregate([*sums, ("started", "min"), ("ended", "max")]).sort_by("step")
    steps = [by_step.get(own["step"], {}) | own for own in of_steps.to_pylist()]
    steps = [step for step in steps if "timing_s/update_weights" in step]
    if not steps:
        raise ValueError(
            f"{run_dir} has too few RL steps to learn from: {SKIPPED} are skipped, and some must"
            " be left"
        )
    return steps, answers


def learner_time(steps: Steps) -> tuple[float, float]:
    """(seconds a step, seconds a token of prompts and answers) of what is neither waiting for
    groups nor publishing; neither is below 0.

    Least squares, where the steps' sizes differ enough to tell the two apart. Else the optimizer
    steps are taken to be proportional to the tokens, and the rest to be fixed.
    """
    x = np.array([float(s["prompt_length_sum"] + s["response_length_sum"]) for s in steps])
    gen, publishing = "timing_s/gen", "timing_s/update_weights"
    y = np.array([s["timing_s/step"] - s[gen] - s[publishing] for s in steps])
    if np.quantile(x, 0.9) >= SPREAD * np.quantile(x, 0.1):
        fixed, per_token = nonnegative_least_squares(np.stack([np.ones_like(x), x], axis=1), y)
        return float(fixed), float(per_token)
    updates = float(np.mean([step.get("timing_s/update_actor", 0.0) for step in steps]))
    return max(0.0, float(y.mean()) - updates), updates / float(x.mean())


def decoding(answers: pa.Table, *, workers: int, slots: int) -> tuple[DecodeTable, float, str]:
    """An engine's speed, estimated from recorded answers; the seconds that an answer takes longer
    than its tokens do (below 0 where its first tokens are for free); and the speed in words.

    An answer of L tokens takes (a + b n + c n context) L + offset seconds, n answers in its
    worker's batch. Which worker decoded an answer is not recorded: n is what ran meanwhile, over
    all workers, divided by their number.
    """
    names = ("prompt_length", "response_length", "started", "decode_s")
    columns = np.array([np.asarray(answers[name], np.float64) for name in names])
    prompts, lengths, begin, seconds = columns[:, (columns[1] > 0) & (columns[3] > 0)]
    context = prompts + lengths / 2
    n = np.maximum(1.0, mean_running(begin, begin + seconds) / workers)
    one = np.ones_like(n)
    features = np.stack([lengths, n * lengths, n * context * lengths, one, -one], axis=1)
    a, b, c, longer, shorter = nonnegative_least_squares(features, seconds)
    running = np.array([1.0, float(max(2, slots))])
    contexts = np.array([0.0, 2 * float(context.max())])
    grid = a + b * running[:, None] + c * running[:, None] * contexts[None, :]
    rate = 1 / max(float(a + b * n.mean() + c * (n * context).mean()), 1e-9)
    words = f"{rate:.3g} tokens/s an answer at {n.mean():.3g} answers a worker"
    table = DecodeTable(running=running, context=contexts, seconds=np.maximum(grid, 1e-9))
    return table, float(longer - shorter), words


def mean_running(begin: Floats, end: Floats) -> Floats:
    """[N] the mean number of these intervals that ran during each of them."""
    times = np.concatenate([begin, end])
    change = np.concatenate([np.ones_like(begin), -np.ones_like(end)])
    order = np.argsort(times, kind="stable")
    times, running = times[order], np.cumsum(change[order])
    area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
    during: Floats = np.interp(end, times, area) - np.interp(begin, times, area)
    return during / np.maximum(end - begin, 1e-9)


def recorded_lengths(answers: pa.Table, longest: float = np.inf) -> TraceLengths:
    """The groups of a recording, their answers cut at `longest`; a table without groups becomes
    groups of one."""
    lengths = np.minimum(np.asarray(answers["response_length"], np.float64), longest)
    alone = np.arange(len(lengths))
    prompts, *key = (
        np.asarray(answers[name]) if name in answers.column_names else default
        for name, default in [("prompt_length", 0 * alone), ("step", alone), ("prompt_id", alone)]
    )
    rows: dict[tuple[Any, ...], list[int]] = {}
    for i, group in enumerate(zip(*key, strict=True)):
        rows.setdefault(group, []).append(i)
    return TraceLengths([(int(prompts[own[0]]), lengths[own]) for own in rows.values()])


def trace_lengths(source: Path) -> TraceLengths:
    """The lengths in the folder or file of `--trace`."""
    table = read_lengths(source)
    if "response_length" not in table.column_names or not table.num_rows:
        raise ValueError(
            f"{source} has no rows with a response_length; its columns are"
            f" {', '.join(table.column_names)}"
        )
    return recorded_lengths(table)


def nonnegative_least_squares(features: Floats, y: Floats) -> Floats:
    """The weights >= 0 with the least squared error: every subset of the few features is tried."""
    total = float((y**2).sum())
    best, error = np.zeros(features.shape[1]), total
    columns = range(features.shape[1])
    for chosen in chain.from_iterable(combinations(columns, 1 + i) for i in columns):
        weights = np.linalg.lstsq(features[:, chosen], y, rcond=None)[0]
        residual = float(((features[:, chosen] @ weights - y) ** 2).sum())
        if (weights >= 0).all() and residual < error - EQUAL * total:
            best, error = np.zeros(features.shape[1]), residual
            best[list(chosen)] = weights
    return best
