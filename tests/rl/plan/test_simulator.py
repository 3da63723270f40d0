"""The planner's simulator against times that are known by hand, the books, and an independent
simulation's figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emberl.rl.plan.devices import DecodeTable
from emberl.rl.plan.settings import (
    Failures,
    LognormalLengths,
    PlanSchedule,
    Publication,
    RewardTime,
    Scenario,
    TraceLengths,
)
from emberl.rl.plan.simulator import Simulation, figures, simulate
from emberl.rollout.schedule import Schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from other_simulation import TOY, TOY_CASES, changed, steady

EQUAL = LognormalLengths(mean=100, cv=0, cap=1000, prompt=0)
"""Every answer has 100 tokens: 10 s at 10 tokens a second."""

BASE = Scenario(
    workers=2,
    slots=8,
    table=steady(10),
    lengths=EQUAL,
    schedule=PlanSchedule(prompts_per_step=4, group_size=4, max_staleness=0),
    learner_fixed=3.0,
    learner_per_token=0.001,
    reward=RewardTime(seconds=0, cv=0),
    steps=12,
    warmup=4,
)
TRAIN = 3.0 + 0.001 * 4 * 4 * 100
"""4.6 s for the 16 answers of a step."""


def step_seconds(scenario: Scenario) -> float:
    return float(figures(simulate(scenario))["step_s"])


def test_a_synchronous_step_is_decoding_then_training_then_publishing() -> None:
    scenario = changed(
        BASE,
        publication=Publication(encode=0.1, transfer=0.3, commit=0.2),
        reward=RewardTime(seconds=0.5, cv=0),
    )
    assert step_seconds(scenario) == pytest.approx(10 + 0.5 + TRAIN + 0.6)
    found = figures(simulate(scenario))
    assert found["learner_idle"] == pytest.approx(10.5 / (10.5 + TRAIN + 0.6))
    assert found["rollout_idle"] == pytest.approx(
        (0.5 + TRAIN + 0.6) / (10.5 + TRAIN + 0.6), rel=1e-3
    )
    assert found["sync_exposed_learner_s"] == pytest.approx(0.6)
    assert found["staleness"] == {"0": 1.0}


def test_too_few_slots_take_turns() -> None:
    """8 answers a worker over 4 slots: two rounds of 10 s."""
    assert step_seconds(changed(BASE, slots=4)) == pytest.approx(20 + TRAIN)


def test_a_synchronous_step_waits_for_the_longest_answer_of_the_batch() -> None:
    groups = np.array([10.0, 20.0, 30.0, 170.0])
    scenario = changed(BASE, lengths=TraceLengths([(5, groups)]))
    tokens = 4 * (10 + 20 + 30 + 170 + 4 * 5)
    assert step_seconds(scenario) == pytest.approx(17 + 3 + 0.001 * tokens)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        pytest.param(
            3.0,
            5.0,
            id=(
                "rollouts are the bottleneck: 16 slots decode 16 answers in 10 s, and a step"
                " needs 8"
            ),
        ),
        pytest.param(7.0, 7.8, id="the learner is the bottleneck"),
    ],
)
def test_run_ahead_far_enough_the_slower_side_decides(fixed: float, expected: float) -> None:
    scenario = changed(
        BASE, prompts_per_step=2, learner_fixed=fixed, max_staleness=4, steps=40, warmup=10
    )
    found = figures(simulate(scenario))
    assert found["step_s"] == pytest.approx(expected, rel=0.02)
    assert found["slots_used" if expected == 5.0 else "learner_busy"] == pytest.approx(
        1.0, abs=0.02
    )
    assert found["tokens_per_s"] == pytest.approx(800 / expected, rel=0.02)


def test_the_step_time_of_a_batch_is_read_from_the_table_between_its_points() -> None:
    """0.1 s at 1 answer, 0.4 s at 13: 8 answers take 0.1 + 0.3 x 7/12 s a token, whatever they
    read."""
    table = DecodeTable(
        running=np.array([1.0, 13.0]),
        context=np.array([0.0, 10.0]),
        seconds=np.array([[0.1, 0.1], [0.4, 0.4]]),
    )
    assert step_seconds(changed(BASE, table=table)) == pytest.approx(
        100 * (0.1 + 0.3 * 7 / 12) + TRAIN
    )


def test_a_step_grows_with_what_the_answers_read() -> None:
    """0.1 s + 0.001 s for each token read, from the prompt's 50 to 150 at the end: 100 tokens at
    0.2 s on average; and reading the two prompts of a worker takes 0.02 s a token first."""
    table = DecodeTable(
        running=np.array([1.0]),
        context=np.array([0.0, 400.0]),
        seconds=np.array([[0.1, 0.5]]),
        prefill=0.02,
    )
    lengths = EQUAL.model_copy(update={"prompt": 50})
    scenario = changed(BASE, table=table, lengths=lengths, learner_per_token=0.0)
    assert step_seconds(scenario) == pytest.approx(100 * 0.2 + 2 * 50 * 0.02 + 3)


def test_what_is_spared_is_cut_after_the_step() -> None:
    """5 groups start for 4: the two with 170-token answers of every five are never waited for...
    until a step starts three."""
    lengths = LognormalLengths(mean=100, cv=1, cap=1000, prompt=0)
    on_policy = changed(
        BASE, workers=4, lengths=lengths, prompts_per_step=8, group_size=1, steps=40
    )
    early = simulate(changed(on_policy, oversample=1.25, overdue="evict"))
    assert figures(early)["step_s"] < 0.8 * step_seconds(on_policy)
    counts = early.counts
    assert counts.issued == 40 * 10
    assert counts.cut + counts.stale == 40 * 2
    lengths_trained = sum(step.answer_tokens for step in early.steps) / (40 * 8)
    assert lengths_trained < 0.85 * 100, "short answers are favoured, and the simulation shows it"


def test_weights_that_are_written_into_the_live_engine_stop_it_for_the_transfer() -> None:
    """Rollouts are the bottleneck at 10 s a step: staged bytes cost them the commit alone."""
    link = Publication(transfer=2.0, commit=0.5)
    run_ahead = changed(
        BASE, max_staleness=4, learner_fixed=1.0, learner_per_token=0.0, steps=40, warmup=10
    )
    assert step_seconds(run_ahead) == pytest.approx(10.0, rel=0.02)
    staged = figures(simulate(changed(run_ahead, publication=link)))
    live = figures(simulate(changed(run_ahead, publication=replace(link, staged=False))))
    assert staged["step_s"] == pytest.approx(10.5, rel=0.02)
    assert staged["sync_exposed_rollout_s"] == pytest.approx(0.5, rel=0.05)
    assert live["step_s"] == pytest.approx(12.5, rel=0.02)
    assert live["sync_exposed_rollout_s"] == pytest.approx(2.5, rel=0.05)


def test_every_token_keeps_the_version_that_sampled_it() -> None:
    """One group of 100 tokens is decoded in 10 s while a version comes every 4 s or so, so its
    tokens have several."""
    mixed = changed(
        BASE, workers=1, slots=64, max_staleness=4, learner_fixed=2.0, learner_per_token=0.0
    )
    trace = simulate(mixed)
    for step in trace.steps:
        assert sum(step.lags.values()) == pytest.approx(step.answer_tokens), (
            "no token without a version"
        )
    assert len(trace.steps[-1].lags) > 1
    whole = simulate(changed(mixed, in_flight="finish"))
    assert max(max(step.lags) for step in whole.steps) <= 4


def test_parked_answers_read_their_text_again() -> None:
    table = DecodeTable(
        running=np.array([1.0]), context=np.array([0.0]), seconds=np.array([[0.1]]), prefill=0.001
    )
    scenario = changed(BASE, table=table, max_staleness=2, learner_fixed=1.0, steps=40, warmup=10)
    update, park = (
        figures(simulate(changed(scenario, in_flight=way))) for way in ("update", "park")
    )
    assert park["step_s"] > update["step_s"]
    assert update["sync_exposed_rollout_s"] == 0 < park["sync_exposed_rollout_s"]


def test_a_lost_worker_costs_its_answers_and_the_books_still_balance() -> None:
    scenario = changed(
        BASE, failures=Failures(mtbf=40 / 3600, restart=5), steps=60, max_staleness=1
    )
    trace = simulate(scenario)
    counts = trace.counts
    assert trace.lost > 5 and counts.reissued > 5
    assert counts.trained == 60 * 4
    assert figures(trace)["wasted_tokens"] > 0.02
    assert step_seconds(scenario) > 1.1 * step_seconds(changed(scenario, failures=Failures()))


def test_what_became_too_old_while_its_worker_was_away_is_not_decoded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reissue, lost = Schedule.reissue, []

    def watched(schedule: Schedule[Any], number: int) -> None:
        lost.append(number in schedule.open)
        reissue(schedule, number)

    monkeypatch.setattr(Schedule, "reissue", watched)
    failures = Failures(mtbf=60 / 3600, restart=20)
    trace = simulate(
        changed(BASE, workers=4, failures=failures, steps=60, max_staleness=1, overdue="evict")
    )
    assert all(lost) and 5 < len(lost) == trace.counts.reissued
    assert trace.counts.cut > 5


def books(trace: Simulation) -> None:
    """issued = finished + reissued + cut + running, and nothing trains twice."""
    counts, scenario = trace.counts, trace.scenario
    running = counts.issued - counts.finished - counts.reissued - counts.cut
    ready = counts.finished - counts.trained - counts.dropped - counts.stale
    assert running >= 0 and ready >= 0
    assert counts.trained == scenario.steps * scenario.schedule.prompts_per_step


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(0, 3),
    overdue=st.sampled_from(["wait", "evict"]),
    in_flight=st.sampled_from(["update", "finish", "park"]),
    cv=st.sampled_from([0.0, 1.0, 3.0]),
    mtbf=st.sampled_from([np.inf, 60.0]),
    fixed=st.sampled_from([0.0, 3.0, 30.0]),
    slots=st.sampled_from([1, 4, 64]),
    staged=st.booleans(),
    seed=st.integers(0, 3),
)
def test_no_trained_token_is_older_than_the_bound(
    k: int,
    overdue: str,
    in_flight: str,
    cv: float,
    mtbf: float,
    fixed: float,
    slots: int,
    staged: bool,
    seed: int,
) -> None:
    scenario = changed(
        BASE,
        max_staleness=k,
        overdue=overdue,
        in_flight=in_flight,
        learner_fixed=fixed,
        slots=slots,
        seed=seed,
        lengths=LognormalLengths(mean=100, cv=cv, cap=1000, prompt=0),
        failures=Failures(mtbf=mtbf / 3600, restart=5),
        publication=Publication(transfer=1.0, commit=0.3, staged=staged),
    )
    trace = simulate(scenario)
    assert all(0 <= lag <= k for step in trace.steps for lag in step.lags)
    assert all(sum(step.lags.values()) == pytest.approx(step.answer_tokens) for step in trace.steps)
    books(trace)
    found = figures(trace)
    assert found["step_s"] >= fixed
    assert 0 <= found["slots_used"] <= 1 + 1e-9 and 0 <= found["rollout_idle"] <= 1


@pytest.mark.parametrize(("changes", "seconds"), TOY_CASES.values(), ids=TOY_CASES)
def test_another_simulation_of_the_same_system_gives_the_same_step_time(
    changes: dict[str, Any], seconds: float
) -> None:
    """To 3 %."""
    assert step_seconds(changed(TOY, **changes)) == pytest.approx(seconds, rel=0.03)


def test_with_the_bound_a_step_takes_at_least_the_longest_answer_over_k_plus_1() -> None:
    """What the bound costs: an answer of 546 s must train within k + 1 steps."""
    scenario = changed(TOY, publication=Publication(), max_staleness=2, steps=15, warmup=6)
    assert step_seconds(scenario) == pytest.approx((32768 / 60 + 90) / 3, rel=0.02)


def test_the_same_seed_gives_the_same_run() -> None:
    scenario = changed(
        BASE, lengths=LognormalLengths(mean=100, cv=1, cap=500, prompt=0), max_staleness=1
    )
    assert simulate(scenario).steps == simulate(scenario).steps
    assert simulate(scenario).steps != simulate(changed(scenario, seed=1)).steps
