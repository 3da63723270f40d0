"""Aggregation weights by hand, and that they are fixed by the whole step."""

from __future__ import annotations

import numpy as np
import pytest
from emberl.rl.batch import token_weights

IDS = np.array([0, 0, 0, 1, 1, 2])
MASK = np.array([False, True, True, True, False, False])
"""Loss tokens: two of sequence 0, one of sequence 1, none of sequence 2."""


@pytest.mark.parametrize(
    ("aggregation", "options", "expected"),
    [
        ("token-mean", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-mean", {}, [1 / 4, 1 / 4, 1 / 2]),
        ("seq-mean-token-mean", {"num_sequences": 3}, [1 / 6, 1 / 6, 1 / 3]),
        ("seq-mean-token-sum", {}, [1 / 2, 1 / 2, 1 / 2]),
        ("seq-mean-token-sum-norm", {"norm_const": 10.0}, [1 / 20, 1 / 20, 1 / 20]),
    ],
)
def test_weights_by_hand(
    aggregation: str, options: dict[str, float], expected: list[float]
) -> None:
    found = token_weights(MASK, IDS, aggregation, **options)
    np.testing.assert_allclose(found[MASK], expected, rtol=1e-15)
    assert not found[~MASK].any()


def test_a_mask_that_leaves_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="leaves none of 6 tokens to train"):
        token_weights(np.zeros(6, bool), IDS, "token-mean")
    with pytest.raises(ValueError, match="none of 0 tokens"):
        token_weights(np.zeros(0, bool), np.zeros(0, int), "token-mean")


def test_a_missing_constant_names_its_key() -> None:
    with pytest.raises(
        ValueError, match=r"loss.aggregation=seq-mean-token-sum-norm needs loss.norm_const"
    ):
        token_weights(MASK, IDS, "seq-mean-token-sum-norm")
