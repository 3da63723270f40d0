"""Invariant 2: loss and gradients do not depend on micro-batches, on packing or on the number of learner ranks (float64)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emberl.rl.data_settings import TinyConfig

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("gradients.py")
Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from emberl.rl.tiny import make_tiny

    settings = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    return make_tiny(tmp_path_factory.mktemp("model"), settings, seed=5)


def gradients(model: Path, out: Path, world: int, budget: int, packing: str) -> Found:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), str(port), str(model), str(out), str(budget), packing],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    with np.load(out) as found:
        return dict(found)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One rank, one padded pass."""
    return gradients(model, tmp_path_factory.mktemp("whole") / "whole.npz", 1, 1000, "off")


@pytest.mark.parametrize(
    ("world", "budget", "packing"),
    [(1, 17, "off"), (2, 24, "off"), (2, 20, "on"), (4, 24, "off")],
)
def test_any_split_gives_the_same(
    model: Path, whole: Found, tmp_path: Path, world: int, budget: int, packing: str
) -> None:
    split = gradients(model, tmp_path / "split.npz", world, budget, packing)
    assert whole.keys() == split.keys()
    assert len(whole) == 12 * 4 + 5, "every loss under every aggregation, the critic, and four rows of tokens"
    for name, expected in whole.items():
        scale = np.abs(expected).max()
        assert scale > 0, f"{name} is 0 throughout"
        relative = 1e-10 if expected.dtype == np.float64 else 1e-6  # rows of tokens are float32
        np.testing.assert_allclose(split[name], expected, rtol=0, atol=relative * scale, err_msg=name)


def test_the_reference_stays_where_the_policy_was(whole: Found) -> None:
    np.testing.assert_array_equal(whole["logprobs of the reference"], whole["logprobs"])
    assert np.abs(whole["logprobs after a step"] - whole["logprobs"]).max() > 1e-4
