"""Processes of a run that are killed: what can be replaced is, alone, and changes no bit of what is
learned; without the others the run ends with a reason, and goes on when it is started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from small_system import Emberl, read_metrics

pytestmark = pytest.mark.slow
MARKS = """\
from emberl.rewards.sandbox.pool import Sandbox

BOX = Sandbox(workers=1)


def score(completion, answer, **columns):
    said = completion.split("</think>")[-1].strip()
    run = BOX.run_program(f"print({said!r} == {str(answer)!r})")
    return float(run.stdout == b"True\\n")
"""
"""A reward with processes of every kind: graders, and a sandbox in each."""
GRADER, SANDBOX = "emberl.rewards.worker_process", "sandbox/zygote.py"
WORKER, LEARNER = "ray::RolloutWorker", "ray::LearnerRank"


def until(
    ready: Callable[[], object], what: str, seconds: float = 240.0, every: float = 0.05
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(every)


def below(kind: str, root: int | None = None) -> list[int]:
    """Processes under this one, or `root`, with this in their command lines: Ray names its own
    after the actor."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if kind in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:  # it ended while we looked
            continue
    return found


def kill(kind: str, root: int | None = None) -> int:
    """Kills the first of this kind as soon as there is one; its process id."""
    until(lambda: below(kind, root), kind)
    victim = below(kind, root)[0]
    os.kill(victim, signal.SIGKILL)
    return victim


def at_step(emberl: Emberl, step: int) -> None:
    file = emberl.folder / "run/metrics.jsonl"
    text = f'"stage": "rl", "step": {step}'
    until(lambda: file.exists() and text in file.read_text(), text)


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def kill_at(emberl: Emberl, step: int) -> None:
    at_step(emberl, step)
    kill(WORKER)


def test_a_lost_worker_ends_the_run_with_its_name(emberl: Emberl) -> None:
    """Invariant 7: the exit status is not zero, and the last line says why."""
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_at, emberl, 1)
        result = emberl.train(
            "schedule.steps=1000", "rollout.max_restarts=0", "cluster.max_restarts=0", status=1
        )
        killed.result()
    assert "rollout worker 0" in result["error"]


def test_what_is_killed_is_replaced_alone_and_changes_no_bit(emberl: Emberl) -> None:
    """A grader in the reward's trial, a worker before it is up, then in the middle of the run the
    learner (a new one goes on from the last checkpoint), a worker and a sandbox."""
    (emberl.folder / "marks.py").write_text(MARKS)
    steps = ("schedule.steps=8", "sft.steps=10", "rollout.token_rate=60", "eval.every=0")
    steps += ("reward.parts.answer.use=./marks.py:score",)
    emberl.train(*steps, "run_dir=quiet")
    kinds = (WORKER, GRADER, SANDBOX)
    until(lambda: not any(map(below, kinds)), "the end of the first run's processes", 30)

    def hit() -> None:
        kill(WORKER)
        kill(GRADER)
        until(lambda: below(LEARNER), LEARNER)
        first = below(LEARNER)
        at_step(emberl, 3)
        assert below(LEARNER) == first, "only the worker was started anew"
        stayed = below(WORKER)
        os.kill(first[0], signal.SIGKILL)
        at_step(emberl, 5)
        assert below(WORKER) == stayed, "only the learner was started anew"
        kill(WORKER)
        kill(SANDBOX)

    with ThreadPoolExecutor(1) as beside:
        hits = beside.submit(hit)
        emberl.train(*steps)
        hits.result()
    told = (emberl.folder / "stderr.txt").read_text()
    assert "rollout worker 0 failed in 'ready'" in told and "another has taken its place" in told
    assert "the learners are started anew from rl-000002" in told
    assert "all actors are started anew" not in told
    assert [row["step"] for row in read_metrics(emberl.folder / "run")] == list(range(1, 9))
    assert weights(emberl.folder / "run") == weights(emberl.folder / "quiet")


def test_a_lost_worker_is_replaced_and_what_it_had_not_answered_is_asked_again(
    emberl: Emberl,
) -> None:
    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill_at, emberl, 5)
        result = emberl.train("schedule.steps=30", "schedule.max_staleness=1", "eval.every=0")
        killed.result()
    assert result["steps"] == 30
    rows = read_metrics(emberl.folder / "run")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert sum(row["sched/workers_restarted"] for row in rows) == 1
    assert max(row["sched/staleness/max"] for row in rows) == 1


def left_of(process: subprocess.Popen[str], others: list[psutil.Process]) -> list[str]:
    """The processes of those that it had started which are still there after the time that Ray
    takes to notice, but for its agents: these try for a minute to report that to a server which is
    gone too."""
    process.wait(timeout=60)
    agents = [each for each in others if each.is_running() and each.name().endswith("Agent")]
    _, there = psutil.wait_procs([each for each in others if each not in agents], timeout=30)
    left = [each for each in there if not ended(each)]
    seen = [str(each) for each in left]  # before they are killed: it says what each was doing
    for each in [*left, *agents]:
        each.kill()
    return seen


def ended(process: psutil.Process) -> bool:
    """Also one that nobody has waited for: whoever inherits it may take its time over that."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_driver_and_a_killed_cluster_are_gone_on_from(emberl: Emberl) -> None:
    """kill -9 of the driver while a checkpoint is written, which is then passed over by its name;
    and of Ray's own server, without which nothing can go on."""
    steps = ("schedule.steps=8", "sft.steps=10", "eval.every=0", "run_dir=run")
    begun = (*steps, "rollout.token_rate=60", "--resume", "auto")
    first = emberl.start(*begun)
    at_step(emberl, 3)
    [rank] = below(LEARNER, first.pid)
    half = emberl.folder / "run/checkpoints/.rl-000004"
    until(half.exists, "the checkpoint of step 4", every=0.001)
    os.kill(rank, signal.SIGSTOP)  # else it may be written before the driver is gone
    others = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait(timeout=60)
    # The kernel ends a stopped process whose parents are gone, but not one that was still within
    # an fsync when they went: it would stay stopped, with nobody left to end it.
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, signal.SIGKILL)
    assert left_of(first, others) == []

    second = emberl.start(*begun)
    at_step(emberl, 5)
    others = psutil.Process(second.pid).children(recursive=True)
    kill("gcs_server", second.pid)
    killed = time.monotonic()
    out, err = second.communicate(timeout=60)
    assert time.monotonic() - killed < 15, "not when Ray gives it up"
    assert "checkpoint rl-000004 is passed over: the run ended while it was written" in err
    result = json.loads(out.strip().splitlines()[-1])
    assert (second.returncode, result["status"]) == (1, "error"), err[-2000:]
    assert "gcs_server" in result["error"] and "--resume auto" in result["error"]
    assert left_of(second, others) == []

    assert emberl.train(*steps, "--resume", "auto")["steps"] == 8
    assert [row["step"] for row in read_metrics(emberl.folder / "run")] == list(range(1, 9))
