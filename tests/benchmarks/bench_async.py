"""Rollouts and learners in parallel: trained tokens a second at max_staleness 0 and k, at equal
devices.

    python tests/benchmarks/bench_async.py [--quick] [--json FILE] [--steps N] [--staleness 0 2]

Real actors: one learner rank and two rollout workers on Ray. Answers have prescribed long-tailed
lengths (lognormal, CV 1, see scripted_engine.py), and each running answer is held to a fixed token
rate, as on a device of its own, so that the machine's cores do not decide. The learner computes for
real. The first `k + 2` steps, in which the pipeline fills, are left out of the figures of every
run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, arguments

CONFIG = """\
name: long-tail
stages: [rl]
model: {tiny: {hidden: 256, layers: 6, heads: 4, kv_heads: 2, head_dim: 64, intermediate: 768}, dtype: float32}
data: {source: arithmetic, kinds: {chain: 1}, terms: [2, 4], heldout: 16, max_prompt_length: 32}
rollout:
  engine: scripted_engine:make
  engine_args: {mean: 48, cv: 1.0}
  token_rate: 25
  group_size: 8
  max_response_length: 400
  max_num_seqs: 400
schedule: {steps: 8, prompts_per_step: 20}
filter: {zero_variance: false}
reward: {parts: {answer: {use: "scripted_reward:coin"}}}
eval: {size: 0}
checkpoint: {every: 0}
tracking: {wandb: disabled}
optim: {lr: 1.0e-6, micro_batch_tokens: 4096}
cluster: {device: cpu, learners: 1, rollouts: 2, cpus_per_learner: 1, cpus_per_rollout: 0.5}
"""
REWARD = """\
import zlib

def coin(prompt, completion, answer, **columns):
    return float(zlib.crc32(completion.encode()) & 1)
"""


def run(folder: Path, staleness: int, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of the steps after the pipeline has filled."""
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "scripted_reward.py").write_text(REWARD)
    out = folder / f"k{staleness}{'-'.join(overrides).replace('/', '_')}"
    paths = [str(folder), str(Path(__file__).parent)]
    command = [str(Path(sys.executable).with_name("emberl")), "train", str(folder / "config.yaml")]
    command += [
        f"schedule.max_staleness={staleness}",
        f"schedule.steps={steps + staleness + 2}",
        f"run_dir={out}",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [*command, *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["axis"] == "train" and row["step"] > staleness + 2]


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    seconds = sum(row["timing_s/step"] for row in rows)
    tokens = sum(row["perf/sampled_tokens_per_second"] * row["timing_s/step"] for row in rows)

    def mean(name: str) -> float:
        return float(
            np.average([row[name] for row in rows], weights=[row["timing_s/step"] for row in rows])
        )

    return {
        "tokens_per_s": tokens / seconds,
        "step_s": seconds / len(rows),
        "learner_idle": mean("sched/learner_idle"),
        "rollout_idle": mean("sched/rollout_idle"),
        "staleness": mean("sched/staleness/mean"),
        "staleness_max": max(row["sched/staleness/max"] for row in rows),
        "evicted": sum(row["sched/groups_evicted"] for row in rows),
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2])
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    options = parser.parse_args()
    report = Report("async", options.json, "ray")
    with tempfile.TemporaryDirectory() as folder:
        base = None
        for staleness in options.staleness:
            steps = 2 if options.quick else options.steps
            found = figures(run(Path(folder), staleness, steps, *options.overrides))
            rate = found.pop("tokens_per_s")
            base = base or rate
            report.record(
                "lognormal CV 1",
                f"max_staleness {staleness}",
                rate,
                "tokens/s",
                ratio=rate / base,
                **found,
            )


if __name__ == "__main__":
    main()
