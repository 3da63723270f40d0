"""Threads by the work of a step, and given back afterwards."""

from __future__ import annotations

import pytest
import torch
from emberl.rollout.embedded.engine import SHARE, at_most, worth


@pytest.mark.parametrize(
    ("weights", "rows", "most", "expected"),
    [
        (600_000, 128, 2, 1),  # 77 million multiply-adds: the quickstart's model
        (SHARE, 1, 64, 1),
        (SHARE // 8, 24, 64, 3),
        (500_000_000, 64, 16, 16),
        (500_000_000, 64, 200, 59),
        (1, 1, 1, 1),
    ],
)
def test_a_thread_for_so_much_work(weights: int, rows: int, most: int, expected: int) -> None:
    assert worth(weights, rows, most) == expected


def test_the_callers_threads_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with at_most(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
