"""Two teachers by source over a mixture in the order of a curriculum, end to end: what is sampled,
who teaches it, and that a resumed run goes on with the same problems."""

from __future__ import annotations

import json
import shutil

import pytest
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from small_system import Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow

MIXED = """\
name: small
stages: [rl]
algorithm: opd
model: {tiny: {hidden: 32, layers: 1, heads: 2, kv_heads: 1, head_dim: 16, intermediate: 64}, dtype: float32}
data:
  mixture:
    short: {source: arithmetic, terms: [2, 2], weight: 0.75}
    rows: {source: rows.jsonl, weight: 0.25}
  curriculum: {drop: true, revisit: 2, pick: thompson}
  heldout: 4
  max_prompt_length: 16
distill:
  loss: jsd
  teachers:
    sums: {path: large, sources: [short]}
    others: {path: other, sources: [rows]}
rollout: {group_size: 2, max_response_length: 8, max_num_seqs: 32}
schedule: {steps: 4, prompts_per_step: 8}
optim: {lr: 1.0e-2, micro_batch_tokens: 256}
eval: {every: 2, size: 4}
checkpoint: {every: 2, keep: 4}
tracking: {wandb: disabled}
cluster: {device: cpu, learners: 1, rollouts: 1, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}
"""


def test_two_teachers_over_a_mixture_and_the_same_problems_after_a_resume(emberl: Emberl) -> None:
    folder = emberl.folder
    for name, seed in (("large", 1), ("other", 2)):
        make_tiny(folder / name, TinyConfig(hidden=48, layers=1, head_dim=16), seed)
    rows = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {name: folder / name for name in ("large", "other", "rows.jsonl")}
    text = MIXED
    for name, path in paths.items():
        text = text.replace(f": {name},", f": {path},")
    emberl.config.write_text(text)
    emberl.train("run_dir=whole")
    whole, part = folder / "whole", folder / "part"
    found = read_metrics(whole)
    for row in found:
        assert (row["sched/source/short"], row["sched/source/rows"]) == (6, 2)
        assert row["distill/tokens/sums"] > row["distill/tokens/others"] > 0
        assert row["distill/untaught_tokens"] == 0
        assert row["sched/picked/new"] == 6
        assert row["sched/picked/thompson"] + row["sched/picked/revisit"] == 2
    assert found[-1]["actor/distill_loss"] < found[0]["actor/distill_loss"]
    assert found[-1]["sched/dropped/never_solved"] > 0

    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("rl-000004", "model"))
    emberl.train("run_dir=part", "--resume")
    assert timeless(read_metrics(part)) == timeless(found)
    other = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, part)]
    assert other[0] == other[1]
