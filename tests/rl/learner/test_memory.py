"""How many tokens a pass holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from emberl.kernels import platform
from emberl.rl.learner import memory
from emberl.rl.learner.memory import Need, tokens_that_fit

NEED = Need(state=1000, loss=200, token=10)


@pytest.mark.parametrize(
    ("free", "largest", "expected"),
    [
        (10**9, 2048, 2048),  # more than enough
        ((1200 + 5120) * 10 // 8, 2048, 512),  # 80 % of it: state, loss and 512 tokens
        # one byte short of that, rounded down to whole multiples
        ((1200 + 5119) * 10 // 8, 2048, 256),
        # less than the smallest pass, but the longest sequence fits
        ((1200 + 2560) * 10 // 8 - 1, 2048, 256),
    ],
)
def test_as_many_tokens_as_the_memory_holds(free: int, largest: int, expected: int) -> None:
    assert tokens_that_fit(NEED, free, longest=100, largest=largest) == expected


def test_a_cpus_pass_keeps_no_more_than_is_worth_its_room() -> None:
    million = Need(state=0, loss=0, token=1 << 20)  # a MiB a token
    for device, given, expected in (
        ("cpu", 8192, 512),  # of 600 MiB, in whole multiples of 256
        ("cpu", 300, 300),
        ("cuda", 8192, 8192),
    ):
        assert memory.worth_keeping(million, given, platform.named(device)) == expected
    assert memory.worth_keeping(NEED, 16384, platform.named("cpu")) == 16384, "a small model's"
    huge = Need(state=0, loss=0, token=1 << 30)
    assert memory.worth_keeping(huge, 8192, platform.named("cpu")) == memory.SMALLEST


def test_kept_scores_grow_with_the_longest_sequence() -> None:
    squares = Need(state=0, loss=0, token=10, square=1)
    assert tokens_that_fit(squares, (10 + 90) * 512 * 10 // 8, longest=90, largest=4096) == 512


def test_what_cannot_fit_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        ValueError,
        match=r"one sequence of 8192 tokens.*gradient_checkpointing.*max_response_length",
    ):
        tokens_that_fit(NEED, 10_000, longest=8192, largest=16384)
    # whoever gives a number of tokens has it, as long as the longest sequence fits at all
    memory.check_longest(NEED, 1200 + 81_920, 8192)
    with pytest.raises(ValueError, match=r"one sequence of 8192 tokens"):
        memory.check_longest(NEED, 1200 + 81_919, 8192)


def test_a_control_group_leaves_what_its_limit_leaves(tmp_path: Path) -> None:
    assert memory._control_group(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._control_group(tmp_path) == 450
