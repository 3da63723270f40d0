"""Rejection sampling as a stage: answers that the verifier accepts become rows to learn from."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..rewards.suite import check_errors
from ..rewards.verdict import Status
from .checkpoints import CHECKPOINTS, begin_checkpoint, finish_checkpoint
from .config.load import ConfigError
from .groups import Group
from .run import Interrupted, Run
from .run_directory import METRICS, asked_to_stop, read_metrics

SAMPLES = "samples.jsonl"
PARTS = "samples"
"""Folder with the rows of each step, so that a stage that was killed can resume."""
CUT = "cut"
"""Outcome of an answer that reached the length limit, besides the verdicts' statuses."""


async def sample_accepted(run: Run) -> None:
    """Samples answers to `reject.problems` problems and writes those that are accepted to
    `samples.jsonl`. Raises `ConfigError` if none is accepted."""
    config, at_a_time = run.config.reject, run.config.schedule.prompts_per_step
    problems = config.problems or run.source.size
    assert problems, "a source without end, but reject.problems is not set"
    left = max(0, problems - run.progress.position)
    steps = run.progress.step + math.ceil(left / at_a_time)
    run.tracker.begin("reject", run.progress.step, steps)
    (run.run_dir / PARTS).mkdir(exist_ok=True)
    while run.progress.step < steps:
        if run.stop.is_set() or asked_to_stop(
            run.run_dir
        ):  # what there is was saved after each step
            raise Interrupted
        step, first = run.progress.step + 1, run.progress.position
        prompts = [run.source.train(i) for i in range(first, min(first + at_a_time, problems))]
        groups = await run.sample_groups(prompts, config.samples, run.sampling(step))
        check_errors([v for g in groups for v in g.verdicts], run.config.reward.max_error_fraction)
        rows = [row for group in groups for row in accepted(run, group)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (run.run_dir / PARTS / f"{step:06}.jsonl").write_text("".join(lines), encoding="utf-8")
        figures = figures_of(groups, len(rows))
        run.tracker.log(
            step,
            {**figures, **run.suite.metrics()},
            show={"accepted": f"{figures['reject/accuracy']:.1%}", "rows": str(len(rows))},
        )
        run.progress = run.progress.advance(
            step=step,
            position=first + len(prompts),
            tokens=run.progress.tokens + int(figures["reject/tokens"]),
            seconds=time.time() - run.started,
        )
        folder = begin_checkpoint(run.run_dir, f"reject-{step:06}")
        finish_checkpoint(folder, run.progress, run.config.checkpoint.keep, run.config)
    try:
        gather_samples(run.run_dir, steps)
    # with its checkpoints a restart, perhaps with other settings, would sample nothing anew
    except ConfigError:
        shutil.rmtree(run.run_dir / CHECKPOINTS, ignore_errors=True)
        raise


def accepted(run: Run, group: Group) -> list[Mapping[str, Any]]:
    """The first `reject.keep` different correct answers, each as a row with the whole
    conversation."""
    by_text: dict[str, Mapping[str, Any]] = {}
    for completion, status in zip(group.completions, outcomes(group), strict=True):
        text = run.answers.text(group.prompt, completion)
        if status != Status.CORRECT or text in by_text or len(by_text) == run.config.reject.keep:
            continue
        episode = completion.episode
        said = [{"role": "assistant", "content": text}] if episode is None else episode.messages
        by_text[text] = {
            "id": group.prompt.id,
            "source": group.prompt.source,
            "messages": [*group.prompt.messages, *said],
            "reference": group.prompt.answer,
            "tokens": completion.num_sampled,
        }
    return list(by_text.values())


def outcomes(group: Group) -> list[str]:
    """The verdict's status of each answer, or `CUT`."""
    return [
        CUT if completion.finish_reason == "length" else verdict.status.value
        for completion, verdict in zip(group.completions, group.verdicts, strict=True)
    ]


def figures_of(groups: Sequence[Group], rows: int) -> dict[str, float]:
    """The metrics of a step: answers by outcome, rows kept, tokens."""
    counts = Counter(outcome for group in groups for outcome in outcomes(group))
    answers = sum(counts.values())
    tokens = sum(c.num_sampled for group in groups for c in group.completions)
    return {
        "reject/accuracy": counts[Status.CORRECT] / answers,
        "reject/answers": float(answers),
        "reject/rows": float(rows),
        "reject/tokens": float(tokens),
        "response_length/mean": tokens / answers,
        **{f"reject/{outcome}": float(count) for outcome, count in counts.items()},
    }


def totals(run_dir: Path) -> Counter[str]:
    """Counts over all steps, by the names of the metrics without `reject/`."""
    counts: Counter[str] = Counter()
    for row in read_metrics(run_dir / METRICS):
        for name, value in row.items() if row["stage"] == "reject" else ():
            if name.startswith("reject/") and name != "reject/accuracy":
                counts[name.removeprefix("reject/")] += int(value)
    return counts


def gather_samples(run_dir: Path, steps: int) -> None:
    """Joins the rows of all steps in one file. Raises `ConfigError` if there are none."""
    parts = [(run_dir / PARTS / f"{step:06}.jsonl") for step in range(1, steps + 1)]
    text = "".join(part.read_text(encoding="utf-8") for part in parts)
    if not text:
        counts = totals(run_dir)
        shown = ", ".join(
            f"{counts[name]:,} {name.replace('_', ' ')}"
            for name in (*(status.value for status in Status), CUT)
            if counts[name]
        )
        raise ConfigError(
            f"rejection sampling accepted none of {counts['answers']:,} answers: {shown}; take a"
            " better model or easier problems, or raise reject.samples (or, of cut answers,"
            " rollout.max_response_length)"
        )
    whole = run_dir / SAMPLES
    whole.with_suffix(".part").write_text(text, encoding="utf-8")
    whole.with_suffix(".part").replace(whole)
