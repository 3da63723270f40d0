"""Compiles every variant of the Triton kernels for a CUDA architecture, for which no card is
needed, and prints as JSON what the compiler made of them. A process of its own, because kernels
defined under TRITON_INTERPRET cannot be compiled.

    python tests/kernels/loss/cuda_kernels.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
from emberl.kernels.loss import triton_exp
from emberl.kernels.loss.tiling import EXP_STATS, FACTOR, Tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNED = {"stride", "slice_rows", "padded"}
"""Integers that are multiples of 16 in every launch, which Triton finds out for itself there."""


def compiled(
    kernel: Any, element: str, tile: Tile, flags: dict[str, bool], architecture: int
) -> Any:
    constants = {**flags, "ROWS": tile.rows, "COLUMNS": tile.columns}
    kinds, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        if name in constants:
            kinds[name] = "constexpr"
        elif pointer:
            kinds[name] = "*" + (element if name == "e_ptr" else "fp32")
        else:
            kinds[name] = "fp32" if name == "inner" else "i32"
        if pointer or name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32))


def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack and local memory, by the tool that Triton carries."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        out = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        )
    return {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", out.stdout)}


def main(architecture: int) -> None:
    kernels = ((triton_exp.emberl_exp_stats, EXP_STATS), (triton_exp.emberl_factor, FACTOR))
    for (kernel, footprint), (element, size) in product(kernels, (("bf16", 2), ("fp32", 4))):
        names = [name for name in ("BIAS", "SOFTCAP", "MOMENTS") if name in kernel.arg_names]
        for values in product((False, True), repeat=len(names)):
            flags, tile = (
                dict(zip(names, values, strict=True)),
                triton_exp.tile_for(footprint, size),
            )
            made = compiled(kernel, element, tile, flags, architecture)
            wide = len(re.findall(r"ld\.global[.\w]*\.v4\.b32", made.asm["ptx"]))
            row = {
                "kernel": kernel.__name__,
                "element": element,
                **flags,
                **resources(made.asm["cubin"]),
            }
            bytes_of_thread = tile.elements * size // (32 * made.metadata.num_warps)
            print(
                json.dumps(
                    row | {"wide_loads": wide, "wide_loads_of_a_tile": bytes_of_thread // 16}
                )
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
