"""Log-probs of a probe, engines beside learners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from emberl.rl.weights.probe import as_batch, check_probe, probe_ids, tolerance_of
from emberl.rollout.actors import ActorLostError
from emberl.rollout.samples import Prompt

EXPECTED = np.array([-1.0, -2.0, -0.5, -4.0], np.float32)


@dataclass
class Prompts:
    def train(self, position: int) -> Prompt:
        return Prompt(id=str(position), token_ids=(position, 7, 8), answer="", source="")


def test_probe_tokens_are_those_of_the_first_prompts() -> None:
    source: Any = Prompts()
    assert probe_ids(source, 7) == (0, 7, 8, 1, 7, 8, 2)


def test_all_but_the_first_token_count() -> None:
    batch = as_batch((5, 6, 7))
    assert batch.loss_mask_T.tolist() == [False, True, True] and batch.num_loss_tokens == 2
    assert batch.token_ids_T.tolist() == [5, 6, 7] and batch.positions_T.tolist() == [0, 1, 2]


def never(worker: int) -> Any:
    raise AssertionError(f"worker {worker} was loaded anew")


def test_figures_are_of_the_worker_that_differs_most() -> None:
    found = [EXPECTED + np.array([0, 0, 0, 0.004], np.float32), EXPECTED + np.float32(0.002)]
    figures = check_probe(EXPECTED, found, never, tolerance=0.01, version=3)
    assert figures["sync/probe_diff_max"] == pytest.approx(0.004, rel=1e-3)
    assert figures["sync/probe_diff_mean"] == pytest.approx(0.002, rel=1e-3)
    assert figures["sync/reloads"] == 0


def test_a_worker_that_differs_is_loaded_anew_once() -> None:
    loaded: list[int] = []

    def reload(worker: int) -> Any:
        loaded.append(worker)
        return EXPECTED

    figures = check_probe(EXPECTED, [EXPECTED, EXPECTED + 1], reload, tolerance=0.01, version=3)
    assert loaded == [1] and figures == {"sync/probe_diff_mean": 0, "sync/probe_diff_max": 0, "sync/reloads": 1}


@pytest.mark.parametrize("wrong", [EXPECTED + np.array([0, 0, 0.1, 0]), np.full(4, math.nan, np.float32)])
def test_a_worker_that_differs_still_ends_the_run(wrong: Any) -> None:
    with pytest.raises(ActorLostError, match=r"worker 0 does not compute with version 3 .* 4 tokens differ"):
        check_probe(EXPECTED, [wrong], lambda worker: wrong, tolerance=0.01, version=3)


def test_tolerance_follows_the_dtype() -> None:
    assert tolerance_of("float32") == 0.01 and tolerance_of("bfloat16") == tolerance_of("auto") == 0.1
