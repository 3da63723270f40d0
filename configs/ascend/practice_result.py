"""Usage:

    python configs/ascend/practice_result.py RUN [--against RUN] [--device F] [--doctor F] > FILE

One JSON file of a practice run: its configuration, the figures of every step, and the acceptance of
practice.md. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

REWARD, SPEED = "critic/score/mean", "perf/throughput"
STEPS, HOURS, WINDOW = 100, 12.0, 10
LARGEST_ERROR, LEAST_SPEED, LEAST_SHARE = 0.05, 100.0, 0.7
KEPT = (
    "critic/score/", "response_length/", "actor/", "perf/", "timing_s/", "training/", "val-",
    "distill/", "sched/",
)  # fmt: skip
"""What practice.md asks to look at, by how the names begin."""


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of training steps, in order; a row of an evaluation has no reward."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if REWARD in row]


def means(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Of whole windows of ten steps."""
    values = [float(row[name]) for row in rows if name in row]
    whole = len(values) // WINDOW * WINDOW
    return [fmean(values[i : i + WINDOW]) for i in range(0, whole, WINDOW)]


def accept(rows: list[dict[str, Any]], other: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Each criterion with its figure; `passed` if all that can be judged hold."""
    hours = sum(float(row.get("timing_s/step", 0.0)) for row in rows) / 3600
    rewards, speeds = means(rows, REWARD), means(rows, SPEED)
    if not rewards or not speeds:
        raise SystemExit(f"fewer than {WINDOW} steps with {REWARD} and {SPEED}: nothing to judge")
    speed = fmean(speeds)
    found: dict[str, Any] = {
        "long_enough": {
            "steps": len(rows),
            "hours": hours,
            "holds": len(rows) >= STEPS or hours >= HOURS,
        },
        "reward_rises": {
            "first": rewards[0],
            "last": rewards[-1],
            "holds": rewards[-1] > rewards[0],
        },
    }
    if other is None:
        found["throughput"] = {"tokens_per_second_per_device": speed, "holds": speed > LEAST_SPEED}
    else:
        pairs = list(zip(rewards, means(other, REWARD), strict=False))
        error = fmean(abs(ours - theirs) / max(abs(theirs), 1e-6) for ours, theirs in pairs)
        share = speed / fmean(means(other, SPEED))
        found["error"] = {
            "mean_relative": error,
            "windows": len(pairs),
            "holds": error < LARGEST_ERROR,
        }
        found["throughput"] = {
            "tokens_per_second_per_device": speed,
            "share": share,
            "holds": share >= LEAST_SHARE,
        }
    return {"passed": all(part["holds"] for part in found.values()), **found}


def result(run: Path, against: Path | None, files: dict[str, Path | None]) -> dict[str, Any]:
    rows = steps_of(run)
    kept = [
        {name: row[name] for name in row if name == "step" or name.startswith(KEPT)} for row in rows
    ]
    return {
        "practice": 1,
        "acceptance": accept(rows, None if against is None else steps_of(against)),
        "config": (run / "config.yaml").read_text(),
        **{name: json.loads(path.read_text()) for name, path in files.items() if path is not None},
        "steps": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    for name in ("against", "device", "doctor"):
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    found = result(given.run, given.against, {"device": given.device, "doctor": given.doctor})
    json.dump(found, sys.stdout)
    print(json.dumps(found["acceptance"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
