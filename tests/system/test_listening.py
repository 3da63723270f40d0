"""A run on this machine listens nowhere that another machine could reach."""

from __future__ import annotations

import json
import time

import psutil
import pytest
from small_system import Emberl

pytestmark = pytest.mark.slow
LOOPBACK = ("127.", "::1", "::ffff:127.")


def listeners(driver: int) -> set[tuple[str, str]]:
    """(process, address) of every listening socket of a process and those that it started."""
    found = set()
    for process in (psutil.Process(driver), *psutil.Process(driver).children(recursive=True)):
        try:
            found |= {
                (process.name(), socket.laddr.ip)
                for socket in process.net_connections(kind="inet")
                if socket.status == psutil.CONN_LISTEN
            }
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_local_run_listens_on_loopback_alone(emberl: Emberl) -> None:
    process = emberl.start(
        "schedule.steps=6",
        "rollout.token_rate=30",
        "cluster.learners=2",
        "cluster.cpus_per_learner=0.25",
        "tracking.wandb=offline",
        "sync.mode=dense",
        "run_dir=run",
    )
    seen: set[tuple[str, str]] = set()
    try:
        while process.poll() is None:
            try:
                seen |= listeners(process.pid)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.strip().splitlines()[-1])["steps"] == 6
    assert {name for name, _ in seen} >= {"gcs_server", "raylet", "ray::LearnerRank"}
    assert not [(name, ip) for name, ip in seen if not ip.startswith(LOOPBACK)]
