"""The schedule: hand-worked sequences, and invariant 9 under any order of events."""

from __future__ import annotations

import pytest
from emberl.rollout.schedule import Schedule
from hypothesis import given, settings
from hypothesis import strategies as st


def filled(k: int, per_step: int, **options: object) -> Schedule[str]:
    schedule: Schedule[str] = Schedule(groups_per_step=per_step, max_staleness=k, **options)  # type: ignore[arg-type]
    for number in range(schedule.room):
        schedule.admit(number)
    return schedule


def test_on_policy_waits_for_all_groups_of_the_step_and_admits_none_before_the_next_version() -> (
    None
):
    schedule = filled(0, 3)
    assert (schedule.room, schedule.running) == (0, 3)
    for number in (2, 0):
        schedule.finish(number, f"g{number}", 0)
        assert schedule.take(3) is None
    schedule.finish(1, "g1", 0)
    assert schedule.take(3) == ["g0", "g1", "g2"], "in order of admission, not of completion"
    assert schedule.room == 0, "groups that train hold their place until their version is there"
    assert schedule.close(1) == []
    assert schedule.room == 3


def test_the_learner_takes_what_is_ready_while_a_slow_group_still_has_time() -> None:
    schedule = filled(1, 2)  # 0..3 are admitted at version 0 and may train on versions 0 and 1
    schedule.finish(1, "g1", 0)
    schedule.finish(3, "g3", 0)
    assert schedule.take(2) == ["g1", "g3"], "0 and 2 can both train on version 1"
    schedule.close(1)
    schedule.admit(4)
    schedule.admit(5)
    schedule.finish(4, "g4", 1)
    schedule.finish(5, "g5", 1)
    assert schedule.take(2) is None, "0 and 2 are due now: the learner waits"
    schedule.finish(0, "g0", 0)
    assert schedule.take(2) is None
    schedule.finish(2, "g2", 0)
    assert schedule.take(2) == ["g0", "g2"], "those that are due go first"


def test_a_take_that_would_leave_too_many_due_at_once_waits_before_they_are_due() -> None:
    """One a step, k = 2: 0, 1 and 2 start at version 0. If version 1 took a younger group, two
    would be due at version 2."""
    schedule = filled(2, 1)
    schedule.finish(2, "g2", 0)
    assert schedule.take(1) == ["g2"]
    schedule.close(1)
    schedule.admit(3)
    schedule.finish(3, "g3", 1)
    assert schedule.take(1) is None
    schedule.finish(1, "g1", 0)
    assert schedule.take(1) == ["g1"]


def test_ready_groups_of_which_one_must_become_too_old_do_not_stop_the_learner() -> None:
    """With in_flight=finish a group may start at a version and be sampled by the one before, which
    its worker still served."""
    schedule = filled(1, 1)
    schedule.finish(0, "g0", 0)
    assert schedule.take(1) == ["g0"]
    schedule.close(1)
    schedule.admit(2)
    schedule.finish(1, "g1", 0)
    schedule.finish(2, "g2", 0)
    assert schedule.take(1) == ["g1"], "both are due now, and nothing runs that waiting could bring"
    schedule.close(2)
    schedule.check()
    assert schedule.counts.stale == 1


def test_eviction_throws_away_what_nobody_waits_for() -> None:
    schedule = filled(1, 2, overdue="evict")
    for number in (1, 2):
        schedule.finish(number, f"g{number}", 0)
    assert schedule.take(2) == ["g1", "g2"]
    schedule.close(1)
    schedule.admit(4)
    schedule.admit(5)
    schedule.finish(4, "g4", 1)
    schedule.finish(5, "g5", 1)
    assert schedule.take(2) == ["g4", "g5"]
    assert schedule.close(2) == [0, 3]
    schedule.finish(0, "late", 0)
    assert schedule.ready == 0, "what was cut stays so"
    schedule.check()
    assert (schedule.counts.cut, schedule.counts.trained, schedule.counts.issued) == (2, 4, 6)


def test_a_reissued_group_starts_anew_and_a_dropped_one_makes_room() -> None:
    schedule = filled(1, 1)
    schedule.finish(0, "g0", 0)
    assert schedule.take(1) == ["g0"]
    schedule.close(1)
    schedule.reissue(1)  # started at version 1 now: it may train on version 2 still
    schedule.admit(2)
    schedule.finish(2, "g2", 1)
    schedule.drop(2)
    assert schedule.room == 1
    schedule.admit(3)
    schedule.finish(3, "g3", 1)
    assert schedule.take(1) == ["g3"]
    schedule.check()
    assert (schedule.counts.issued, schedule.counts.reissued, schedule.counts.dropped) == (5, 1, 1)


def test_groups_that_start_with_older_weights_are_fewer_so_that_all_can_train_in_time() -> None:
    """k = 1, two a step. The workers are one version behind: what starts now is due at this
    version."""
    schedule = filled(1, 2)
    for number in range(4):
        schedule.finish(number, f"g{number}", 0)
    assert schedule.take(2) == ["g0", "g1"]
    schedule.close(1, served=0)
    assert schedule.room == 0, "2 and 3 fill version 1, and nothing that starts at 0 may train on 2"
    schedule.served = 1
    assert schedule.room == 2
    schedule.admit(4)
    assert schedule.take(2) == ["g2", "g3"]
    schedule.close(2, served=1)
    assert schedule.room == 1
    schedule.admit(5)
    for number in (4, 5):
        schedule.finish(number, f"g{number}", 1)
    assert schedule.take(2) == ["g4", "g5"]
    assert schedule.counts.stale == 0


def test_books_that_do_not_balance_are_found() -> None:
    schedule = filled(0, 2)
    schedule.counts.issued += 1
    with pytest.raises(AssertionError, match="issues and their ends differ"):
        schedule.check()


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    k=st.integers(0, 4),
    per_step=st.integers(1, 4),
    overdue=st.sampled_from(["wait", "evict"]),
)
def test_no_group_is_ever_too_old_and_the_learner_never_waits_for_ever(
    data: st.DataObject, k: int, per_step: int, overdue: str
) -> None:
    """Whatever finishes in whatever order, gets lost or has no signal, and however far tokens are
    newer than the start."""
    schedule: Schedule[tuple[int, int]] = Schedule(
        groups_per_step=per_step, max_staleness=k, overdue=overdue
    )  # type: ignore[arg-type]
    number, running = 0, {}
    for version in range(8):
        for gone in schedule.close(version):
            del running[gone]
        schedule.check()
        while True:
            for _ in range(schedule.room):
                schedule.admit(number)
                running[number] = version
                number += 1
            taken = schedule.take(per_step)
            if taken is not None:
                break
            assert running, "nothing runs, and still the learner waits"
            chosen = data.draw(st.sampled_from(sorted(running)))
            event = data.draw(st.sampled_from(["finish", "finish", "finish", "lose", "drop"]))
            if event == "lose":
                schedule.reissue(chosen)
                running[chosen] = version
                continue
            oldest = data.draw(st.integers(running.pop(chosen), version))
            schedule.finish(chosen, (chosen, oldest), oldest)
            if event == "drop":
                schedule.drop(chosen)
        assert len(taken) == per_step
        assert all(0 <= version - oldest <= k for _, oldest in taken)
        assert [n for n, _ in taken] == sorted(n for n, _ in taken)
    assert schedule.counts.stale + schedule.counts.cut == 0 or overdue == "evict"
