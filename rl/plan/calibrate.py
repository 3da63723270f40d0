"""A scenario from what a run measured: its metrics, its recorded answers and its configuration.

What is measured is kept, and what is asked otherwise (`schedule.max_staleness=2`,
`cluster.rollouts=4`, ...) replaces the run's own setting. So a short run at one setting predicts
others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `pa.compute` is there only then

from ..config.load import load_config
from ..run_directory import METRICS
from ..watch.lengths import read_lengths
from .devices import DecodeTable, Floats
from .settings import PlanSchedule, Publication, RewardTime, Scenario, TraceLengths

SKIPPED = 2
"""Steps at the beginning of a run that are not used: they compile and warm up."""
SPREAD = 1.5
"""Tokens of a large step over those of a small one, above which a line through the steps' times
means something."""
EQUAL = 1e-9
"""Of two fits whose errors differ by less (of all there is to explain), the one with fewer terms is
taken."""
STEPS, WARMUP, GRADERS = 80, 10, 64
"""Of the simulation."""


def calibrate(
    run_dir: Path, overrides: Sequence[str] = (), also: Sequence[Path] = ()
) -> tuple[Scenario, dict[str, str]]:
    """The scenario of a run, with these settings changed, and where each of its numbers is from.
    `also`: runs of the same model on the same learners with other batches, which tell the learners'
    fixed time from that of the tokens."""
    source, target = (load_config(run_dir / "config.yaml", keys) for keys in ((), overrides))
    recordings = [read_recording(folder) for folder in (run_dir, *also)]
    for folder, (steps, answers) in zip((run_dir, *also), recordings, strict=True):
        if not steps or not answers.num_rows:
            raise ValueError(
                f"{folder} has too few RL steps to learn from: {SKIPPED} are skipped, and some must"
                " be left"
            )
    steps, answers = recordings[0]
    timed = np.concatenate([learner_steps(*recording) for recording in recordings])
    fixed, per_token = learner_time(timed)
    measured = decoding(answers, workers=source.cluster.rollouts, slots=target.rollout.max_num_seqs)
    commits = [row.get("sync/apply_s", 0.0) for row in steps]
    encodes = [row["timing_s/update_weights"] - row.get("sync/apply_s", 0.0) for row in steps]
    publication = Publication(encode=float(np.mean(encodes)), commit=float(np.mean(commits)))
    if source.schedule.max_staleness == 0:
        latency = delivery_latency(steps, answers)
    else:
        latency = float(np.mean(np.asarray(answers["grade_s"])))
    latency = max(0.0, latency + measured.offset)
    lengths = recorded_lengths(answers, target.rollout.max_response_length)
    mean = np.concatenate([own for _, own in lengths.groups]).mean()
    own = target.schedule.model_dump(include=set(PlanSchedule.model_fields))
    scenario = Scenario(
        workers=target.cluster.rollouts,
        slots=target.rollout.max_num_seqs,
        table=measured.table,
        lengths=lengths,
        schedule=PlanSchedule(group_size=target.rollout.group_size, **own),
        learner_fixed=fixed,
        learner_per_token=per_token * source.cluster.learners / target.cluster.learners,
        reward=RewardTime(seconds=latency, cv=0, graders=GRADERS),
        publication=publication,
        steps=STEPS,
        warmup=WARMUP,
    )
    return scenario, {
        "answers": f"{answers.num_rows} recorded, mean {mean:.0f} tokens",
        "learner": (
            f"{fixed:.3g} s a step and {1e6 * per_token:.3g} us a token, of {len(timed)} steps"
        ),
        "decoding": measured.summary,
        "publication": (
            f"{publication.encode:.3g} s; decoding stands still {publication.commit:.3g} s, as"
            f" measured with rollout.engine={source.rollout.engine}, sync.mode={source.sync.mode}"
        ),
        "delivery and marking": f"{latency:.3g} s a group",
    }


def read_recording(run_dir: Path) -> tuple[list[dict[str, Any]], pa.Table]:
    """The metrics of a run's RL steps after the first `SKIPPED` (of steps that were done twice the
    later), and the answers of these steps."""
    metrics = run_dir / METRICS
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: --from-run needs the folder of a run")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {row["step"]: row for row in rows if row["stage"] == "rl" and row["axis"] == "train"}
    steps = [
        row
        for step, row in sorted(by_step.items())
        if step > SKIPPED and "timing_s/update_weights" in row
    ]
    answers = read_lengths(run_dir)
    return steps, answers.filter(pa.compute.greater(answers["step"], SKIPPED))


def learner_steps(steps: Sequence[dict[str, Any]], answers: pa.Table) -> Floats:
    """[N, 3] of each step: tokens of prompts and answers; seconds that were neither waiting for
    groups nor publishing; of these, seconds in optimizer steps."""
    total = np.asarray(answers["prompt_length"]) + np.asarray(answers["response_length"])
    numbers, place = np.unique(np.asarray(answers["step"]), return_inverse=True)
    tokens = dict(zip(numbers.tolist(), np.bincount(place, weights=total), strict=True))
    rows = [
        (
            tokens[row["step"]],
            row["timing_s/step"] - row["timing_s/gen"] - row["timing_s/update_weights"],
            row.get("timing_s/update_actor", 0.0),
        )
        for row in steps
        if row["step"] in tokens
    ]
    return np.array(rows, np.float64).reshape(-1, 3)


def learner_time(steps: Floats) -> tuple[float, float]:
    """(seconds a step, seconds a token); neither is below 0.

    Least squares, where the steps' sizes differ enough to tell the two apart. Else the optimizer
    steps are taken to be proportional to the tokens, and the rest to be fixed.
    """
    x, y, updating = steps.T
    if np.quantile(x, 0.9) >= SPREAD * np.quantile(x, 0.1):
        fixed, per_token = nonnegative_least_squares(np.stack([np.ones_like(x), x], axis=1), y)
        return float(fixed), float(per_token)
    updates = float(updating.mean())
    return max(0.0, float(y.mean()) - updates), updates / float(x.mean())


class Decoding(NamedTuple):
    """An engine's speed, estimated from recorded answers."""

    table: DecodeTable
    offset: float
    """Seconds that an answer takes longer than its tokens do; below 0 where its first tokens are
    for free."""
    summary: str


def decoding(answers: pa.Table, *, workers: int, slots: int) -> Decoding:
    """An answer of L tokens takes (a + b n + c n context) L + offset seconds, n answers in its
    worker's batch.

    Which worker decoded an answer is not recorded: n is what ran meanwhile, over all workers,
    divided by their number.
    """
    lengths = np.asarray(answers["response_length"]).astype(np.float64)
    begin, seconds = np.asarray(answers["started"]), np.asarray(answers["decode_s"])
    sound = (lengths > 0) & (seconds > 0)
    lengths, begin, seconds = lengths[sound], begin[sound], seconds[sound]
    context = np.asarray(answers["prompt_length"])[sound] + lengths / 2
    n = np.maximum(1.0, mean_running(begin, begin + seconds) / workers)
    one = np.ones_like(n)
    features = np.stack([lengths, n * lengths, n * context * lengths, one, -one], axis=1)
    a, b, c, longer, shorter = nonnegative_least_squares(features, seconds)
    running = np.array([1.0, float(max(2, slots))])
    contexts = np.array([0.0, 2 * float(context.max())])
    grid = a + b * running[:, None] + c * running[:, None] * contexts[None, :]
    typical = float(a + b * n.mean() + c * (n * context).mean())
    rate = 1 / max(typical, 1e-9)
    return Decoding(
        table=DecodeTable(running=running, context=contexts, seconds=np.maximum(grid, 1e-9)),
        offset=float(longer - shorter),
        summary=f"{rate:.3g} tokens/s an answer at {n.mean():.3g} answers a worker",
    )


def mean_running(begin: Floats, end: Floats) -> Floats:
    """[N] how many of these intervals ran, on average, during each of them."""
    times = np.concatenate([begin, end])
    change = np.concatenate([np.ones_like(begin), -np.ones_like(end)])
    order = np.argsort(times, kind="stable")
    times, running = times[order], np.cumsum(change[order])
    area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
    during: Floats = np.interp(end, times, area) - np.interp(begin, times, area)
    return during / np.maximum(end - begin, 1e-9)


def delivery_latency(steps: Sequence[dict[str, Any]], answers: pa.Table) -> float:
    """Of a synchronous run: what a step waited beyond its longest decoding, for dealing, delivery
    and marking."""
    number, begin = np.asarray(answers["step"]), np.asarray(answers["started"])
    end = begin + np.asarray(answers["decode_s"])
    spare = [
        row["timing_s/gen"] - (end[own].max() - begin[own].min())
        for row in steps
        if (own := number == row["step"]).any()
    ]
    return max(0.0, float(np.median(spare)))


def recorded_lengths(answers: pa.Table, longest: float = np.inf) -> TraceLengths:
    """The groups of a recording, their answers cut at `longest`; a table without groups becomes
    groups of one."""
    lengths = np.minimum(np.asarray(answers["response_length"]).astype(np.float64), longest)
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
    for size in columns:
        for chosen in combinations(columns, size + 1):
            weights = np.linalg.lstsq(features[:, chosen], y, rcond=None)[0]
            residual = float(((features[:, chosen] @ weights - y) ** 2).sum())
            if (weights >= 0).all() and residual < error - EQUAL * total:
                best, error = np.zeros(features.shape[1]), residual
                best[list(chosen)] = weights
    return best
