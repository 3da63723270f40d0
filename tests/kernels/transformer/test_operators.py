"""The CPU's parts of a layer: shared out over threads as on one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emberl.kernels.transformer import operators
from torch import Tensor


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_rows_shared_out_over_threads_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().requires_grad_()

    x, y, weight = drawn(301, 64), drawn(301, 64), drawn(64)
    gate, up, down = drawn(96, 64), drawn(96, 64), drawn(64, 96)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        total, normed = operators.add_rms_norm(operators.rms_norm(x, weight, 1e-6), y, weight, 1e-6)
        out = operators.gated_mlp(normed, gate, up, down) + total
        found.append(
            [out, *torch.autograd.grad(out.float().square().sum(), (x, y, weight, gate, up, down))]
        )
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=0.02, atol=0.01 * float(one.abs().max()))
