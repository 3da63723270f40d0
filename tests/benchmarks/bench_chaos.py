"""kill -9 of random processes at random moments of small runs: each must end with its steps done,
each once, and with the weights of an undisturbed run, bit for bit; or, where its driver went down
with what was killed, do so when it is started again with `--resume auto`.

    python tests/benchmarks/bench_chaos.py --kills 100 --json chaos.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

import psutil
from harness import Report

STEPS = 24
KINDS = {
    "rollout worker": "ray::RolloutWorker",
    "learner rank": "ray::LearnerRank",
    "grader": "emberl.rewards",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
    "wandb": "wandb-core",
    "driver": "emberl train",
}
"""Kind -> what stands in the command line of its processes."""
MARK = "EMBERL_CHAOS"
GOES = 120.0
"""Seconds after the end of a run until nothing of it is to be left: Ray's agents look every few
seconds whether their raylet is there, and on a busy machine later."""
REWARD = """\
def score(prompt, completion, answer, **columns):
    return float(completion.split("</think>")[-1].strip() == str(answer))
"""
CONFIG = f"""\
name: chaos
stages: [sft, rl]
model: {{tiny: {{hidden: 64, layers: 2, heads: 2, kv_heads: 1, head_dim: 32, intermediate: 128}}, dtype: float32}}
data: {{source: arithmetic, kinds: {{chain: 1}}, terms: [2, 2], largest_total: 20, steps: short,
  heldout: 16, max_prompt_length: 16}}
sft: {{steps: 20, batch_size: 64, lr: 5.0e-3, warmup_steps: 5}}
rollout: {{group_size: 4, max_response_length: 12, max_num_seqs: 64, token_rate: 40, max_restarts: 20, timeout: 120}}
schedule: {{steps: {STEPS}, prompts_per_step: 16}}
filter: {{zero_variance: false}}
reward: {{parts: {{answer: {{use: ./marks.py:score}}}}}}
optim: {{lr: 1.0e-3, micro_batch_tokens: 1024}}
sync: {{mode: dense, timeout: 120}}
eval: {{every: 0, size: 16}}
checkpoint: {{every: 4, keep: 2}}
tracking: {{wandb: offline}}
cluster: {{device: cpu, learners: 2, rollouts: 2, cpus_per_learner: 0.25, cpus_per_rollout: 0.25,
  start_timeout: 900, step_timeout: 300, max_restarts: 20}}
"""


def ours(mark: str) -> dict[int, str]:
    """Process id -> command line of everything that a run started, orphans too."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found[process.pid] = " ".join(process.cmdline())
        except psutil.Error:  # it ended, or is another user's
            continue
    return found


def rows_of(folder: Path) -> list[int]:
    file = folder / "run/metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if row["stage"] == "rl" and row["axis"] == "train"]


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "run/model/model.safetensors").read_bytes()).hexdigest()


class Trial:
    """One run in a directory of its own, and what was done to it."""

    def __init__(self, folder: Path, deadline: float) -> None:
        """deadline: seconds for one start of the run, after which it is said to hang."""
        self.folder, self.mark, self.deadline = folder, uuid.uuid4().hex, deadline
        folder.mkdir(parents=True)
        (folder / "marks.py").write_text(REWARD)
        (folder / "chaos.yaml").write_text(CONFIG)
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        command = [str(Path(sys.executable).with_name("emberl")), "train", "chaos.yaml"]
        with (self.folder / f"log{self.starts}").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "run_dir=run", "--resume", "auto"],
                cwd=self.folder,
                env=os.environ | {MARK: self.mark, "WANDB_SILENT": "true"},
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.began = time.monotonic()

    def kill(self, kind: str, chosen: random.Random) -> bool:
        """Whether there was such a process."""
        found = sorted(pid for pid, line in ours(self.mark).items() if KINDS[kind] in line)
        if not found:
            return False
        os.kill(chosen.choice(found), signal.SIGKILL)
        return True

    def ended(self) -> str | None:
        """What is wrong with a run that has ended, or hangs; "" for a good end; None: it runs, or
        is started again."""
        status = self.process.poll()
        if status is None:
            return "hang" if time.monotonic() - self.began > self.deadline else None
        # among what helpers that were killed leave on stderr
        told = (self.folder / f"log{self.starts}").read_text(errors="replace").splitlines()
        last = [line for line in told if line.startswith('{"status"')][-1:]
        if status:
            if self.starts > 20:
                return f"did not come up again: {last}"
            self.start()
            return None
        if not last:
            return "ended well without a result"
        result = json.loads(last[0])
        if (result["status"], result["steps"]) != ("ok", STEPS):
            return f"ended with {result['status']} after {result['steps']} steps"
        if rows_of(self.folder) != list(range(1, STEPS + 1)):
            return f"logged steps {rows_of(self.folder)}"
        return ""

    def clean(self) -> int:
        """Ends what is left of it; how many processes were still there after `GOES` seconds."""
        deadline = time.monotonic() + GOES
        while (left := ours(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(left)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="kills of a run")
    parser.add_argument("--start", type=float, default=60.0, help="seconds that a start takes")
    parser.add_argument("--deadline", type=float, default=900.0, help="of one start of a run")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new run after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    kills = len(kinds) if options.quick else options.kills
    chosen, began = random.Random(options.seed), time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="chaos-"))

    quiet = Trial(base / "undisturbed", options.deadline)
    while (found := quiet.ended()) is None:
        time.sleep(0.5)
    assert not found, f"the undisturbed run: {found}, {base}"
    quiet.clean()
    wanted = weights_of(quiet.folder)

    done: Counter[str] = Counter()
    again: Counter[str] = Counter()
    wrong: list[str] = []
    runs = 0
    while sum(done.values()) < kills and time.monotonic() - began < options.seconds:
        runs += 1
        trial, mine = Trial(base / f"run{runs}", options.deadline), []
        left = min(options.each, kills - sum(done.values()))
        # a fifth of them before the first step, at whatever the start is at
        plan = sorted(
            0 if chosen.random() < 0.2 else chosen.randint(1, STEPS - 1) for _ in range(left)
        )
        following, starts = time.monotonic() + chosen.uniform(0, options.start), 1
        while (found := trial.ended()) is None:
            time.sleep(0.05)
            if trial.starts != starts:
                following, starts = (
                    time.monotonic() + chosen.uniform(0, options.start),
                    trial.starts,
                )
            reached = len(rows_of(trial.folder))
            early = plan and plan[0] == 0 and time.monotonic() > following
            if early or (plan and 0 < plan[0] <= reached):
                time.sleep(chosen.uniform(0, 1.5))
                kind = kinds[sum(done.values()) % len(kinds)]
                if trial.kill(kind, chosen):
                    plan.pop(0)
                    done[kind] += 1
                    mine.append(f"{kind} at step {len(rows_of(trial.folder))}")
                    deadline = time.monotonic() + 8
                    while trial.process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.1)
                    again[kind] += trial.process.poll() is not None
                    following = time.monotonic() + chosen.uniform(0, options.start)
        left = trial.clean()
        if not found and weights_of(trial.folder) != wanted:
            found = "other weights"
        if left:
            found += f" {left} processes left"
        if found:
            wrong.append(f"{trial.folder}: {found} after {mine}")
        print(f"run {runs}: {mine}, {trial.starts} starts: {found or 'right'}", flush=True)
    print(f"| killed | times | driver started again |\n|{'---|' * 3}")
    for kind in kinds:
        print(f"| {kind} | {done[kind]} | {again[kind]} |")
    print(f"{sum(done.values())} kills in {runs} runs of {STEPS} steps; wrong: {wrong or 'none'}")
    report = Report("chaos", options.json)
    for kind in kinds:
        report.record("kills", kind, done[kind], "kills", started_again=again[kind])
    report.record("kills", "wrong runs", len(wrong), "runs", floor=0)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
