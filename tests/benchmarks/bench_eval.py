"""A long evaluation on a real model, killed once in the middle: no sample may be lost or doubled,
and no process may grow.

GSM8K's test problems, four answers each, on SmolLM2-135M (`make smollm2`). The first attempt is
killed with -9 when half of the problems are written; the second goes on. The resident memory of the
driver and of the rollout worker is read every two seconds; growth is that of the second half of an
attempt over its first, by medians, so that what is filled at the start does not count.

    python tests/benchmarks/bench_eval.py GSM8K_TEST.jsonl [--tokens N] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from harness import Report, arguments, median

EMBERL = str(Path(sys.executable).with_name("emberl"))
ROOT = Path(__file__).parents[2]
PROBLEMS, QUICK, ANSWERS = 1319, 40, 4
LOOK = 2.0
"""Seconds between two looks at the processes."""
Memory = dict[str, list[float]]
"""MB over time, of the driver and of the worker."""


def children(pid: int) -> list[int]:
    """All processes below this one."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


def resident(pid: int) -> tuple[str, float]:
    """(what the process is, MB)."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return "", 0.0
    return name, pages * os.sysconf("SC_PAGESIZE") / 2**20


def written(folder: Path) -> list[tuple[str, int]]:
    """(problem, sample) of every row."""
    rows = []
    for file in sorted((folder / "samples").glob("part-*.parquet")):
        table = parquet.read_table(file, columns=["problem", "sample"])
        rows += list(zip(table["problem"].to_pylist(), table["sample"].to_pylist(), strict=True))
    return rows


def attempt(command: list[str], folder: Path, kill_at: int | None) -> tuple[Memory, dict[str, Any]]:
    """Runs until it ends, or is killed with so many rows written; its memory, and its result."""
    memory: Memory = {"driver": [], "worker": []}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(LOOK)
        memory["driver"].append(resident(process.pid)[1])
        below = [resident(pid) for pid in children(process.pid)]
        workers = [size for name, size in below if name.startswith("ray::RolloutWorker")]
        if workers:
            memory["worker"].append(max(workers))
        if kill_at is not None and len(written(folder)) >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return memory, {}
    assert process.stdout is not None
    assert process.returncode == 0, f"status {process.returncode}"
    result: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1])
    return memory, result


def growth(sizes: list[float]) -> float:
    """MB of the last quarter over the second."""
    quarter = max(1, len(sizes) // 4)
    return median(sizes[-quarter:]) - median(sizes[quarter : 2 * quarter] or sizes)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at the most")
    options = parser.parse_args()
    report = Report("eval", options.json, "torch", "ray", "pyarrow")
    count = QUICK if options.quick else PROBLEMS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "evaluation"
        command = [
            *(EMBERL, "eval", str(options.model), "--data", f"gsm8k={options.data}"),
            *(f"size={count}", f"samples={ANSWERS}", "temperature=0.6"),
            f"max_response_length={options.tokens}",
            *("--out", str(folder), "rollout.max_num_seqs=64"),
        ]
        start = time.monotonic()
        first, _ = attempt(command, folder, kill_at=count * ANSWERS // 2)
        kept = written(folder)
        killed = time.monotonic()
        second, result = attempt(command, folder, kill_at=None)
        seconds, rows = time.monotonic() - start, written(folder)
        # what was written before is still there, and all is there once
        assert rows[: len(kept)] == kept
        assert len(rows) == len(set(rows)) == count * ANSWERS, f"{len(rows)} rows"
        figures = result["sets"][0]
        case = f"gsm8k {count} x {ANSWERS}"
        report.record(case, "samples lost", count * ANSWERS - len(set(rows)), "samples", floor=0)
        report.record(case, "samples doubled", len(rows) - len(set(rows)), "samples", floor=0)
        report.record(case, "kept at the kill", len(kept), "samples")
        for name in first:
            sizes = second[name]
            report.record(
                case, f"{name} memory", max(sizes), "MB", growth_mb=growth(sizes), looks=len(sizes)
            )
        accuracy = figures[f"mean@{ANSWERS}"]
        low, high = accuracy["interval"]
        report.record(case, f"mean@{ANSWERS}", accuracy["value"], "fraction", low=low, high=high)
        tokens = figures["tokens"] * count * ANSWERS
        report.record(
            case, "both attempts", seconds, "s", second=time.monotonic() - killed, tokens=tokens
        )


if __name__ == "__main__":
    main()
