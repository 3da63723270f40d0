"""Weight gradients, sums over passes and attention on the CPU, beside plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from emberl.kernels.transformer import operators
from emberl.kernels.transformer.products import linear, transposed
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
        # 5 of 48 rows are filling; with the sequence of 10, 11 of 64 would be more than an eighth
        ((0, 10, 24, 40, 53), [[16, 14, 13], [10]]),
    ],
)
def test_attention_is_torchs_for_sequences_of_any_length(
    borders: tuple[int, ...], together: list[list[int]]
) -> None:
    heads, kv, size = 4, 2, 16
    groups = operators._groups(borders, heads)
    assert [group.lengths.tolist() for group in groups] == together
    count = borders[-1]
    given = (
        drawn(count, heads * size),
        drawn(count, kv * size, seed=1),
        drawn(count, kv * size, seed=2),
    )
    slope = drawn(count, heads * size, seed=3)
    flat = torch.ones(count, size // 2), torch.zeros(count, size // 2)  # angles of 0: none turns
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    out = operators.causal_attention(*leaves, *flat, borders, size=size, scale=0.3)
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
