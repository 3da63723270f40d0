"""The fused loss's kernels on an NPU's tool chain without an NPU: lowered by triton-ascend,
checked, executed on x86."""

# ruff: noqa: E402  (imports that need triton-ascend follow the check for it)
from __future__ import annotations

import importlib.util
import re
import sys
import types
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "triton.backends.ascend",
    reason="triton-ascend is not installed; `make test-ascend` installs it",
)

if importlib.util.find_spec("emberl") is None:  # this environment has torch and Triton only
    for name in ("emberl", "emberl.kernels", "emberl.kernels.loss"):
        sys.modules[name] = types.ModuleType(name)
        folder = Path(__file__).parents[2].joinpath(*name.split(".")[1:])
        sys.modules[name].__path__ = [str(folder)] if "." in name else []

SHOWS = {
    "Triton kernels of the fused loss: lowered by triton-ascend, executed on x86, within the Unified Buffer": (
        "test_the_lowered_kernel_suits_a_vector_core, test_the_plan_covers_what_the_lowered_kernel_allocates,"
        " test_the_lowered_kernels_compute_what_torch_does"
    )
}
spec = importlib.util.spec_from_file_location("lowering", Path(__file__).with_name("lowering.py"))
lowering: Any = importlib.util.module_from_spec(spec)
sys.modules["lowering"] = lowering
spec.loader.exec_module(lowering)

from emberl.kernels.loss import tiling, triton_exp
from emberl.kernels.loss.head import Head, Transform
from emberl.kernels.loss.passes import TorchPasses

DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
NAMES = {"exp_stats": triton_exp.emberl_exp_stats, "factor": triton_exp.emberl_factor}
INTEGERS = ("rows", "stride", "column_blocks", "items", "slice_rows", "padded")


def lowered(kernel: str, dtype: str, **flags: bool) -> Any:
    function = NAMES[kernel]
    tile = triton_exp.tile_for(tiling.FOOTPRINTS[kernel], DTYPES[dtype].itemsize)
    kinds = {name: "i32" if name in INTEGERS else "*fp32" for name in function.arg_names}
    kinds |= {"e_ptr": dtype, "inner": "fp32"}
    return lowering.lower(function, kinds, {**flags, "ROWS": tile.rows, "COLUMNS": tile.columns})


CASES = [
    ("exp_stats", dtype, {"BIAS": bias, "SOFTCAP": softcap, "MOMENTS": moments})
    for dtype, bias, softcap, moments in product(
        DTYPES, (False, True), (False, True), (False, True)
    )
] + [("factor", dtype, {"SOFTCAP": softcap}) for dtype, softcap in product(DTYPES, (False, True))]
IDS = [
    f"{kernel}-{dtype[1:]}-{'-'.join(k for k, v in flags.items() if v) or 'plain'}"
    for kernel, dtype, flags in CASES
]


@pytest.mark.parametrize(("kernel", "dtype", "flags"), CASES, ids=IDS)
def test_the_lowered_kernel_suits_a_vector_core(
    kernel: str, dtype: str, flags: dict[str, bool]
) -> None:
    code = lowered(kernel, dtype, **flags)
    assert len(code.name) <= 49, "longer names are cut from the left"
    assert 'mix_mode = "aiv"' in code.linalg, "a vector kernel must not ask for the cube unit"
    for forbidden in (
        "f64",
        "ui16",
        "ui32",
        "ui64",
        "atomic",
        "linalg.matmul",
        "scf.while",
        "cf.cond_br",
    ):
        assert forbidden not in code.linalg, f"{forbidden} is slow or missing on the device"
    body = code.innermost_loop
    assert "scf.if" not in body and "arith.cmpi" not in body, (
        "branches and integer comparisons run as scalar code"
    )
    assert not re.search(r"arith\.\w+ %.*tensor<\d+x\d+xi(32|64)>", body), (
        "integer tiles run as scalar code"
    )
    assert "in writable %subview" in code.linalg, (
        "the tail tile must be a shorter transfer, or it writes past its slice"
    )


@pytest.mark.parametrize(("kernel", "dtype", "flags"), CASES, ids=IDS)
def test_the_plan_covers_what_the_lowered_kernel_allocates(
    kernel: str, dtype: str, flags: dict[str, bool]
) -> None:
    footprint, size = tiling.FOOTPRINTS[kernel], DTYPES[dtype].itemsize
    code, tile = lowered(kernel, dtype, **flags), triton_exp.tile_for(footprint, size)
    # loop and tail do not live at the same time, so what is declared once is what a double-buffered
    # half needs
    assert code.allocated() <= tiling.bytes_of(footprint, tile, size) <= tiling.UNIFIED_BUFFER


@pytest.mark.skipif(
    not lowering.can_execute(), reason="MLIR 19 (mlir-opt, llc) or a C compiler is not installed"
)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (31, 5), (64, 128), (333, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["linear", "softcap"])
def test_the_lowered_kernels_compute_what_torch_does(
    dtype: str, softcap: float | None, rows: int, n: int, executables: Any
) -> None:
    torch.manual_seed(rows)
    padded = (
        -(-n // triton_exp.TritonPasses.column_multiple) * triton_exp.TritonPasses.column_multiple
    )
    raw = torch.linspace(-2, 6, n)
    scale = torch.linspace(0.7, 1.3, n)
    t = Transform.around(
        Head(weight=torch.zeros(rows, 2), softcap=softcap),
        raw,
        -torch.rand(n),
        scale,
        DTYPES[dtype],
    )
    bias = torch.randn(rows)
    guard = torch.full((4, padded), 7.0)  # rows behind the matrix: nothing may write there
    storage = torch.cat([torch.randn(rows, padded) * 3 - 4, guard]).to(DTYPES[dtype])
    storage[:rows, n:] = float("nan")
    mine = storage[:rows]
    mine[torch.arange(n) % rows, torch.arange(n)] = float("-inf")
    theirs = mine[:, :n].clone()
    sums, moments = torch.zeros(n), torch.zeros(n)
    TorchPasses().exp_stats(theirs, t, bias, sums, moments)

    def vector(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, torch.ones(padded - n)])

    flags = {"SOFTCAP": softcap is not None}
    deal = tiling.launch(triton_exp.tile_for(tiling.EXP_STATS, mine.element_size()), rows, n, 3)
    parts = torch.full((2, deal.splits, padded), float("nan"))
    executables("exp_stats", dtype, BIAS=True, MOMENTS=True, **flags)(
        deal.programs,
        mine,
        vector(scale),
        vector(t.raw),
        vector(t.level),
        bias,
        parts[0],
        parts[1],
        t.inner or 0.0,
        rows,
        padded,
        deal.column_blocks,
        deal.items,
        deal.slice_rows,
        padded,
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "*fp32" else {"rtol": 8e-3, "atol": 1e-4}
    torch.testing.assert_close(parts[0].sum(0)[:n], sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[1].sum(0)[:n], moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine[:, :n], theirs, **close)
    assert (mine[torch.arange(n) % rows, torch.arange(n)] == 0).all()

    constant, slope = torch.linspace(-1, 1, n), torch.linspace(0.5, -0.5, n)
    mine[:, :n] = theirs
    TorchPasses().factor(theirs, t, constant, slope)
    deal = tiling.launch(triton_exp.tile_for(tiling.FACTOR, mine.element_size()), rows, n, 3)
    executables("factor", dtype, **flags)(
        deal.programs, mine, vector(scale), vector(t.level), vector(constant), vector(slope),
        t.inner or 0.0, rows, padded, deal.column_blocks, deal.items, deal.slice_rows,
    )  # fmt: skip
    torch.testing.assert_close(mine[:, :n], theirs, **close)
    assert (storage[rows:] == 7).all(), "a tail tile wrote past the last row"


@pytest.fixture(scope="module")
def executables(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles each variant once."""
    made: dict[Any, Any] = {}

    def get(kernel: str, dtype: str, **flags: bool) -> Any:
        key = (kernel, dtype, *flags.items())
        if key not in made:
            made[key] = lowering.Executable(
                lowered(kernel, dtype, **flags), tmp_path_factory.mktemp(kernel)
            )
        return made[key]

    return get
