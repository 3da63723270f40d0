"""What `emberl doctor --live` says of a real vLLM: up, and equal to the learner; or why not."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from emberl.rl.watch.doctor_live import judged
from emberl.rl.watch.machine import Machine, State
from emberl.rollout.vllm_backend import compat as vllm_compat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_compat.installed_version() is None,
        reason="vLLM is not installed here; make test-vllm has it",
    ),
]
DEADLINE = 1200.0
"""Seconds: vLLM's three processes import for a minute of processor time, which others may want."""


def tried(**engine_args: Any) -> dict[str, Any]:
    order = {
        "device": "cpu", "name": "vllm", "dtype": "float32", "engine_args": engine_args,
        "deadline": DEADLINE,
    }  # fmt: skip
    return Machine().live("engine", order, DEADLINE, os.environ)


def test_an_engine_is_up_and_gives_the_learners_probabilities() -> None:
    """vLLM's workers are spawned from the process that the doctor starts, and import its file."""
    found = tried()
    lines = list(judged(found, "vllm", DEADLINE))
    assert [line.state for line in lines] == [State.OK] * 2, [str(line) for line in lines]
    assert found["tokens"] == 640 and found["training/rollout_probs_diff_max"] < 1e-4, found


def test_an_engine_that_cannot_start_says_why() -> None:
    [line] = judged(tried(kv_cache_memory_bytes=4096), "vllm", DEADLINE)
    assert line.state is State.ERROR
    words = (
        r"vllm did not start: EngineLostError: vLLM did not start: (\(EngineCore pid=\d+\) )?"
        r"ValueError: (No available memory for the cache|To serve at least)"
    )
    assert re.match(words, line.text), line.text
