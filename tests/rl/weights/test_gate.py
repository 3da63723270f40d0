"""The gate on every step, by hand-made figures."""

from __future__ import annotations

import math

import pytest
from emberl.rl.weights.gate import Gate
from emberl.rollout.actors import ActorLostError

MEAN = "training/rollout_probs_diff_mean"


def test_rounding_passes_and_what_is_thrice_as_far_is_an_alarm() -> None:
    gate = Gate(0.1)
    for step in range(5):
        assert gate.check({MEAN: 0.006}, version=step, moved=None)["sync/gate"] < 1
    assert gate.check({MEAN: 0.02}, version=5, moved=None)["sync/gate"] == pytest.approx(
        0.02 / 0.018
    )
    assert gate.check({MEAN: 0.006}, version=6, moved=None)["sync/gate"] == pytest.approx(1 / 3)
    assert gate.check({}, version=7, moved=None) == {}


@pytest.mark.parametrize("apart", [0.05, math.nan])
def test_further_away_ends_the_run_and_names_the_worker(apart: float) -> None:
    gate = Gate(0.1)
    gate.check({MEAN: 0.006}, version=0, moved=None)
    figures = {MEAN: apart / 2, f"{MEAN}/worker_0": 0.006, f"{MEAN}/worker_3": apart}
    with pytest.raises(ActorLostError, match=r"rollout worker 3 decoded .* than version 9"):
        gate.check(figures, version=9, moved=None)


def test_updates_in_between_are_expected_where_rollouts_run_ahead() -> None:
    gate = Gate(0.1)
    gate.check({MEAN: 0.006}, version=0, moved=0.004)
    stale = {MEAN: 0.03, "sched/staleness/max": 4.0}
    assert gate.check(stale, version=5, moved=0.007)["sync/gate"] == pytest.approx(0.03 / 0.102)
    assert gate.check({MEAN: 0.03}, version=6, moved=0.007)["sync/gate"] > 1


def test_large_updates_in_between_are_an_alarm_and_no_end() -> None:
    """Three steps of a real run in float32 after a short warm-up of the learning rate."""
    gate = Gate(1e-3)
    ahead = {"sched/staleness/max": 1.0}
    gate.check({MEAN: 1e-6}, version=0, moved=None)
    assert gate.check({MEAN: 0.0237, **ahead}, version=2, moved=0.0021)["sync/gate"] > 3
    assert gate.check({MEAN: 0.03, **ahead}, version=3, moved=0.0021)["sync/gate"] < 1
    with pytest.raises(ActorLostError, match="nan"):
        gate.check({MEAN: math.nan, **ahead}, version=4, moved=0.0021)
    with pytest.raises(ActorLostError, match="rounding of 1e-06 is expected"):
        gate.check({MEAN: 0.0237}, version=4, moved=0.0021)


def test_later_minibatches_come_after_updates_of_the_step_itself() -> None:
    gate = Gate(0.01)
    figure = gate.check({MEAN: 0.02}, version=0, moved=0.004, within=3.0)["sync/gate"]
    assert figure == pytest.approx(0.02 / (0.005 + 3 * 3 * 0.004))


def test_the_first_step_is_held_to_the_absolute_bound() -> None:
    assert Gate(0.01).check({MEAN: 0.004}, version=0, moved=None)["sync/gate"] == 0.8
    with pytest.raises(ActorLostError, match="worker"):
        Gate(0.01).check({MEAN: 0.02}, version=0, moved=None)


def test_the_kl_warns_and_stops_nothing() -> None:
    gate = Gate(0.1)
    gate.check({MEAN: 0.006, "rollout_corr/k3_kl": 0.001}, version=0, moved=None)
    found = gate.check({MEAN: 0.006, "rollout_corr/k3_kl": 5.0}, version=1, moved=None)
    assert found["sync/gate"] == pytest.approx(5 / 0.03)
