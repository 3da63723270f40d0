"""Divergences against hand-computed numbers, and against plain autograd in float64 over whole
logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from emberl.kernels.loss import divergence as divergence_module
from emberl.kernels.loss.divergence import (
    Teaching,
    divergence,
    linear_divergence,
    logits_divergence,
)
from torch import Tensor

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


@pytest.mark.parametrize(
    ("kind", "beta", "value", "slope"),
    [
        # policy (1/2, 1/2), teacher (1/4, 3/4)
        ("forward_kl", 0.5, 0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.25),
        ("reverse_kl", 0.5, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.25 * math.log(3)),
        # their middle is (3/8, 5/8)
        (
            "jsd",
            0.5,
            0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
            + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)),
            0.5 * 0.25 * math.log(5 / 3),
        ),
    ],
)
def test_two_entries_by_hand(kind: Any, beta: float, value: float, slope: float) -> None:
    """The derivative of D by the first logit is p0 p1 (D0 - D1) with Di = dD/dpi."""
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    teaching = Teaching(logp=teacher, ids=None, weights=torch.ones(1), kind=kind, beta=beta)
    found, by_logits = divergence(torch.zeros(1, 2, dtype=torch.float64), teaching)
    assert float(found) == pytest.approx(value, abs=1e-15)
    assert by_logits[0].tolist() == pytest.approx([slope, -slope], abs=1e-15)


def plain(logits: Tensor, teacher: Tensor, kind: str, beta: float, ids: Tensor | None) -> Tensor:
    """[n] by the definition, with probabilities, entries outside `ids` [n, k] summed."""
    p, q = logits.softmax(-1), teacher.softmax(-1)
    if ids is not None:
        p, q = ((x.gather(1, ids)) for x in (p, q))
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)


@pytest.mark.parametrize("top_k", [None, 1, 4, 10])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_are_those_of_plain_autograd(
    kind: Any,
    beta: float,
    top_k: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    n, width, vocabulary = 7, 5, 11
    hidden, weight, bias = (
        (0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()
        for shape in ((n, width), (vocabulary, width), (vocabulary,))
    )
    teacher, weights = torch.randn(n, vocabulary, dtype=torch.float64), torch.rand(n).double()
    ids = None if top_k is None else teacher.topk(top_k).indices
    logp = teacher.log_softmax(-1)
    teaching = Teaching(
        logp=logp if ids is None else logp.gather(1, ids),
        ids=ids,
        weights=weights,
        kind=kind,
        beta=beta,
    )
    raw = (hidden @ weight.t() + bias) * 1.5
    logits = (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / 0.7
    expected = plain(logits, teacher, kind, beta, ids)
    wanted = torch.autograd.grad((expected * weights).sum() * 2.5, [hidden, weight, bias])
    monkeypatch.setattr(divergence_module, "CHUNK_BYTES", 3 * vocabulary * 8)  # three tokens
    total, values = linear_divergence(
        hidden, weight, teaching, bias=bias, temperature=0.7, logit_scale=1.5, softcap=softcap
    )
    found = torch.autograd.grad(total * 2.5, [hidden, weight, bias])
    torch.testing.assert_close(values, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-9, atol=1e-12)
    for ours, plainly in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plainly, rtol=1e-8, atol=1e-11)
    leaf = logits.detach().requires_grad_()
    whole, again = logits_divergence(leaf, teaching)
    torch.testing.assert_close(again, expected.detach(), rtol=1e-9, atol=1e-12)
    by_logits = torch.autograd.grad(whole, leaf)[0]
    plainly = torch.autograd.grad((plain(leaf, teacher, kind, beta, ids) * weights).sum(), leaf)[0]
    torch.testing.assert_close(by_logits, plainly, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_extreme_distributions_stay_finite(kind: Any, beta: float) -> None:
    """Each sure of another entry, and a teacher that rules entries out."""
    logits = torch.tensor([[300.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 90.0, 0.0]])
    teacher = torch.tensor([[-300.0, 0.0, -300.0], [0.0, -torch.inf, -torch.inf], [0.0, 0.0, 9.0]])
    for ids in (None, torch.tensor([[0], [0], [2]])):
        logp = teacher.log_softmax(-1)
        logp = logp if ids is None else logp.gather(1, ids)
        teaching = Teaching(logp=logp, ids=ids, weights=torch.ones(3), kind=kind, beta=beta)
        value, slope = divergence(logits, teaching)
        assert torch.isfinite(value).all() and torch.isfinite(slope).all()
        assert (value >= -1e-6).all()


@pytest.mark.parametrize("ids", [None, "half"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_distribution_has_no_divergence_from_itself(
    kind: Any, beta: float, ids: str | None
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.float64)
    logp, some = logits.log_softmax(-1), logits.topk(3).indices
    teaching = Teaching(
        logp=logp if ids is None else logp.gather(1, some),
        ids=None if ids is None else some,
        weights=torch.ones(4),
        kind=kind,
        beta=beta,
    )
    value, slope = divergence(logits, teaching)
    assert value.abs().max() < 1e-15 and slope.abs().max() < 1e-15
