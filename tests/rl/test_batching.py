"""Micro-batch plans: every sequence exactly once, equal passes on all ranks, budgets kept."""

from __future__ import annotations

from emberl.rl.learner.batching import plan_micro_batches
from hypothesis import given
from hypothesis import strategies as st


def test_hand_made_plan() -> None:
    # Sorted lengths 9 8 4 4 2 under 18 padded tokens: [9 8] = 18, [4 4 2] = 12; two passes, and no smaller budget does it.
    assert plan_micro_batches([4, 9, 2, 8, 4], world=1, budget=18) == [[(1, 3), (0, 4, 2)]]


def test_passes_are_evened_out() -> None:
    # Ten equal sequences of 4 under 36 tokens would be 9 + 1; with two passes 5 + 5 is the smallest largest pass.
    assert [len(m) for m in plan_micro_batches([4] * 10, world=1, budget=36)[0]] == [5, 5]


def test_two_ranks_share_one_pass_each() -> None:
    first, second = plan_micro_batches([6, 1, 1, 1, 1, 1, 1], world=2, budget=1000)
    assert (first, second) == ([(0,)], [(1, 2, 3, 4, 5, 6)])


def test_a_rank_without_work_keeps_step() -> None:
    assert plan_micro_batches([5], world=3, budget=10) == [[(0,)], [()], [()]]
    assert plan_micro_batches([], world=2, budget=10) == [[()], [()]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world=st.integers(1, 4),
    budget=st.integers(1, 200),
)
def test_every_sequence_once_within_the_budget(lengths: list[int], world: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, world, budget)
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    for micro in (m for rank in plan for m in rank if m):
        padded = len(micro) * max(lengths[i] for i in micro)
        assert padded <= max(budget, max(lengths))
