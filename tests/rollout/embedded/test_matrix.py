"""Packed weight matrices: the same products, never of other bytes than those that are held."""

from __future__ import annotations

import pytest
import torch
from emberl.rollout.embedded.matrix import Matrix, packable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_the_product_is_that_of_the_plain_matrix(dtype: torch.dtype, bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 48, generator=generator).to(dtype) for n in (80, rows))
    offset = torch.randn(80, generator=generator).to(dtype) if bias else None
    matrix = Matrix(weight, offset)
    matrix.pack()
    expected = torch.nn.functional.linear(x, weight, offset)
    assert torch.allclose(
        matrix(x), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )


@pytest.mark.skipif(not packable(torch.float32), reason="this build of torch packs no matrices")
def test_changed_weights_are_multiplied_once_they_are_packed_and_never_before() -> None:
    weight = torch.zeros(32, 16)
    matrix = Matrix(weight)
    matrix.pack()
    x = torch.ones(2, 16)
    assert not matrix(x).any()
    weight.view(-1)[:16].fill_(1.0)  # through a view, as a patch writes
    with pytest.raises(AssertionError, match="were not packed"):
        matrix(x)
    matrix.pack()
    assert matrix(x)[:, 0].tolist() == [16.0, 16.0]
    assert not matrix(x)[:, 1:].any()


def test_what_is_not_packed_is_multiplied_as_it_is() -> None:
    weight = torch.zeros(32, 16, dtype=torch.float64)
    matrix = Matrix(weight)
    matrix.pack()
    weight.fill_(2.0)
    assert matrix(torch.ones(1, 16, dtype=torch.float64))[0, 0] == 32


@pytest.mark.skipif(not packable(torch.float32), reason="this build of torch packs no matrices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(100, 70), (192, 64), (33, 16)])
def test_an_element_is_written_where_it_lies_in_the_copy(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    if not packable(dtype):
        pytest.skip("this processor multiplies no packed matrices of this dtype")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix, x = Matrix(weight), torch.eye(shape[1], dtype=dtype)
    matrix.pack()
    rows = shape[0] // 2
    (place,) = matrix.places(rows, shape[0] - rows) or ()
    integers = place.memory.dtype
    for row, column in ((0, 0), (5, 3), (shape[0] - rows - 1, shape[1] - 1)):
        new = torch.tensor(float(row + 2), dtype=dtype)
        place.memory[place.rows[row] + place.columns[column]] = new.view(integers)
        assert matrix(x)[column, rows + row] == new, "the copy is what is multiplied"
