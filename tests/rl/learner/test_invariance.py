"""Invariant 2: loss and gradients do not depend on micro-batches, on packing or on the number of
learner ranks (float64)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emberl.rl.config.tiny import TinyConfig

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("gradients.py")
Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from emberl.rl.data.tiny import make_tiny

    settings = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    return make_tiny(tmp_path_factory.mktemp("model"), settings, seed=5)


SPLITS = ("1-17-off", "2-24-off", "2-20-on", "4-24-off")
"""Ranks, tokens of a pass, packing."""


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What one rank says in one padded pass, `whole`, and what others say."""
    folder, whole = tmp_path_factory.mktemp("gradients"), "1-1000-off"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), str(folder), whole, *SPLITS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        "whole" if name == whole else name: dict(np.load(folder / f"{name}.npz"))
        for name in (whole, *SPLITS)
    }


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_gives_the_same(found: dict[str, Found], name: str) -> None:
    whole, split = found["whole"], found[name]
    assert whole.keys() == split.keys()
    assert len(whole) == 12 * 4 + 5, (
        "every loss under every aggregation, the critic, and four rows of tokens"
    )
    for row, expected in whole.items():
        scale = np.abs(expected).max()
        assert scale > 0, f"{row} is 0 throughout"
        relative = 1e-10 if expected.dtype == np.float64 else 1e-6  # rows of tokens are float32
        np.testing.assert_allclose(split[row], expected, rtol=0, atol=relative * scale, err_msg=row)


def test_the_reference_stays_where_the_policy_was(found: dict[str, Found]) -> None:
    whole = found["whole"]
    np.testing.assert_array_equal(whole["logprobs of the reference"], whole["logprobs"])
    assert np.abs(whole["logprobs after a step"] - whole["logprobs"]).max() > 1e-4
