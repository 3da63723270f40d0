"""Invariant 2: loss and gradients do not depend on micro-batches or on the number of learner ranks (float64)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emberl.rl.data_settings import TinyConfig

SCRIPT = Path(__file__).with_name("gradients.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from emberl.rl.tiny import make_tiny

    settings = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    return make_tiny(tmp_path_factory.mktemp("model"), settings, seed=5)


def gradients(model: Path, out: Path, world: int, budget: int) -> dict[str, np.ndarray]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(SCRIPT),
                str(rank),
                str(world),
                str(port),
                str(model),
                str(out),
                str(budget),
                "float64",
            ],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    with np.load(out) as found:
        return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "budget"), [(1, 17), (2, 1000), (2, 20), (4, 24)])
def test_any_split_gives_the_same_gradient(model: Path, tmp_path: Path, world: int, budget: int) -> None:
    whole = gradients(model, tmp_path / "whole.npz", 1, 1000)
    split = gradients(model, tmp_path / "split.npz", world, budget)
    assert whole.keys() == split.keys()
    assert len(whole) == 2 * 11 + 2 + 1  # 11 tensors a layer, the embedding and the last norm, and the loss
    for name, expected in whole.items():
        scale = np.abs(expected).max()
        assert scale > 0, f"{name} has no gradient at all"
        np.testing.assert_allclose(split[name], expected, rtol=0, atol=1e-10 * scale, err_msg=name)
