"""Who decodes what: hand-worked deals, and the same as a search through all workers under any order
of events."""

from __future__ import annotations

from dataclasses import dataclass, field

from emberl.rollout.schedule import Dispatch
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass(eq=False)
class Group:
    samples: int
    cost: float
    name: int = field(default=0)


def test_equal_groups_are_dealt_in_turn_and_costly_ones_to_whoever_has_least() -> None:
    dispatch: Dispatch[Group] = Dispatch(3)
    groups = [Group(8, 80.0, i) for i in range(4)]
    dispatch.backlog.extend(groups)
    assert dispatch.deal() == {0: [groups[0], groups[3]], 1: [groups[1]], 2: [groups[2]]}
    long, short = Group(8, 300.0), Group(8, 10.0)
    dispatch.backlog.extend([long, short, Group(8, 80.0)])
    shares = dispatch.deal()
    assert (shares[1][0], shares[2][0]) == (long, short)
    assert 2 in shares and len(shares[2]) == 2, "160 tokens on worker 0, 380 on 1, 90 on 2"


def test_who_has_enough_answers_waits_and_an_idle_worker_takes_a_group_of_any_size() -> None:
    dispatch: Dispatch[Group] = Dispatch(2, max_samples=4)
    first, second, third = (Group(9, 9.0) for _ in range(3))
    dispatch.backlog.extend([first, second, third])
    assert dispatch.deal() == {0: [first], 1: [second]}
    assert list(dispatch.backlog) == [third] and dispatch.deal() == {}
    dispatch.set_up(1, False)
    dispatch.release(1, second)
    assert dispatch.deal() == {}, "worker 1 is being replaced"
    dispatch.set_up(1, True)
    assert dispatch.deal() == {1: [third]}
    assert dispatch.remove(lambda group: group is third) == {1: [third]}
    assert list(dispatch.clear()) == [first] and dispatch.jobs == [{}, {}]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), workers=st.integers(1, 5), most=st.sampled_from([None, 1, 8, 20]))
def test_a_deal_is_that_of_a_search_through_all_workers(
    data: st.DataObject, workers: int, most: int | None
) -> None:
    dispatch: Dispatch[Group] = Dispatch(workers, most)
    has: list[list[Group]] = [[] for _ in range(workers)]
    up = [True] * workers
    for _ in range(data.draw(st.integers(1, 40))):
        event = data.draw(st.sampled_from(["add", "add", "release", "up"]))
        if event == "add":
            cost = data.draw(st.sampled_from([0.0, 10.0, 10.0, 30.0]))
            dispatch.backlog.append(Group(data.draw(st.integers(1, 9)), cost))
        elif event == "up":
            worker = data.draw(st.integers(0, workers - 1))
            up[worker] = not up[worker]
            dispatch.set_up(worker, up[worker])
        elif any(has):
            worker = data.draw(st.sampled_from([i for i, own in enumerate(has) if own]))
            dispatch.release(worker, has[worker].pop(0))
        expected: dict[int, list[Group]] = {}
        for job in dispatch.backlog:
            free = [
                i
                for i, own in enumerate(has)
                if up[i] and (most is None or not own or sum(g.samples for g in own) < most)
            ]
            if not free:
                break
            worker = min(free, key=lambda i: (sum(g.cost for g in has[i]), i))
            has[worker].append(job)
            expected.setdefault(worker, []).append(job)
        assert dispatch.deal() == expected
        assert [list(jobs) for jobs in dispatch.jobs] == has
