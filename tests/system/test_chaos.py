"""A run whose processes are killed and stopped at random ends with all its steps, each once, and
with its books balanced (`Schedule.check` runs at every step)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_system import Emberl, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "EMBERL_FAULTS" not in os.environ, reason="takes minutes: `make test-faults` runs it"
    ),
]

REWARD = """\
def score(prompt, completion, answer, **columns):
    return float(completion.split("</think>")[-1].strip() == str(answer))
"""


def descendants(driver: int) -> dict[int, str]:
    """pid -> command line of every process that `driver` started, directly or not."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
            lines[int(folder.name)] = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            )
        except (OSError, ValueError):  # a process that ended while we looked
            continue

    def ours(pid: int) -> bool:
        while pid > 1 and pid != driver:
            pid = parents.get(pid, 0)
        return pid == driver

    return {pid: lines[pid] for pid in parents if pid in lines and pid != driver and ours(pid)}


def hit(driver: int, kind: str, chosen: random.Random, how: signal.Signals) -> bool:
    found = sorted(pid for pid, line in descendants(driver).items() if kind in line)
    if found:
        os.kill(chosen.choice(found), how)
    return bool(found)


@pytest.mark.parametrize("staleness", [2])
def test_sixty_steps_with_random_kills_and_stalls(emberl: Emberl, staleness: int) -> None:
    (emberl.folder / "marks.py").write_text(REWARD)
    process = emberl.start(
        "schedule.steps=60",
        f"schedule.max_staleness={staleness}",
        "sft.steps=20",
        "checkpoint.every=5",
        "eval.every=0",
        "cluster.rollouts=2",
        "cluster.cpus_per_rollout=0.25",
        "cluster.max_restarts=2",
        "rollout.max_restarts=20",
        "rollout.token_rate=120",  # so that workers are busy when they are hit
        "rollout.timeout=6",
        "sync.timeout=10",
        "cluster.step_timeout=30",
        "run_dir=run",
        "reward.parts.answer.use=./marks.py:score",
        "reward.max_error_fraction=0.2",
    )
    metrics, chosen = emberl.folder / "run/metrics.jsonl", random.Random(0)

    def until(ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready() and process.poll() is None:
            assert time.monotonic() < deadline, (
                metrics.read_text()[-500:] if metrics.exists() else "no metrics"
            )
            time.sleep(0.1)

    def steps() -> int:
        return metrics.read_text().count('"stage": "rl"') if metrics.exists() else 0

    done: list[str] = []
    attacks = [
        ("ray::RolloutWorker", signal.SIGKILL),
        ("emberl.rewards", signal.SIGKILL),
        ("ray::RolloutWorker", signal.SIGSTOP),
        ("ray::LearnerRank", signal.SIGKILL),
        ("emberl.rewards", signal.SIGSTOP),
        ("ray::RolloutWorker", signal.SIGKILL),
        ("ray::RolloutWorker", signal.SIGKILL),  # a worker may have been idle when it was hit
    ]
    try:
        for number, (kind, how) in enumerate(attacks):
            goal = 7 + 8 * number
            until(lambda goal=goal: steps() >= goal, 120)  # type: ignore[misc]
            if hit(process.pid, kind, chosen, how):
                done.append(f"{how.name} {kind}")
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    result = json.loads(out.strip().splitlines()[-1])
    assert (result["status"], result["steps"]) == ("ok", 60)
    rows = read_metrics(emberl.folder / "run")
    assert [row["step"] for row in rows] == list(range(1, 61)), (
        "each step once, those after a checkpoint done again"
    )
    assert len(done) == len(attacks), done
    assert all(row["sched/staleness/max"] <= staleness for row in rows)
    assert sum(row["sched/workers_restarted"] for row in rows) >= 1
    assert sum(row["sched/groups_reissued"] for row in rows) >= 1
    assert "started anew from rl-" in err
