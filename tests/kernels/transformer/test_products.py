"""Weight gradients, sums over passes and attention on the CPU, beside plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from emberl.kernels.transformer import attention
from emberl.kernels.transformer.attention_spans import Span, spans_between
from emberl.kernels.transformer.operators import linear, transposed
from emberl.kernels.transformer.sums import add_to
from torch import Tensor


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "the pool's own number stays its own"
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 16), (15, 33), (130, 257), (300, 64), (64, 1), (0, 3)]
)
def test_every_element_of_a_transposition_is_in_its_place(shape: tuple[int, int]) -> None:
    x = torch.arange(shape[0] * shape[1], dtype=torch.int16).view(torch.bfloat16).view(shape)
    found = transposed(x)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int16), x.view(torch.int16).t())
    assert torch.equal(transposed(x.t()).view(torch.int16), x.view(torch.int16))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "width", "out"), [(200, 48, 96), (131, 96, 48), (7, 5, 5)])
def test_a_linear_layer_has_plain_torchs_gradients(tokens: int, width: int, out: int) -> None:
    given = drawn(tokens, width), drawn(out, width, seed=1), drawn(out, seed=2)
    slope = drawn(tokens, out, seed=3)
    found = []
    for layer in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        made = layer(*leaves)
        found.append((made.detach(), *torch.autograd.grad(made, leaves, slope)))
    for own, plain in zip(*found, strict=True):  # both round once, after a sum in float32
        torch.testing.assert_close(own, plain, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("threads")
def test_sums_over_passes_are_torchs() -> None:
    total, part = drawn(40, 9).float() / 3, drawn(40, 9, seed=1)
    expected = total + part.float()
    add_to(total, part)
    assert torch.equal(total, expected)
    wide = expected.double()
    add_to(wide, expected)
    assert torch.equal(wide, 2 * expected.double()), "other dtypes too"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("borders", "together"),
    [
        ((0, 1, 40, 41, 150), [[109], [39], [1, 1]]),
        # 32 of 117 rows are filling, 33 would be too many
        ((0, 7, 46, 85), [[39, 39, 7]]),
        ((0, 6, 45, 84), [[39, 39], [6]]),
        # 18 of 192 rows; with the sequence of 42, 40 of 256 would be more than an eighth
        ((0, 42, 98, 162, 216), [[64, 56, 54], [42]]),
    ],
)
def test_attention_is_torchs_for_sequences_of_any_length(
    borders: tuple[int, ...], together: list[list[int]]
) -> None:
    heads, kv, size = 4, 2, 16
    spans = spans_between(borders)
    groups = attention._groups(spans, heads)
    assert [(group.queries >= 0).sum(1).tolist() for group in groups] == together
    count = borders[-1]
    given = (
        drawn(count, heads * size),
        drawn(count, kv * size, seed=1),
        drawn(count, kv * size, seed=2),
    )
    slope = drawn(count, heads * size, seed=3)
    flat = torch.ones(count, size // 2), torch.zeros(count, size // 2)  # angles of 0: none turns
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = attention.causal_attention(*leaves, *flat, spans, size=size, scale=0.3)
    found = [out.detach(), *torch.autograd.grad(out, leaves, slope)]
    exact = [tensor.float().requires_grad_() for tensor in given]
    parts = [
        F.scaled_dot_product_attention(
            *(rows[a:b].view(b - a, -1, size).transpose(0, 1) for rows in exact),
            is_causal=True,
            scale=0.3,
            enable_gqa=True,
        )
        for a, b in pairwise(borders)
    ]
    answer = torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
    expected = [answer.detach(), *torch.autograd.grad(answer, exact, slope.float())]
    for own, plain in zip(found, expected, strict=True):
        assert float((own.float() - plain).norm() / plain.norm()) < 0.01


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """[L, heads, D] by angles [L, D / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.usefixtures("threads")
def test_attention_to_a_prompt_is_that_of_sequences_with_their_own_copies() -> None:
    heads, kv, size = 4, 2, 16
    spans = (
        Span(0, 14),  # a prompt of 5 and its first answer
        Span(14, 7, 0, 5), Span(21, 7, 0, 5), Span(28, 2, 0, 5),
        Span(30, 60),  # one of 50
        Span(90, 1, 30, 50), Span(91, 20, 30, 50),
        Span(111, 6),
    )  # fmt: skip
    groups = attention._groups(spans, heads)
    assert [(len(group.queries), group.before) for group in groups] == [
        (1, 0), (2, 0), (3, 5), (2, 50),
    ]  # fmt: skip
    own = [torch.arange(s.start, s.start + s.length) for s in spans]
    rows = [
        torch.cat([torch.arange(s.prompt, s.prompt + s.before), each])
        for s, each in zip(spans, own, strict=True)
    ]
    count = 117
    angles = torch.empty(count, size // 2)
    frequencies = 0.7 ** torch.arange(size // 2)
    for each in rows:
        angles[each] = torch.arange(len(each))[:, None] * frequencies
    given = (
        drawn(count, heads * size),
        drawn(count, kv * size, seed=1),
        drawn(count, kv * size, seed=2),
    )
    slope = drawn(count, heads * size, seed=3)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = attention.causal_attention(
        *leaves, angles.cos(), angles.sin(), spans, size=size, scale=0.3
    )
    found = [out.detach(), *torch.autograd.grad(out, leaves, slope)]
    exact = [tensor.double().requires_grad_() for tensor in given]
    answer = torch.zeros(count, heads * size, dtype=torch.float64)
    for s, each, mine in zip(spans, rows, own, strict=True):
        q, k, v = (leaf[each].view(len(each), -1, size) for leaf in exact)
        q, k = (turned(x, angles[each].double()) for x in (q, k))
        whole = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
        )
        answer = answer.index_copy(0, mine, whole.transpose(0, 1).flatten(1)[s.before :])
    expected = [answer.detach(), *torch.autograd.grad(answer, exact, slope.double())]
    for mine, plain in zip(found, expected, strict=True):
        assert float((mine.double() - plain).norm() / plain.norm()) < 0.01
        for rows_of_prompt in (slice(0, 5), slice(30, 80)):
            error = (mine.double() - plain)[rows_of_prompt].norm()
            assert float(error / plain[rows_of_prompt].norm()) < 0.01
