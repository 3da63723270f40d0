"""The compiled operations of a decoding step against plain torch, in both element types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emberl.kernels.decoding import operations
from numpy.typing import NDArray
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 4e-6}


def array(tensor: Tensor) -> NDArray[Any]:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    result: NDArray[Any] = bits.numpy()
    return result


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    scale = expected.double().abs().clamp(min=1)
    return bool(((found.double() - expected.double()).abs() <= 2 * ROUNDING[dtype] * scale).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_add_norm(dtype: torch.dtype, size: int) -> None:
    x, delta, weight = (
        random(5, size, dtype=dtype),
        random(5, size, dtype=dtype, seed=1),
        random(size, dtype=dtype, seed=2),
    )
    before, out = x.clone(), torch.full_like(x, 9.0)
    operations.add_norm(array(x), array(delta), array(weight), 1e-5, array(out), 1, 4)
    assert torch.equal(x[1:4], (before + delta)[1:4])
    assert torch.equal(x[[0, 4]], before[[0, 4]])  # other rows are somebody else's
    single = x.float()
    normed = (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight
    assert close(out[1:4], normed[1:4], dtype)
    assert bool((out[[0, 4]] == 9).all())


def test_nothing_is_added_where_there_is_no_delta() -> None:
    x, out = random(2, 8, dtype=torch.float32), torch.empty(2, 8)
    before = x.clone()
    operations.add_norm(
        array(x), np.zeros((2, 0), np.float32), np.ones(8, np.float32), 0.0, array(out), 0, 2
    )
    assert torch.equal(x, before)
    assert torch.allclose(out.pow(2).mean(-1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_product(dtype: torch.dtype) -> None:
    gate_up, out = 20 * random(4, 2 * 37, dtype=dtype), torch.empty(4, 37, dtype=dtype)
    gate_up[0, :4] = torch.tensor([-300.0, 300.0, 0.0, -88.0], dtype=dtype)
    operations.silu_product(array(gate_up), array(out), 0, 4)
    gate, up = gate_up.chunk(2, -1)
    assert close(out, F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_attention_to_all_that_was_stored(
    dtype: torch.dtype, heads: tuple[int, int], norm: bool
) -> None:
    queries, kv, size, width = *heads, 16, 24
    qkv = random(3, (queries + 2 * kv) * size, dtype=dtype)
    keys, values = (
        random(3, kv, width, size, dtype=dtype, seed=1),
        random(3, kv, width, size, dtype=dtype, seed=2),
    )
    weights = [
        random(size, dtype=dtype, seed=s) if norm else torch.zeros(0, dtype=dtype) for s in (3, 4)
    ]
    angles = torch.arange(width)[:, None] * torch.logspace(0, -2, size // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    positions, out = torch.tensor([0, 5, 23]), torch.empty(3, queries * size, dtype=dtype)
    operations.attend(
        array(qkv), *map(array, weights), 1e-6, cos.numpy(), sin.numpy(),
        array(keys), array(values), positions.numpy(), array(out), 0, 3,
    )  # fmt: skip

    split = qkv.view(3, queries + 2 * kv, size).float()
    turned = split[:, : queries + kv]
    if norm:
        scale = torch.cat((weights[0].expand(queries, -1), weights[1].expand(kv, -1))).float()
        turned = turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
    swapped = torch.cat((turned[..., size // 2 :], turned[..., : size // 2]), -1)
    turned = turned * cos[positions][:, None] + swapped * sin[positions][:, None]
    for i, place in enumerate(positions.tolist()):
        assert close(keys[i, :, place], turned[i, queries:].to(dtype), dtype)
        assert torch.equal(values[i, :, place], qkv.view(3, -1, size)[i, queries + kv :])
        seen = slice(0, place + 1)
        expected = F.scaled_dot_product_attention(
            turned[i, :queries, None],
            keys[i, :, seen].float(),
            values[i, :, seen].float(),
            enable_gqa=True,
        )
        assert close(out[i].view(queries, size), expected[:, 0].to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_and_their_log_probs(dtype: torch.dtype, temperature: float) -> None:
    """The token at which the cumulated probabilities pass the uniform number, and log-probs of the
    tempered distribution."""
    rows, size = 40, 1500
    logits = 4 * random(rows, size, dtype=dtype)
    uniform = torch.rand(
        rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).numpy()
    tokens, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
    heat = np.full(rows, temperature, np.float32)
    operations.draw(array(logits), heat, np.zeros(rows, bool), uniform, tokens, logprobs, 0, rows)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    above = exact.exp().cumsum(-1).numpy()
    below = above - exact.exp().numpy()
    at = np.arange(rows), tokens
    assert ((below[at] <= uniform + 1e-6) & (uniform <= above[at] + 1e-6)).all()
    assert np.abs(exact.numpy()[at] - logprobs).max() < 1e-5


def test_a_greedy_draw_is_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]], dtype=torch.bfloat16)
    tokens, logprobs = np.empty(1, np.int64), np.empty(1, np.float32)
    heat, greedy = np.full(1, 7.0, np.float32), np.ones(1, bool)
    operations.draw(array(logits), heat, greedy, np.full(1, 0.999), tokens, logprobs, 0, 1)
    assert tokens[0] == 1
    assert logprobs[0] == pytest.approx(3 - math.log(1 + 2 * math.exp(3) + math.exp(1)), abs=1e-6)


def test_the_last_uniform_number_draws_a_token_that_exists() -> None:
    logits = torch.full((1, 700), -1e30)
    logits[0, 3] = 0.0
    tokens, logprobs = np.empty(1, np.int64), np.empty(1, np.float32)
    heat, last = np.ones(1, np.float32), np.full(1, 1 - 2.0**-52)
    operations.draw(array(logits), heat, np.zeros(1, bool), last, tokens, logprobs, 0, 1)
    assert tokens[0] == 3
    assert logprobs[0] == pytest.approx(0, abs=1e-6)


def test_a_row_that_is_not_finite_gives_a_log_prob_that_says_so() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 2] = math.nan
    tokens, logprobs = np.empty(1, np.int64), np.empty(1, np.float32)
    operations.draw(
        array(logits),
        np.ones(1, np.float32),
        np.zeros(1, bool),
        np.full(1, 0.3),
        tokens,
        logprobs,
        0,
        1,
    )
    assert 0 <= tokens[0] < 8
    assert np.isnan(logprobs[0])
