"""The same small run on one machine and over two: network namespaces with addresses and disks of
their own on this one's cores, so that the network and a second raylet are all that differs.

Two learner ranks, two rollout workers; over two machines one of each sits on either, which is
looked up at Ray. Steps alternate strictly between decoding and learning, so nothing hides what
travels: prompts and answers, the ranks' gradients, and every version's weights, whole or as
patches (in one round). Both layouts sample the same tokens. Steps are the medians of a run, without the first
ones; ratio: two machines / one, of the runs of one round.

    python tests/benchmarks/bench_nodes.py [--quick] [--rounds 2] [--steps 40] [--json FILE]

Needs root, as network namespaces do.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import Report, arguments, median

CONFIG = """\
name: nodes-bench
stages: [rl]
model: {tiny: {hidden: 128, layers: 4, heads: 2, kv_heads: 1, head_dim: 64, intermediate: 512}, dtype: float32}
data: {source: arithmetic, heldout: 64, max_prompt_length: 48}
rollout: {group_size: 4, max_response_length: 48, max_num_seqs: 16}
reward: {parts: {parity: {use: "./parity.py:parity", isolation: inline, style: trl}}}
filter: {zero_variance: false}
schedule: {prompts_per_step: 8}
optim: {lr: 1.0e-4}
eval: {size: 0, every: 0}
checkpoint: {every: 0}
tracking: {wandb: disabled}
cluster: {device: cpu, learners: 2, rollouts: 2, cpus_per_learner: 0.4, cpus_per_rollout: 0.6, start_timeout: 600}
"""
"""An untrained model is never right, and without a difference in reward nothing would be published.
Ray packs the largest shares first: on a machine of one CPU beside one worker there is no room
for the other, but for a rank. Every actor computes with one thread."""
PARITY = """\
def parity(completions, **columns):
    return [float(len(text) % 2) for text in completions]
"""
CPUS = {"one machine": (2,), "two machines": (1, 1)}
SKIPPED = 5
"""Steps that do not count: caches are filled, and the first versions go whole in either mode."""
LIMIT = 900.0
"""Seconds for one run."""
LOOK = """\
import json, time, ray
from ray._private import state
ray.init(address=%r, log_to_driver=False)
seen, deadline = {}, time.monotonic() + %f
while len(seen) < 4:
    assert time.monotonic() < deadline, seen
    time.sleep(0.5)
    for key, actor in state.actors().items():
        if actor["State"] == "ALIVE" and actor["ActorClassName"] in ("LearnerRank", "RolloutWorker"):
            seen[key] = (actor["Address"]["IPAddress"], actor["ActorClassName"])
print(json.dumps(sorted(seen.values())))
"""


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "system" / "nodes.py"
    spec = importlib.util.spec_from_file_location("nodes", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nodes = _load()


def run_once(boxes: list[Any], address: str, mode: str, steps: int) -> dict[str, Any]:
    """The figures of one run on these machines; ends the program where it fails, or where its
    actors are not one learner and one worker a machine (two on a single one)."""
    driver, name = boxes[0], f"run-{mode}"
    (driver.folder / "nodes.yaml").write_text(CONFIG)
    (driver.folder / "parity.py").write_text(PARITY)
    started = driver.start(
        f"{name}.log",
        *(str(nodes.BIN / "emberl"), "train", "nodes.yaml", f"run_dir={nodes.DISK}/{name}"),
        *(f"sync.mode={mode}", f"schedule.steps={steps}", f"cluster.address={address}"),
    )
    try:
        placed = places(driver, address)
        started.wait(timeout=LIMIT)
    except (subprocess.SubprocessError, AssertionError) as error:
        sys.exit(f"{error}\n{(driver.folder / f'{name}.log').read_text()[-3000:]}")
    finally:
        started.kill()
        started.wait()
    if started.returncode != 0:
        sys.exit((driver.folder / f"{name}.log").read_text()[-4000:])
    each = 2 // len(boxes)
    expected = [
        (box.address, role) for box in boxes for role in ("LearnerRank", "RolloutWorker")
    ] * each
    if placed != sorted(expected):
        sys.exit(f"the actors are not where they should be: {placed}")
    return summary(driver.folder / name)


def places(driver: Any, address: str) -> list[tuple[str, str]]:
    """(Address of its machine, class) of every learner and worker, once all are up."""
    done = subprocess.run(
        driver.command(sys.executable, "-c", LOOK % (address, LIMIT)),
        check=False,
        capture_output=True,
        text=True,
        env=nodes.ENVIRONMENT,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(pair) for pair in json.loads(done.stdout.strip().splitlines()[-1])]


def summary(run_dir: Path) -> dict[str, Any]:
    """Of the steps that count: medians, and the tokens of every one."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["stage"] == "rl" and row["axis"] == "train"][SKIPPED:]

    def middle(key: str) -> float:
        return median([row[key] for row in steps])

    tokens = [round(row["perf/sampled_tokens_per_second"] * row["timing_s/step"]) for row in steps]
    return {
        "tokens": tokens,
        "tokens_per_s": middle("perf/sampled_tokens_per_second"),
        "step": middle("timing_s/step"),
        "decode": middle("timing_s/gen"),
        "sync": middle("timing_s/update_weights"),
        "wire_mb": middle("sync/wire_bytes") / 1e6,
    }


def record(report: Report, case: str, found: Mapping[str, dict[str, Any]]) -> None:
    """found: figures of each layout."""
    one, two = found["one machine"], found["two machines"]
    if one["tokens"] != two["tokens"]:
        sys.exit(f"{case}: the two layouts sampled different tokens")
    for layout, figures in found.items():
        rate, ratio = figures["tokens_per_s"], None
        extra = {k: v for k, v in figures.items() if k not in ("tokens", "tokens_per_s")}
        if figures is two:
            ratio = rate / one["tokens_per_s"]
            extra["step_ratio"] = two["step"] / one["step"]
            extra["sync_ratio"] = two["sync"] / one["sync"]
        report.record(case, layout, rate, "tokens/s", ratio=ratio, **extra)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=2, help="each layout once in each")
    parser.add_argument("--steps", type=int, default=40, help="of every run")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("dense", "patch"),
        default=("dense", "patch"),
        help="sync.mode; others than the first in one round alone",
    )
    args = parser.parse_args()
    if (reason := nodes.why_not()) is not None:
        sys.exit(reason)
    rounds, steps = (1, SKIPPED + 3) if args.quick else (args.rounds, args.steps)
    report = Report("nodes", args.json, "ray")
    for number in range(rounds):
        # the other way round in every second one
        layouts = list(CPUS)[:: -1 if number % 2 else 1]
        modes = args.modes[:1] if number else args.modes
        found: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in modes}
        for layout in layouts:
            cpus = CPUS[layout]
            with (
                tempfile.TemporaryDirectory() as folder,
                nodes.machines(Path(folder), len(cpus)) as boxes,
                nodes.ray_cluster(boxes, cpus, seconds=LIMIT) as address,
            ):
                for mode in modes:
                    found[mode][layout] = run_once(boxes, address, mode, steps)
        for mode in modes:
            by_layout = {layout: found[mode][layout] for layout in CPUS}
            record(report, f"{mode}, round {number + 1}", by_layout)


if __name__ == "__main__":
    main()
