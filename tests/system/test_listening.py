"""A run on this machine listens nowhere that another machine could reach."""

from __future__ import annotations

import json

import pytest
from listening import beyond_loopback, watched
from small_system import Emberl

pytestmark = pytest.mark.slow


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
    try:
        _, seen = watched(process)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out.strip().splitlines()[-1])["steps"] == 6
    assert {name for name, _ in seen} >= {"gcs_server", "raylet", "ray::LearnerRank"}
    assert beyond_loopback(seen) == []
