"""On a CPU vLLM multiplies by oneDNN's copies of matrices, which it makes when a layer is loaded
and whose memory nobody is told of. In its workers torch makes these copies instead, with the same
oneDNN: the products are the same, bit for bit, and torch says where a copy lies, so that an update
can write into it.

vLLM chooses itself which matrices that is (`dispatch_cpu_unquantized_gemm`): two functions of its
`_custom_ops` are stood in for, from 0.23 to 0.32 the same.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..embedded import packed as onednn
from ..embedded.matrix import packable

COPIES: dict[int, Tensor] = {}
"""Number -> copy, as long as its `Copy` lives."""


class Copy:
    """Stands for vLLM's handle of a copy of a [rows, columns] matrix."""

    made = 0

    def __init__(self, weight: Tensor) -> None:
        Copy.made += 1
        self.number = Copy.made
        self.packed = onednn.pack(weight)
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.n, self.k = self.shape
        # as a tensor, which vLLM's compiler takes as an input and not as a constant
        self.handler_tensor = torch.tensor(self.number, dtype=torch.int64)
        COPIES[self.number] = self.packed

    def __del__(self) -> None:
        COPIES.pop(self.number, None)


def copy_of(layer: Any) -> Copy | None:
    """The copy that a layer of vLLM's multiplies by; None if it multiplies by something else."""
    closure = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    found = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, Copy)]
    return found[0] if found else None


def install() -> None:
    """In a worker, before it loads a model. Does nothing where vLLM or torch have no such
    products."""
    try:
        ops: Any = importlib.import_module("vllm._custom_ops")
        create, multiply = ops.create_onednn_mm, ops.onednn_mm
    except (ImportError, AttributeError):
        return
    if hasattr(create, "emberl"):
        return
    library: Any = torch.library.Library("emberl", "DEF")  # type: ignore[no-untyped-call]
    library.define("packed_linear(Tensor x, Tensor? bias, Tensor number, int rows) -> Tensor")
    library.impl("packed_linear", _packed_linear, "CPU")
    torch.library.register_fake("emberl::packed_linear", _shape)

    def create_onednn_mm(weight: Tensor, primitive_cache_size: int = 128) -> Any:
        matrix = weight.t()
        if not matrix.is_contiguous() or not packable(matrix.dtype):
            return create(weight, primitive_cache_size)
        return Copy(matrix)

    def onednn_mm(handler: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(handler, Copy):
            product: Tensor = torch.ops.emberl.packed_linear(
                x, bias, handler.handler_tensor, handler.n
            )
            return product
        made: Tensor = multiply(handler, x, bias)
        return made

    # what is defined lasts as long as its library
    create_onednn_mm.emberl = library  # type: ignore[attr-defined]
    ops.create_onednn_mm = create_onednn_mm
    ops.onednn_mm = onednn_mm


def _packed_linear(x: Tensor, bias: Tensor | None, number: Tensor, rows: int) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, COPIES[int(number)], bias, "none", [], ""
    )
    return product


def _shape(x: Tensor, bias: Tensor | None, number: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


__all__ = ["Copy", "copy_of", "install"]
