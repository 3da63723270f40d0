"""Accumulation of bfloat16 gradients over passes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import elements
from .threads import bits, over_rows


def add_to(total: Tensor, part: Tensor) -> None:
    """total += part, of any two dtypes; bfloat16 onto float32 in one pass and without a copy."""
    wide = total.dtype == torch.float32 and part.dtype == torch.bfloat16
    if not wide or not total.is_contiguous() or not part.is_contiguous():
        total.add_(part)
        return
    left, right = total.view(-1).numpy(), bits(part.view(-1))
    over_rows(len(left), lambda _, i, j: elements.add_to(left[i:j], right[i:j]))
