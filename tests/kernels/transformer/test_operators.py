"""The CPU's parts of a layer: shared out over threads as on one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
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
        out = operators.add_norm_mlp(
            operators.rms_norm(x, weight, 1e-6), y, weight, 1e-6, gate, up, down
        )
        found.append(
            [out, *torch.autograd.grad(out.float().square().sum(), (x, y, weight, gate, up, down))]
        )
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=0.02, atol=0.01 * float(one.abs().max()))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_and_its_readers_have_plain_torchs_results_and_gradients(biased: bool) -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, weight = drawn(300, 64), drawn(64)
    layers = [(drawn(out, 64) / 8, drawn(out) if biased else None) for out in (96, 32, 32)]
    slopes = [drawn(300, len(w)) for w, _ in layers]
    results = []
    for wide in (False, True):
        given = [x, weight, *(t for layer in layers for t in layer if t is not None)]
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in given]
        rest = iter(leaves[2:])
        pairs = [(next(rest), next(rest) if biased else None) for _ in layers]
        if wide:
            normed = F.rms_norm(leaves[0], (64,), leaves[1], 1e-6)
            outs = tuple(F.linear(normed, w, b) for w, b in pairs)
        else:
            outs = operators.norm_linears(leaves[0], leaves[1], 1e-6, *pairs)
        total = sum((o * s).sum() for o, s in zip(outs, slopes, strict=True))
        assert isinstance(total, Tensor)
        results.append([*outs, *torch.autograd.grad(total, leaves)])
    for own, exact in zip(*results, strict=True):
        distance = (own.double() - exact).norm() / exact.norm()
        assert distance < 2**-7, tuple(exact.shape)


def test_rows_normed_again_are_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(257, 576, generator=generator) * 30).bfloat16()
    weight = torch.randn(576, generator=generator).bfloat16()
    first, scales = operators._normed(x, weight, 1e-6)
    assert torch.equal(operators._normed_again(x, weight, scales), first)


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
