"""A weight matrix, and oneDNN's packed copy of it by which products are made."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.in_place import Place
from . import packed as onednn


class Matrix:
    """A linear map x -> x W^T + b. On a CPU with oneDNN the product reads a copy of W in the layout
    of the matrix units; oneDNN otherwise makes that copy for every product, which takes most of the
    time of a small batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], bias [out]; both may be overwritten in place if `pack` follows."""
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None
        self._version = -1
        self._told: bool | None = None  # whether the copy has the layout of `onednn.layout`
        self._packs = weight.device.type == "cpu" and packable(weight.dtype)

    def pack(self) -> None:
        """Makes a new copy if `weight` has changed. Raises RuntimeError unless the copy has the
        same bytes: digests, which are taken of `weight`, must hold for what is multiplied."""
        if not self._packs or self._version == self.weight._version:
            return
        self._packed = None  # frees its memory before the next one takes as much
        self._packed = onednn.pack(self.weight)
        if not self.intact():
            self._packed = None
            raise RuntimeError(
                f"oneDNN's copy of a {tuple(self.weight.shape)} weight matrix has other bytes"
            )
        self._version = self.weight._version
        self._told = None

    def intact(self) -> bool:
        """Whether the copy that is multiplied, if there is one, has the bytes of `weight`."""
        if self._packed is None:
            return True
        return torch.equal(self._packed.to_dense().view(torch.uint8), self.weight.view(torch.uint8))

    def places(self, first_row: int, rows: int) -> list[Place] | None:
        """The `Place` of these rows within the copy: [] if there is no copy, None if the copy's
        layout is unknown, in which case `repack` is needed after writing to `weight`."""
        if self._packed is None:
            return []
        if self._told is None:
            self._told = onednn.lies_as_told(self._packed, self.weight)
        if not self._told:
            return None
        place = onednn.place(self._packed, self.weight, first_row=first_row, rows=rows)
        return None if place is None else [place]

    def repack(self) -> None:
        """`pack` after a write past torch, which did not increase the tensor's version."""
        self._version = -1
        self.pack()

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        assert self._version == self.weight._version, "the weights changed and were not packed"
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return product


@cache
def packable(dtype: torch.dtype) -> bool:
    """Whether this build of torch multiplies packed matrices of `dtype`. The operators are those
    that torch.compile uses, but undocumented, so they are tried on a small matrix."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    weight, x = torch.eye(16, 32, dtype=dtype), torch.arange(64, dtype=dtype).view(2, 32)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        packed = onednn.pack(weight)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return torch.equal(product, x[:, :16]) and torch.equal(packed.to_dense(), weight)
    except (
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ):  # another build: without oneDNN, or with other operators
        return False
