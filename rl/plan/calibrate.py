"""A scenario from what a run measured: its metrics, its recorded answers and its configuration.

What is measured is kept, and what is asked otherwise (`schedule.max_staleness=2`,
`cluster.rollouts=4`, ...) replaces the run's own setting. So a short run at one setting predicts
others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `pa.compute` is there only then

from ...rollout.schedule import QUEUE_DEPTH
from ..config.load import load_config
from ..run_directory import METRICS
from ..watch.lengths import read_lengths
from .scenario import DecodeTable, Floats, Publication, RewardTime, Scenario, TraceLengths

SKIPPED = 2
"""Steps at the beginning of a run that are not used: they compile and warm up."""
SPREAD = 1.5
"""Tokens of a large step over those of a small one, above which a line through the steps' times
means something."""
EQUAL = 1e-9
"""Of two fits whose errors differ by less (of all there is to explain), the one with fewer terms is
taken."""
STEPS, WARMUP = 80, 10
"""Of the simulation."""


def calibrate(
    run_dir: Path, overrides: Sequence[str] = (), also: Sequence[Path] = ()
) -> tuple[Scenario, dict[str, str]]:
    """The scenario of a run, with these settings changed, and where each of its numbers is from.
    `also`: runs of the same model on the same learners with other batches, which tell the learners'
    fixed time from that of the tokens."""
    source, target = (load_config(run_dir / "config.yaml", keys) for keys in ((), overrides))
    steps = training_steps(run_dir / METRICS)
    table = read_lengths(run_dir)
    table = table.filter(pa.compute.greater(table["step"], SKIPPED))
    if not steps or not table.num_rows:
        raise ValueError(
            f"{run_dir} has too few RL steps to learn from: {SKIPPED} are skipped, and some must be"
            " left"
        )
    timed = learner_steps(steps, tokens_by_step(table))
    for other in also:
        timed += learner_steps(training_steps(other / METRICS), tokens_by_step(read_lengths(other)))
    fixed, per_token = learner_time(timed)
    measured = decoding(table, workers=source.cluster.rollouts, slots=target.rollout.max_num_seqs)
    commits = [row.get("sync/apply_s", 0.0) for row in steps]
    encodes = [row["timing_s/update_weights"] - row.get("sync/apply_s", 0.0) for row in steps]
    publication = Publication(encode=float(np.mean(encodes)), commit=float(np.mean(commits)))
    if source.schedule.max_staleness == 0:
        latency = delivery_latency(steps, table)
    else:
        latency = float(np.mean(np.asarray(table["grade_s"])))
    latency = max(0.0, latency + measured.offset)
    scenario = Scenario(
        workers=target.cluster.rollouts,
        slots=target.rollout.max_num_seqs,
        given=QUEUE_DEPTH * target.rollout.max_num_seqs if target.schedule.max_staleness else None,
        table=measured.table,
        lengths=recorded_lengths(table, target.rollout.max_response_length),
        prompts_per_step=target.schedule.prompts_per_step,
        group_size=target.rollout.group_size,
        learner_fixed=fixed,
        learner_per_token=per_token * source.cluster.learners / target.cluster.learners,
        max_staleness=target.schedule.max_staleness,
        overdue="evict" if target.schedule.oversample > 1 else target.schedule.overdue,
        in_flight=target.schedule.in_flight,
        oversample=target.schedule.oversample,
        reward=RewardTime(seconds=latency, graders=64),
        publication=publication,
        steps=STEPS,
        warmup=WARMUP,
    )
    sources = {
        "answers": f"{table.num_rows} recorded, mean {scenario.lengths.mean:.0f} tokens",
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
    return scenario, sources


def training_steps(metrics: Path) -> list[dict[str, Any]]:
    """The rows of RL steps after the first `SKIPPED`; of steps that were done twice the later."""
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: --from-run needs the folder of a run")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {row["step"]: row for row in rows if row["stage"] == "rl" and row["axis"] == "train"}
    return [
        row
        for step, row in sorted(by_step.items())
        if step > SKIPPED and "timing_s/update_weights" in row
    ]


def tokens_by_step(table: pa.Table) -> dict[int, int]:
    """Prompt and answer tokens of the groups of each step."""
    total = np.asarray(table["prompt_length"]) + np.asarray(table["response_length"])
    steps, inverse = np.unique(np.asarray(table["step"]), return_inverse=True)
    return {
        int(step): int(n)
        for step, n in zip(steps, np.bincount(inverse, weights=total), strict=True)
    }


class LearnerStep(NamedTuple):
    """A step's tokens and the time that they took."""

    tokens: int
    seconds: float
    """All that is neither waiting for groups nor publishing."""
    updating: float
    """Of these, in optimizer steps."""


def learner_steps(
    steps: Sequence[Mapping[str, Any]], tokens: Mapping[int, int]
) -> list[LearnerStep]:
    return [
        LearnerStep(
            tokens[row["step"]],
            row["timing_s/step"] - row["timing_s/gen"] - row["timing_s/update_weights"],
            row.get("timing_s/update_actor", 0.0),
        )
        for row in steps
        if row["step"] in tokens
    ]


def learner_time(steps: Sequence[LearnerStep]) -> tuple[float, float]:
    """(seconds a step, seconds a token); neither is below 0.

    Least squares, where the steps' sizes differ enough to tell the two apart. Else the optimizer
    steps are taken to be proportional to the tokens, and the rest to be fixed.
    """
    x = np.array([step.tokens for step in steps], np.float64)
    y = np.array([step.seconds for step in steps])
    if np.quantile(x, 0.9) >= SPREAD * np.quantile(x, 0.1):
        weights, _ = nonnegative_least_squares(np.stack([np.ones_like(x), x], axis=1), y)
        return float(weights[0]), float(weights[1])
    updates = float(np.mean([step.updating for step in steps]))
    return max(0.0, float(y.mean()) - updates), updates / float(x.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """An engine's speed, estimated from recorded answers."""

    table: DecodeTable
    offset: float
    """Seconds that an answer takes longer than its tokens do; below 0 where its first tokens are
    for free."""
    summary: str


def decoding(table: pa.Table, *, workers: int, slots: int) -> Decoding:
    """An answer of L tokens takes (a + b n + c n context) L + offset seconds, n answers in its
    worker's batch.

    Which worker decoded an answer is not recorded: n is what ran meanwhile, over all workers,
    divided by their number.
    """
    lengths = np.asarray(table["response_length"]).astype(np.float64)
    begin, seconds = np.asarray(table["started"]), np.asarray(table["decode_s"])
    sound = (lengths > 0) & (seconds > 0)
    lengths, begin, seconds = lengths[sound], begin[sound], seconds[sound]
    context = np.asarray(table["prompt_length"])[sound] + lengths / 2
    n = np.maximum(1.0, mean_running(begin, begin + seconds) / workers)
    one = np.ones_like(n)
    features = np.stack([lengths, n * lengths, n * context * lengths, one, -one], axis=1)
    (a, b, c, longer, shorter), _ = nonnegative_least_squares(features, seconds)
    running, contexts = (
        np.array([1.0, float(max(2, slots))]),
        np.array([0.0, 2 * float(context.max())]),
    )
    grid = a + b * running[:, None] + c * running[:, None] * contexts[None, :]
    typical = float(a + b * n.mean() + c * (n * context).mean())
    return Decoding(
        table=DecodeTable(running=running, context=contexts, seconds=np.maximum(grid, 1e-9)),
        offset=float(longer - shorter),
        summary=(
            f"{1 / max(typical, 1e-9):.3g} tokens/s an answer at {n.mean():.3g} answers a worker"
        ),
    )


def mean_running(begin: Floats, end: Floats) -> Floats:
    """[N] how many of these intervals ran, on average, during each of them."""
    times = np.concatenate([begin, end])
    change = np.concatenate([np.ones_like(begin), -np.ones_like(end)])
    order = np.argsort(times, kind="stable")
    times, running = times[order], np.cumsum(change[order])
    area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
    means: Floats = (np.interp(end, times, area) - np.interp(begin, times, area)) / np.maximum(
        end - begin, 1e-9
    )
    return means


def delivery_latency(steps: Sequence[Mapping[str, Any]], table: pa.Table) -> float:
    """Of a synchronous run: what a step waited beyond its longest decoding, for dealing, delivery
    and marking."""
    waited = {row["step"]: row["timing_s/gen"] for row in steps}
    number, begin = np.asarray(table["step"]), np.asarray(table["started"])
    end = begin + np.asarray(table["decode_s"])
    spare = [
        waited[step] - (end[number == step].max() - begin[number == step].min())
        for step in np.unique(number)
        if step in waited
    ]
    return max(0.0, float(np.median(spare)))


def recorded_lengths(table: pa.Table, longest: int | None = None) -> TraceLengths:
    """The groups of a recording, their answers cut at `longest`; a table without groups becomes
    groups of one."""
    lengths = np.asarray(table["response_length"]).astype(np.float64)
    if longest is not None:
        lengths = np.minimum(lengths, longest)
    names = set(table.column_names)
    prompts = (
        np.asarray(table["prompt_length"])
        if "prompt_length" in names
        else np.zeros(len(lengths), np.int64)
    )
    if {"step", "prompt_id"} <= names:
        keys = list(zip(table["step"].to_pylist(), table["prompt_id"].to_pylist(), strict=True))
    else:
        keys = [(i, "") for i in range(len(lengths))]
    rows: dict[tuple[int, str], list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    return TraceLengths(
        prompts=tuple(int(prompts[own[0]]) for own in rows.values()),
        recorded=tuple(lengths[own] for own in rows.values()),
    )


def trace_lengths(source: Path) -> TraceLengths:
    """The lengths in the folder or file of `--trace`."""
    table = read_lengths(source)
    if "response_length" not in table.column_names or not table.num_rows:
        raise ValueError(
            f"{source} has no rows with a response_length; its columns are"
            f" {', '.join(table.column_names)}"
        )
    return recorded_lengths(table)


def nonnegative_least_squares(features: Floats, y: Floats) -> tuple[Floats, int]:
    """The weights >= 0 with the least squared error and how many are above 0: every subset of the
    few features is tried."""
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
    return best, int((best > 0).sum())
