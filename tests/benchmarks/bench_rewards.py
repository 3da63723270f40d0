"""Speed and agreement of the math reward, beside math-verify in one run.

    python tests/benchmarks/bench_rewards.py [--quick] [--data ../shared/data] [--json FILE]

Seconds are of one core's own time (`time.process_time`) where the work is in this process, so that
a busy machine does not count against either side.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emberl.rewards.inputs import RewardInput
from emberl.rewards.math_answers.reward import MathReward
from harness import Report, arguments, median

NATURAL = ("qwen_math_responses", "gsm8k_openai_solutions")


def read_pairs(data: Path, sources: Sequence[str]) -> list[dict[str, Any]]:
    with gzip.open(data / "graded_pairs" / "graded_pairs.jsonl.gz", "rt") as file:
        return [row for row in map(json.loads, file) if row["source"] in sources]


def math_verify_grader() -> Callable[[str, str], bool]:
    from math_verify import parse, verify

    def grade(gold: str, answer: str) -> bool:
        return bool(
            verify(
                parse(f"${gold}$", parsing_timeout=None),
                parse(answer, parsing_timeout=None),
                timeout_seconds=None,
            )
        )

    return grade


def per_second(run: Callable[[], Any], count: int, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return count / median(seconds)


def speed(report: Report, rows: Sequence[dict[str, Any]], name: str, rounds: int) -> None:
    inputs = [RewardInput(completion=row["pred"], answer=row["gold"]) for row in rows]
    rewards: list[MathReward] = []

    def first_time() -> None:
        rewards.append(MathReward())
        rewards[-1](inputs)

    ours = per_second(first_time, len(inputs), rounds)
    cached = per_second(lambda: rewards[-1](inputs), len(inputs), rounds)
    sample = rows[:: max(1, len(rows) // 100)]
    grade = math_verify_grader()
    theirs = per_second(lambda: [grade(row["gold"], row["pred"]) for row in sample], len(sample), 1)
    processes = sum(reward._pool.started for reward in rewards)
    for reward in rewards:
        reward.close()
    report.record(
        name, "emberl", ours, "1/s/core", ratio=ours / theirs, floor=20_000, processes=processes
    )
    report.record(name, "emberl, cached", cached, "1/s/core", ratio=cached / theirs, floor=100_000)
    report.record(name, "math-verify", theirs, "1/s/core", ratio=1.0)


def accuracy(report: Report, rows: Sequence[dict[str, Any]], name: str) -> None:
    reward, grade = MathReward(), math_verify_grader()
    verdicts = reward([RewardInput(completion=row["pred"], answer=row["gold"]) for row in rows])
    reward.close()
    accepted = {
        "emberl": [verdict.score == 1 for verdict in verdicts],
        "math-verify": [
            grade(row["gold"], row["pred"] if "boxed" in row["pred"] else f"${row['pred']}$")
            for row in rows
        ],
    }
    for impl, values in accepted.items():
        for label, case, floor in (
            (True, "accepted of right", 0.80),
            (False, "accepted of wrong", 0.005),
        ):
            chosen = [
                value for row, value in zip(rows, values, strict=True) if row["label"] is label
            ]
            report.record(
                f"{name}: {case}",
                impl,
                sum(chosen) / len(chosen),
                "share",
                floor=floor,
                pairs=len(chosen),
            )


def bombs(report: Report, data: Path, limit: float) -> None:
    reward = MathReward(timeout=limit)
    seconds = []
    for line in (data / "math_bombs" / "bombs.jsonl").open():
        bomb = json.loads(line)
        start = time.perf_counter()
        reward([RewardInput(completion=bomb["pred"], answer=bomb["gold"])])
        seconds.append(time.perf_counter() - start)
    reward.close()
    report.record(
        "bombs, slowest",
        "emberl",
        max(seconds),
        "s",
        floor=limit + 0.5,
        limit=limit,
        bombs=len(seconds),
    )
    report.record("bombs, median", "emberl", median(seconds), "s")


def main() -> None:
    parser = arguments(
        "math reward: verifications a second, accuracy on hard pairs, time of the slowest bomb"
    )
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parents[2].parent / "shared" / "data"
    )
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no data at {options.data}: give --data")
    report = Report("rewards", options.json, "math-verify", "sympy")
    for source in NATURAL:
        rows = read_pairs(options.data, [source])
        speed(report, rows[:300] if options.quick else rows, source, 3 if options.quick else 15)
    hard = read_pairs(options.data, ["hardverify"])
    accuracy(report, hard[:60] if options.quick else hard, "hardverify")
    bombs(report, options.data, 1.0 if options.quick else 5.0)


if __name__ == "__main__":
    main()
