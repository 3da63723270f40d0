"""The fused loss on a card, as `auto` runs it there, against the float64 oracle: what an
interpreter cannot show."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emberl.kernels.loss.head import add_product
from forced_loss import linear_logprob, linear_loss
from torch import Tensor

CARD = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CARD.type == "cpu", reason="there is no accelerator"),
]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).norm() / b.norm())


@pytest.mark.parametrize("bonus", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("tokens", [300, 90], ids=["one chunk", "several chunks"])
def test_float32_equals_the_oracle(
    kit: SimpleNamespace, tokens: int, head_options: Any, bonus: float
) -> None:
    case = kit.make(n=300, h=64, v=1000, **head_options(300))
    kit.check_float32(case, bonus, CARD, chunk_bytes=4 * 1000 * tokens)


@pytest.mark.parametrize("tokens", [4096, 512], ids=["one chunk", "several chunks"])
def test_bfloat16_keeps_its_digits(kit: SimpleNamespace, tokens: int) -> None:
    """The bounds of `test_precision`; a weight's gradient is as good from eight chunks as from one,
    because nothing is rounded between them."""
    n, h, v = 4096, 256, 8000
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(v, h, generator=g) * h**-0.5).bfloat16()
    targets = torch.randint(0, v, (n,), generator=g)
    peak = torch.rand(n, 1, generator=g) * 20 + 5
    hidden = (weight[targets].float() * peak + torch.randn(n, h, generator=g) * 0.5).bfloat16()
    case = kit.make(4, 4, 4)
    case = type(case)(
        hidden=hidden.double(), weight=weight.double(), targets=targets, bias=None, options={}
    )
    loss = kit.clipped(case, noise=0.05)
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    _, (dh, dw) = kit.oracle_gradients(case, loss)
    there = case.to(torch.bfloat16).on(CARD)
    x, w, _ = there.operands()
    got, stats, _ = linear_loss(
        x,
        w,
        there.targets,
        kit.moved(loss, CARD),
        shift=loss.old.to(CARD),
        chunk_bytes=2 * v * tokens,
    )
    got.backward()
    assert (stats.logp.cpu() - logp).abs().mean() <= 1e-4 and stats.logp.max() <= 0
    assert relative(x.grad, dh) <= 2.5e-3 and relative(w.grad, dw) <= 2.0e-3
    norms = dh.norm(dim=1)
    rows = (x.grad.cpu().double() - dh).norm(dim=1)[norms > 0] / norms[norms > 0]
    assert rows.quantile(0.99) <= 0.02


def test_a_product_onto_a_wide_result_is_not_rounded_between() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(64, 512, generator=g).bfloat16(),
        torch.randn(512, 96, generator=g).bfloat16(),
    )
    start = torch.randn(64, 96, generator=g)
    exact = start.double() + a.double() @ b.double()
    out = start.to(CARD)
    add_product(out, a.to(CARD), b.to(CARD))
    assert relative(out, exact) < 1e-6
    add_product(out, a.to(CARD), b.to(CARD), fresh=True)
    assert relative(out, a.double() @ b.double()) < 1e-6


def test_a_useless_shift_is_recomputed(kit: SimpleNamespace) -> None:
    case = kit.make(n=200, h=32, v=700)
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    there = case.to(torch.bfloat16).on(CARD)
    exact, _ = kit.oracle(
        case.to(torch.bfloat16), *(x.cpu().double() for x in (there.hidden, there.weight)), None
    )
    stats = linear_logprob(there.hidden, there.weight, there.targets, shift=(logp - 90).to(CARD))
    # of targets that nobody expected, whose likelier rivals' logits are rounded at 0.004
    assert (stats.logp.cpu() - exact).abs().mean() <= 2e-3


def test_memory_stays_within_the_tile_and_the_gradient(kit: SimpleNamespace) -> None:
    n, h, v = 4096, 512, 100_000
    case = kit.make(n, h, v)
    there = (
        replace(case, hidden=case.hidden * 0.05).to(torch.bfloat16).on(CARD)
    )  # log-probs near -12, as the shift says
    loss = kit.Clipped(
        old=torch.full((n,), -12.0, device=CARD),
        advantage=torch.ones(n, device=CARD),
        weight=torch.ones(n, device=CARD),
    )
    x, w, _ = there.operands()
    card = torch.get_device_module(CARD)
    card.reset_peak_memory_stats()
    before = card.memory_allocated()
    linear_loss(x, w, there.targets, loss, shift=loss.old, chunk_bytes=256 << 20)[0].backward()
    gradient = 2 * v * h
    limit = 1.1 * (gradient + 2 * gradient + (256 << 20)) + (64 << 20)
    assert card.max_memory_allocated() - before <= limit  # the logits alone would be 820 MB
