"""What is said of an actor that failed."""

from __future__ import annotations

import pytest
import ray
from emberl.rollout.actors import cause

PAGE = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.1, ID: 1) where the task was running was 22.36GB / 23.48GB.
Refer to the documentation on how to address the out of memory issue."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.OutOfMemoryError(PAGE), "optim.micro_batch_tokens"),
        (RuntimeError(f"The actor died. {PAGE}"), "memory was nearly full"),
        (
            RuntimeError("Traceback:\n  File x\nValueError: temperature\n\n"),
            "ValueError: temperature",
        ),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_the_cause_of_a_failure_in_one_line(error: Exception, said: str) -> None:
    text = cause(error)
    assert said in text
    assert "\n" not in text
    assert len(text) < 250
