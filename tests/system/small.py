"""Small runs of the whole system: a 30k-parameter model on two-term sums, on Ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberl.rl.cli import app
from typer.testing import CliRunner

SMALL = """\
name: small
stages: [sft, rl]
model: {tiny: {hidden: 64, layers: 2, heads: 2, kv_heads: 1, head_dim: 32, intermediate: 128}, dtype: float32}
data:
  {source: arithmetic, kinds: {chain: 1}, terms: [2, 2], largest_total: 20, steps: short, heldout: 16, max_prompt_length: 16}
sft: {steps: 60, batch_size: 64, lr: 5.0e-3, warmup_steps: 5}
rollout: {group_size: 4, max_response_length: 12, max_num_seqs: 64}
schedule: {steps: 4, prompts_per_step: 16}
filter: {zero_variance: false}
optim: {lr: 1.0e-3, micro_batch_tokens: 1024}
eval: {every: 2, size: 16}
checkpoint: {every: 2, keep: 4}
tracking: {wandb: disabled}
cluster: {device: cpu, learners: 1, rollouts: 1, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}
"""


@dataclass(frozen=True)
class Emberl:
    """Runs the command on the small configuration: in this process on the Ray cluster that `share`
    starts, or `fresh`, as a person does, in a process with a cluster of its own."""

    folder: Path
    share: Callable[[], None]

    @property
    def config(self) -> Path:
        path = self.folder / "small.yaml"
        if not path.exists():
            path.write_text(SMALL)
        return path

    def start(
        self, *arguments: str, config: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        command = [
            str(Path(sys.executable).with_name("emberl")),
            "train",
            str(config or self.config),
            *arguments,
        ]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def train(
        self,
        *arguments: str,
        status: int = 0,
        config: Path | None = None,
        fresh: bool = False,
        **environment: str,
    ) -> dict[str, Any]:
        """The JSON line with which the run ends; what it told a person is in `stderr.txt`."""
        if fresh:
            process = self.start(*arguments, config=config, **environment)
            try:
                out, err = process.communicate(timeout=300)
            finally:
                process.kill()
            code = process.returncode
        else:
            self.share()
            # absolute, as the actors are not started in this folder
            arguments = ("run_dir=run", *arguments)
            arguments = tuple(a.replace("run_dir=", f"run_dir={self.folder}/") for a in arguments)
            with contextlib.chdir(self.folder):
                ran = CliRunner().invoke(app, ["train", str(config or self.config), *arguments])
            out, err, code = ran.stdout, ran.stderr, ran.exit_code
        (self.folder / "stderr.txt").write_text(err)
        assert code == status, f"exit status {code}\n{out[-2000:]}\n{err[-4000:]}"
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return result


def read_metrics(run_dir: Path, axis: str = "train", stage: str = "rl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["axis"] == axis and row["stage"] == stage]


def timeless(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    clock = (
        "timing_s/",
        "sched/rollout_idle",
        "sched/learner_idle",
        "perf/throughput",
        "perf/time_per_step",
        "perf/sampled_tokens_per_second",
        "perf/actor/",
        # how weights travel is decided by the clock, and another attempt begins with whole ones
        "sync/",
        "reward/answer/seconds",
        "reward/answer/batch_seconds",
    )
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]
