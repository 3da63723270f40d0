"""Calibration: from a recording made by hand come the numbers that it was made with, and a plan for
other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from emberl.rl.plan.calibrate import (
    calibrate,
    decoding,
    learner_time,
    mean_running,
    nonnegative_least_squares,
    read_recording,
    trace_lengths,
)
from emberl.rl.plan.command import plan
from emberl.rl.watch.lengths import LENGTHS, SCHEMA
from pyarrow import parquet

CONFIG = """\
name: recorded
model: {path: nowhere}
data: {source: arithmetic}
rollout: {group_size: 2, max_num_seqs: 8, max_response_length: 200}
schedule: {prompts_per_step: 2}
cluster: {rollouts: 1}
"""
A, B = 0.02, 0.01
"""Seconds of a decode step, and for each further answer in it."""


def recording(folder: Path, steps: int = 12, answers: int = 4, updating: float = 0.88) -> Path:
    """4 answers of 100 tokens at once on one worker: 100 x (0.02 + 0.04) = 6 s. Then 0.5 s until
    the learner has them, a step of 1 s and 2 ms for each of 440 tokens, and 0.25 s of
    publishing."""
    folder.mkdir(exist_ok=True)
    learning = 1 + 0.002 * 110 * answers
    (folder / "config.yaml").write_text(CONFIG)
    rows: list[dict[str, Any]] = []
    metrics = []
    for step in range(1, steps + 1):
        rows += [
            {
                "step": step,
                "version": step - 1,
                "prompt_id": f"p{step}-{i // 2}",
                "sample": i % 2,
                "prompt_length": 10,
                "response_length": 100,
                "started": 10.0 * step,
                "decode_s": 6.0,
                "grade_s": 0.125,
                "versions": [step - 1],
                "version_tokens": [100],
            }
            for i in range(answers)
        ]
        metrics.append(
            {
                "stage": "rl",
                "axis": "train",
                "step": step,
                "timing_s/gen": 6.5,
                "timing_s/update_actor": updating,
                "timing_s/update_weights": 0.25,
                "sync/apply_s": 0.0625,
                "timing_s/step": 6.5 + learning + 0.25,
            }
        )
    (folder / LENGTHS).mkdir()
    parquet.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA), folder / LENGTHS / "step-000001.parquet"
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def test_a_run_is_predicted_at_its_own_setting(tmp_path: Path) -> None:
    found = plan((), options={}, from_run=recording(tmp_path), trace=None)
    assert found.figures["step_s"] == pytest.approx(6 + 0.5 + 1.88 + 0.25)
    assert found.scenario.learner_fixed == pytest.approx(1.0)
    assert found.scenario.learner_per_token == pytest.approx(0.002)
    assert found.scenario.reward.seconds == pytest.approx(0.5)
    assert (found.scenario.publication.encode, found.scenario.publication.commit) == (
        0.1875,
        0.0625,
    )


def test_other_settings_are_predicted_from_it(tmp_path: Path) -> None:
    run = recording(tmp_path)
    twice = plan(
        ["schedule.prompts_per_step=4", "cluster.rollouts=2"], options={}, from_run=run, trace=None
    )
    assert twice.figures["step_s"] == pytest.approx(6 + 0.5 + 1 + 2 * 0.88 + 0.25), (
        "each engine has its 4 answers again"
    )
    half = plan(["rollout.max_response_length=50"], options={}, from_run=run, trace=None)
    assert half.figures["step_s"] == pytest.approx(3 + 0.5 + 1 + 0.002 * 240 + 0.25)
    ahead = plan(["schedule.max_staleness=2"], options={}, from_run=run, trace=None)
    assert ahead.figures["step_s"] == pytest.approx(3 + 0.0625), (
        "8 slots decode two steps' answers, but for the commit"
    )
    assert ahead.figures["staleness_max"] <= 2


def test_what_a_plan_needs_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml"):
        calibrate(tmp_path)
    recording(tmp_path, steps=2)
    with pytest.raises(ValueError, match="too few RL steps"):
        calibrate(tmp_path)
    with pytest.raises(ValueError, match="leave out devices"):
        plan((), options={"devices": 8}, from_run=tmp_path, trace=None)


def test_speed_by_batch_and_what_an_answer_is_spared_are_told_apart() -> None:
    """One to four answers at once, (0.02 + 0.01 n) s a token, less 0.1 s."""
    rows = []
    for n in (1, 2, 3, 4):
        for length in (20, 50, 100, 150):
            start = 1e5 * n + 100.0 * length
            seconds = length * (A + B * n) - 0.1
            rows += [
                {
                    "prompt_length": 0,
                    "response_length": length,
                    "started": start,
                    "decode_s": seconds,
                }
            ] * n
    table, offset, _ = decoding(pa.Table.from_pylist(rows), workers=1, slots=8)
    steps = table.rows(8)
    assert [steps[n][0] for n in (1, 2, 4, 8)] == pytest.approx(
        [A + B, A + 2 * B, A + 4 * B, A + 8 * B]
    )
    assert offset == pytest.approx(-0.1)


def test_how_many_ran_meanwhile() -> None:
    """[0, 10] runs alone for 5 s and with another for 5 s."""
    assert mean_running(np.array([0.0, 5.0]), np.array([10.0, 20.0])) == pytest.approx([1.5, 4 / 3])


def test_the_learners_time_is_split_by_a_line_where_steps_differ_and_by_kind_where_not() -> None:
    def row(tokens: int) -> dict[str, float]:
        busy = 1.5 + 0.01 * tokens
        return {
            "prompt_length_sum": 10,
            "response_length_sum": tokens - 10,
            "timing_s/step": 3 + busy,
            "timing_s/gen": 2,
            "timing_s/update_weights": 1,
            "timing_s/update_actor": busy - 0.5,
        }

    assert learner_time([row(n) for n in (100, 200, 400)]) == pytest.approx((1.5, 0.01))
    assert learner_time([row(200), row(200)]) == pytest.approx((0.5, 3.0 / 200))


def test_a_steps_answers_are_summed_and_what_was_done_twice_counts_once(tmp_path: Path) -> None:
    run = recording(tmp_path)
    metrics = run / "metrics.jsonl"
    again = json.loads(metrics.read_text().splitlines()[4]) | {"timing_s/gen": 7.5}
    metrics.write_text(metrics.read_text() + json.dumps(again) + "\n")
    steps, answers = read_recording(run)
    assert [step["step"] for step in steps] == list(range(3, 13)) and answers.num_rows == 40
    assert [step["timing_s/gen"] for step in steps[:4]] == [6.5, 6.5, 7.5, 6.5]
    tokens = {step["prompt_length_sum"] + step["response_length_sum"] for step in steps}
    assert tokens == {440}
    assert (steps[0]["started_min"], steps[0]["ended_max"]) == (30.0, 36.0)


def test_a_run_with_another_batch_tells_the_fixed_time(tmp_path: Path) -> None:
    """The steps of one run are all alike: alone it takes 0.75 s of the fixed second for the
    tokens'."""
    run = recording(tmp_path / "small", updating=1.63)
    larger = recording(tmp_path / "large", answers=8, updating=2.51)
    alone, _ = calibrate(run)
    assert (alone.learner_fixed, alone.learner_per_token) == pytest.approx((0.25, 1.63 / 440))
    both, sources = calibrate(run, also=[larger])
    assert (both.learner_fixed, both.learner_per_token) == pytest.approx((1.0, 0.002))
    assert "of 20 steps" in sources["learner"]
    with pytest.raises(ValueError, match="short has too few RL steps"):
        calibrate(run, also=[larger, recording(tmp_path / "short", steps=2)])


def test_weights_are_never_negative() -> None:
    x = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    weights = nonnegative_least_squares(x, np.array([3.0, 2.0, 1.0]))
    assert weights == pytest.approx([2.0, 0.0]) and weights[1] == 0, (
        "the slope would be -1: without it the mean is best"
    )


def test_any_table_of_lengths_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "lengths.parquet"
    parquet.write_table(pa.table({"response_length": [10, 30]}), path)
    [(_, first), (_, second)] = trace_lengths(path).groups
    assert (first, second) == (10, 30)
    parquet.write_table(pa.table({"length": [10, 30]}), path)
    with pytest.raises(ValueError, match="no rows with a response_length; its columns are length"):
        trace_lengths(path)
