"""The CPU's parts of a layer: shared out over threads as on one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from emberl.kernels.transformer import operators
from emberl.kernels.transformer import threads as sharing
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


@pytest.mark.usefixtures("threads")
def test_what_is_shared_out_records_no_graph() -> None:
    """Parts of one result that are written at the same time would record their graphs into it at
    the same time: a step failed, rarely, with "a leaf Variable that requires grad"."""
    torch.set_num_threads(2)
    seen: list[tuple[bool, str]] = []
    inputs = torch.ones(4, requires_grad=True)
    out = torch.empty(4)

    def work(part: slice) -> None:
        out[part].copy_(2 * inputs[part])
        seen.append((torch.is_grad_enabled(), threading.current_thread().name.split("_")[0]))

    with torch.no_grad():  # as in the forward pass of an autograd function
        sharing.over_parts([slice(0, 1), slice(1, 2), slice(2, 4)], work)
    assert seen == [(False, "elements")] * 3
    assert not out.requires_grad and out.tolist() == [2.0] * 4
