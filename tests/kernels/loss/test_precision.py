"""bfloat16 and float32 against float64 on logits as a trained model has them, and memory."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest
import torch
from emberl.kernels.loss import fused_loss
from forced_loss import linear_logprob, linear_loss
from torch import Tensor

N, H, V = 384, 128, 8000


def planted(kit: SimpleNamespace) -> SimpleNamespace:
    """Hidden states with a peak of 5 to 25 at most targets, so that log-probs reach from -10 to
    -1e-8."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=g) * 0.5
    targets = torch.randint(0, V, (N,), generator=g)
    peak = torch.rand(N, 1, generator=g) * 20 + 5
    hidden = torch.randn(N, H, generator=g) * 0.2 + weight[targets] * peak / (H * 0.25)
    weight, hidden = weight.bfloat16(), hidden.bfloat16()
    case = kit.make(4, 4, 4)
    case = type(case)(
        hidden=hidden.double(), weight=weight.double(), targets=targets, bias=None, options={}
    )
    loss = kit.clipped(case, noise=0.05)
    return SimpleNamespace(case=case, loss=loss)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(
    "tile", [torch.bfloat16, torch.float32], ids=["bf16 products", "fp32 products"]
)
@pytest.mark.parametrize("chunk", [1 << 30, V * 2 * 100], ids=["one chunk", "several chunks"])
def test_bfloat16_keeps_its_digits(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chunk: int, tile: torch.dtype
) -> None:
    monkeypatch.setattr(fused_loss, "product_dtype", lambda dtype, device: tile)
    p = planted(kit)
    logp, _ = kit.oracle(p.case, p.case.hidden, p.case.weight, None)
    _, (dh, dw) = kit.oracle_gradients(p.case, p.loss)
    hidden, weight, _ = p.case.to(torch.bfloat16).operands()
    value, stats, _ = linear_loss(
        hidden,
        weight,
        p.case.targets,
        p.loss,
        shift=p.loss.old,
        chunk_bytes=chunk,
        backend="chunked",
    )
    value.backward()
    error = (stats.logp - logp).abs()
    assert error.mean() <= (1e-4 if tile == torch.bfloat16 else 1e-6) and stats.logp.max() <= 0
    assert relative(hidden.grad, dh) <= 2.5e-3 and relative(weight.grad, dw) <= 2.5e-3
    rows = (hidden.grad - dh).norm(dim=1)[dh.norm(dim=1) > 0] / dh.norm(dim=1)[dh.norm(dim=1) > 0]
    assert rows.quantile(0.99) <= 0.02
    sure = logp > -1e-4  # 1 - p keeps its relative accuracy where p rounds to 1
    assert sure.any()
    assert (stats.one_minus_p[sure] / -torch.expm1(logp[sure]) - 1).abs().max() < 0.02


def test_the_bound_would_catch_rounded_logits(kit: SimpleNamespace) -> None:
    p = planted(kit)
    logp, _ = kit.oracle(p.case, p.case.hidden, p.case.weight, None)
    logits = (p.case.hidden.bfloat16() @ p.case.weight.bfloat16().T).float()
    rounded = logits.log_softmax(-1)[torch.arange(N), p.case.targets]
    assert (rounded - logp).abs().mean() > 1e-3


def test_float32_and_the_entropy_gradient(kit: SimpleNamespace) -> None:
    p = planted(kit)
    loss = kit.Clipped(old=p.loss.old, advantage=p.loss.advantage, weight=p.loss.weight, bonus=0.5)
    _, (dh, dw) = kit.oracle_gradients(p.case, loss)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        hidden, weight, _ = p.case.to(dtype).operands()
        linear_loss(hidden, weight, p.case.targets, loss, shift=loss.old, backend="chunked")[
            0
        ].backward()
        assert relative(hidden.grad, dh) <= bound and relative(weight.grad, dw) <= bound


def test_unchanged_weights_and_the_same_shift_give_identical_logprobs(kit: SimpleNamespace) -> None:
    p = planted(kit)
    small = p.case.to(torch.bfloat16)
    with torch.no_grad():
        old = linear_logprob(
            small.hidden, small.weight, small.targets, shift=p.loss.old, backend="chunked"
        ).logp
    hidden, weight, _ = small.operands()
    _, stats, _ = linear_loss(
        hidden, weight, small.targets, p.loss, shift=p.loss.old, backend="chunked"
    )
    assert torch.equal(stats.logp, old)


def test_float16_and_float64_go_to_the_reference(kit: SimpleNamespace) -> None:
    case = kit.make(v=300).to(torch.float16)
    stats = linear_logprob(case.hidden, case.weight, case.targets)
    reference = linear_logprob(case.hidden, case.weight, case.targets, backend="reference")
    assert torch.equal(stats.logp, reference.logp)


@pytest.mark.slow
def test_a_large_vocabulary_stays_within_its_memory() -> None:
    n, h, v = 1024, 64, 200_000
    hidden = torch.randn(n, h).bfloat16().requires_grad_()
    weight = torch.randn(v, h).bfloat16().requires_grad_()
    targets = torch.randint(0, v, (n,))
    chunk = 64 << 20
    linear_logprob(hidden[:8], weight, targets[:8], backend="chunked", chunk_bytes=chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logp = linear_logprob(hidden, weight, targets, backend="chunked", chunk_bytes=chunk).logp
    logp.sum().backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    gradient = v * h * 2
    # the logits alone would be 400 MiB
    assert peak <= (gradient + 2 * gradient + chunk) * 1.1 + (32 << 20)
