"""The algorithms side by side on the quickstart problem, on two learner ranks: held-out accuracy
before and after, and the time.

One cold start for each seed, from which every algorithm goes on for STEPS steps with the same
prompts. A preset's own settings hold but for what `OVERRIDES` names. Run: python
tests/benchmarks/bench_learning.py [--quick] [--json FILE] [--only ppo,grpo] [--folder DIR, which
keeps the cold starts and takes those that it has]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Report, arguments, median

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TWO_RANKS = ("cluster.learners=2", "cluster.cpus_per_learner=0.5", "tracking.wandb=disabled")
STEPS = 30
OVERRIDES: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "dapo": (),
    # the paper's 3e-4 are for models whose ratios hardly move
    "gspo": ("loss.clip_low=0.03", "loss.clip_high=0.04"),
    "cispo": (),
    "rloo": (),
    "ppo": ("critic.lr=1e-3", "filter.zero_variance=false"),
}


def emberl(*arguments: str) -> dict[str, Any]:
    """The JSON line with which the run ends."""
    command = [
        str(Path(sys.executable).with_name("emberl")),
        "train",
        str(QUICKSTART),
        *TWO_RANKS,
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(OVERRIDES), help="algorithms, comma-separated")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    report = Report("learning", options.json, "transformers", "ray")
    seeds = (0,) if options.quick else (0, 1, 2)
    fewer = (
        ("sft.steps=50", "schedule.steps=2", "eval.size=64")
        if options.quick
        else (f"schedule.steps={STEPS}",)
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            start = (options.folder or Path(folder)) / f"start{seed}"
            if not (start / "model").exists():
                emberl("stages=[sft]", f"seed={seed}", f"run_dir={start}", *fewer)
            for name, found in results.items():
                found.append(
                    emberl(
                        "stages=[rl]",
                        "model.tiny=null",
                        f"model.path={start / 'model'}",
                        f"seed={seed}",
                        f"algorithm={name}",
                        f"run_dir={Path(folder) / f'{name}{seed}'}",
                        "eval.every=0",
                        "checkpoint.every=0",
                        *OVERRIDES[name],
                        *fewer,
                    )
                )
                last = found[-1]
                report.record(
                    f"{name}, seed {seed}", "emberl", 100 * last["accuracy_end"], "%",
                    start=100 * last["accuracy_start"], seconds=last["seconds"],
                )  # fmt: skip
    for name, found in results.items():
        ends = [100 * r["accuracy_end"] for r in found]
        report.record(
            name,
            "emberl",
            median(ends),
            "% median",
            worst=min(ends),
            seconds=median([r["seconds"] for r in found]),
        )


if __name__ == "__main__":
    main()
