"""The critic's loss by hand and against autograd, and what a KL penalty takes from rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emberl.rl.algorithm.advantages import kl_estimate
from emberl.rl.algorithm.surrogates import value_loss
from torch import Tensor

VALUES = torch.tensor([1.0, 1.0, 0.2, 0.0], dtype=torch.float64)
OLD = torch.tensor([0.3, 0.9, 0.3, 1.0], dtype=torch.float64)
TARGETS = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64)


def test_by_hand() -> None:
    """Clipped to within .5 of the old value: .8, 1.0, .2, .5. The first and last are worse
    clipped."""
    loss, slope, clipped = value_loss(VALUES, OLD, TARGETS, clip=0.5)
    expected = torch.tensor([0.02, 0.5, 0.02, 0.125], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, torch.tensor([0.0, -1.0, 0.2, 0.0], dtype=torch.float64))
    assert clipped.tolist() == [1, 0, 0, 1]


def test_without_a_clip_it_is_half_the_square() -> None:
    loss, slope, clipped = value_loss(VALUES, OLD, TARGETS, clip=None)
    torch.testing.assert_close(loss, 0.5 * (VALUES - TARGETS) ** 2)
    torch.testing.assert_close(slope, VALUES - TARGETS)
    assert not clipped.any()


def test_the_derivative_is_autograds() -> None:
    torch.manual_seed(0)
    values, old, targets = (torch.randn(500, dtype=torch.float64) for _ in range(3))

    def plain(v: Tensor) -> Tensor:
        held = old + (v - old).clamp(-0.5, 0.5)
        return 0.5 * torch.max((v - targets) ** 2, (held - targets) ** 2)

    leaf = values.clone().requires_grad_(True)
    plain(leaf).sum().backward()
    loss, slope, _ = value_loss(values, old, targets, clip=0.5)
    torch.testing.assert_close(loss, plain(values))
    torch.testing.assert_close(slope, leaf.grad)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [0.1065307, 0.7182818, 0.0]),
        ("k3+", [0.1065307, 0.7182818, 0.0]),
    ],
)
def test_the_kl_estimates_as_numbers(estimator: str, expected: list[float]) -> None:
    """exp(-0.5) - 1 + 0.5 = 0.1065307, exp(1) - 1 - 1 = 0.7182818."""
    found = kl_estimate(np.array([-1.0, -3.0, -2.0]), np.array([-1.5, -2.0, -2.0]), estimator)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-7)
