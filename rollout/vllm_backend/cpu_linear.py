"""Packed matrices of vLLM on a CPU, made by torch so that updates can be written into them.

On a CPU vLLM multiplies by oneDNN's packed copies of matrices, which it makes when a layer is
loaded and whose memory it does not expose. Here two functions of its `_custom_ops`, the same from
0.23 to 0.32, are replaced, so that torch makes these copies, with the same oneDNN: the products are
bit for bit the same, and torch exposes a copy's memory. vLLM itself chooses the matrices
(`dispatch_cpu_unquantized_gemm`).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..embedded import packed as onednn
from ..embedded.matrix import packable

COPIES: dict[int, Tensor] = {}
"""`Copy.number` -> packed matrix, as long as that `Copy` lives."""


class Copy:
    """A packed copy of a [rows, columns] matrix, in place of vLLM's handle of one."""

    made = 0

    def __init__(self, weight: Tensor) -> None:
        Copy.made += 1
        self.number = Copy.made
        self.packed = onednn.pack(weight)
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        # n and k as vLLM's handle names them
        self.n = self.shape[0]
        self.k = self.shape[1]
        # a tensor, since vLLM's compiler would bake a number into the graph as a constant
        self.handler_tensor = torch.tensor(self.number, dtype=torch.int64)
        COPIES[self.number] = self.packed

    def __del__(self) -> None:
        COPIES.pop(self.number, None)


def copy_of(layer: Any) -> Copy | None:
    """The packed copy by which a layer of vLLM multiplies; None if it uses something else."""
    closure = getattr(getattr(layer, "cpu_linear", None), "__closure__", None) or ()
    copies = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, Copy)]
    return copies[0] if copies else None


def install() -> None:
    """Replaces vLLM's functions; call it in a worker before it loads a model. Does nothing if vLLM
    has no such functions, or if it was called before."""
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

    # kept alive here: the operator is removed with its library
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
