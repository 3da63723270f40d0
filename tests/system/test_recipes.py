"""A whole recipe: every kind of stage, killed within one and run again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from small_system import SMALL, Emberl

pytestmark = pytest.mark.slow
STAGES = """\
stages:
  - {name: cold, kind: sft, sft: {heldout: 8, eval_every: 30}}
  - {name: think, kind: rl, schedule: {steps: 20}, eval: {every: 0}, checkpoint: {every: 4}}
  - {name: samples, kind: reject, reject: {problems: 32, samples: 4, keep: 4}}
  - {name: small, kind: distill, model: {tiny: {hidden: 32}}, sft: {data: stage:samples, epochs: 2, batch_size: 4}}
"""


def logged(stage: Path, name: str) -> list[tuple[int, Any]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


def test_a_recipe_that_was_killed_goes_on_where_it_stood(emberl: Emberl) -> None:
    emberl.config.write_text(SMALL.replace("stages: [sft, rl]\n", STAGES))
    folder = emberl.folder / "run"
    process = emberl.start(f"run_dir={folder}")
    deadline = time.monotonic() + 200
    while not list(folder.glob("think/checkpoints/rl-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (folder / "cold" / "done.json").is_file()
    assert not (folder / "think" / "done.json").exists()
    cold = (folder / "cold" / "metrics.jsonl").read_text()

    result = emberl.train()
    assert (folder / "cold" / "metrics.jsonl").read_text() == cold
    said = (emberl.folder / "stderr.txt").read_text()
    assert "stage cold (sft) is done" in said and "stage think (rl)\n" in said
    assert [step for step, _ in logged(folder / "think", "critic/score/mean")] == [*range(1, 21)]
    held_out = logged(folder / "cold", "sft/heldout_loss")
    assert [step for step, _ in held_out] == [0, 30, 60]
    assert held_out[0][1] > held_out[1][1] > held_out[2][1]

    assert [(row["stage"], row["kind"]) for row in result["stages"]] == [
        ("cold", "sft"), ("think", "rl"), ("samples", "reject"), ("small", "distill"),
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "samples/samples.jsonl").open()]
    first = result["stages"][2]["note"]
    assert "of 128 answers accepted" in first and first.endswith(f"{len(rows)} kept")
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert eval(question.removesuffix("=?")) == int(row["reference"])
        assert answer.endswith(row["reference"])
    width = json.loads((folder / "small/model/config.json").read_text())["hidden_size"]
    assert width == 32 and "| small" in (folder / "summary.md").read_text()

    refused = emberl.train("seed=1", status=2)
    assert "stage cold is done, with other settings or inputs: seed: 0, now 1" in refused["error"]
