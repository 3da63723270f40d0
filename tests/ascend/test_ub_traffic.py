"""What the fused loss moves between a card's memory and its vector cores' Unified Buffer for each
logit, as triton-ascend lowers our kernels and those of Liger's Ascend backend: bytes of the transfers
in the innermost loops, over the elements of a tile.

Shown: how often a kernel passes over the logits, and in which width, and that its tiles fit. Not
shown: whether BiSheng moves the same, how transfers overlap with arithmetic, any time.
"""

# ruff: noqa: E402  (imports that need triton-ascend follow the check for it)
from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "triton.backends.ascend",
    reason="triton-ascend is not installed; `make test-ascend` installs it",
)

loaded = sys.modules.get("emberl")  # another of these files may have put one there by hand
lacking = importlib.util.find_spec("emberl") is None if loaded is None else loaded.__spec__ is None
if lacking:  # this environment has torch and Triton only
    for name in ("emberl", "emberl.kernels", "emberl.kernels.loss"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        folder = Path(__file__).parents[2].joinpath(*name.split(".")[1:])
        module.__path__ = [str(folder)] if "." in name else []

if "lowering" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "lowering", Path(__file__).with_name("lowering.py")
    )
    sys.modules["lowering"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["lowering"])
lowering: Any = sys.modules["lowering"]

from emberl.kernels.loss import tiling, triton_exp

SHOWS = {
    "traffic with the Unified Buffer as lowered, beside Liger 0.8.5's Ascend kernels": (
        "test_ours_passes_over_the_logits_once, test_ligers_passes_over_them_twice"
    )
}
LIGER = Path(sys.prefix) / "liger-kernel-0.8.5"
VOCABULARY = 151936


def innermost(linalg: str) -> list[str]:
    """The bodies of all loops that have none within."""
    bodies = []
    for match in re.finditer(r"scf\.for", linalg):
        depth, at = 0, linalg.index("{", match.end())
        for end in range(at, len(linalg)):
            depth += {"{": 1, "}": -1}.get(linalg[end], 0)
            if depth == 0:
                break
        if "scf.for" not in linalg[at:end]:
            bodies.append(linalg[at:end])
    return bodies


def size(dims: str, item: str) -> int:
    total = lowering.ITEM_BYTES[item]
    for dim in dims.split("x"):
        total *= int(dim)
    return int(total)


def traffic(lowered: Any, elements: int) -> list[tuple[float, float]]:
    """Of each innermost loop (loaded, stored) bytes for each element of a tile. A transfer of
    unknown length counts as the whole buffer that it goes to or comes from."""
    found = []
    for body in innermost(lowered.linalg):
        loaded = stored = 0
        for dims, item in re.findall(r"memref\.alloc\(\)[^:]*: memref<([0-9x]+)x(\w+?)>", body):
            loaded += size(dims, item)  # each is filled by one copy
        for value, dims, item in re.findall(
            r"materialize_in_destination (%\w+) in writable [^:]*: \(tensor<([0-9?x]+)x(\w+?)>",
            body,
        ):
            if "?" in dims:  # a slice of a tile
                whole = re.search(
                    rf"{value} = tensor\.extract_slice [^:]*: tensor<([0-9x]+)x", body
                )
                assert whole is not None, value
                dims = whole[1]
            stored += size(dims, item)
        found.append((loaded / elements, stored / elements))
    return found


def ours(kernel: str, **flags: bool) -> tuple[Any, int]:
    function = {"exp_stats": triton_exp.emberl_exp_stats, "factor": triton_exp.emberl_factor}[
        kernel
    ]
    tile = triton_exp.tile_for(tiling.FOOTPRINTS[kernel], 2)
    whole = ("rows", "stride", "column_blocks", "items", "slice_rows", "padded")
    kinds = {name: "i32" if name in whole else "*fp32" for name in function.arg_names}
    kinds |= {"e_ptr": "*bf16", "inner": "fp32"}
    constants = {**flags, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return lowering.lower(function, kinds, constants), tile.elements


def test_ours_passes_over_the_logits_once() -> None:
    """The pass of every step: logits become exponentials in their place, and sums. The second is
    for the entropy's gradient and soft-capped heads alone."""
    exp, elements = ours("exp_stats", BIAS=False, SOFTCAP=False, MOMENTS=True)
    assert traffic(exp, elements) == [(2.0, 2.0)]
    factor, elements = ours("factor", SOFTCAP=False)
    assert traffic(factor, elements) == [(2.0, 2.0)]
    assert max(exp.allocated(), factor.allocated()) < tiling.UNIFIED_BUFFER
    print(elements, exp.allocated(), factor.allocated())


class _Driver:
    """What Liger asks of a device when it is imported."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 1, "num_aicore": 20, "num_vectorcore": 40}

    def get_current_target(self) -> Any:
        return lowering.GPUTarget("npu", "Ascend910B3", 0)

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return lambda *_, **__: 0.0


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not LIGER.exists():
        pytest.skip("liger-kernel 0.8.5 could not be had; tests/ascend/setup.sh says why")
    import triton

    monkeypatch.setenv("ASCEND_UB_CAPACITY_BITS", str(8 * tiling.UNIFIED_BUFFER))
    triton.runtime.driver.set_active(_Driver())
    descriptor: Any = types.ModuleType("triton.tools.tensor_descriptor")
    descriptor.TensorDescriptor = object
    monkeypatch.setitem(sys.modules, descriptor.__name__, descriptor)
    *packages, _ = parts = ["liger_kernel", "ops", "backends", "_ascend", "ops", "grpo_loss"]
    for i in range(1, len(packages) + 1):  # whose own imports want a newer triton-ascend
        package: Any = types.ModuleType(".".join(packages[:i]))
        package.__path__ = [str(LIGER.joinpath(*packages[:i]))]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    return importlib.import_module(".".join(parts))


POINTERS = {
    "LOGITS": "*bf16", "DLOGITS": "*bf16", "INPUT_IDS": "*i64", "COMPLETION_MASK": "*i32",
}  # fmt: skip
WHOLE = ("VLLM_IS_RATIO_STRIDE", "TOKEN_BASE", "TOKEN_LIMIT", "loss_stride0", "loss_stride1")
NUMBERS = ("TEMPERATURE", "EPS_LOW", "EPS_HIGH", "SAPO_TEMP_POS", "SAPO_TEMP_NEG", "DELTA")


def theirs(kernel: Any, block: int) -> Any:
    constants: dict[str, Any] = {
        "BETA": 0.0, "LOSS_TYPE": 0, "USE_BIAS_CORRECTION_KL": False, "L": 128, "N": VOCABULARY,
        "BLOCK_N": block, "VLLM_IS_RATIO": None, "PHI_SEQ": None, "REF_LOGP": None, "KL": None,
    }  # fmt: skip
    constants = {name: v for name, v in constants.items() if name in kernel.arg_names}
    kinds = {name: POINTERS.get(name, "*fp32") for name in kernel.arg_names}
    kinds |= {name: "i32" for name in WHOLE if name in kinds}
    kinds |= {name: "fp32" for name in NUMBERS if name in kinds}
    return lowering.lower(kernel, kinds, constants)


def test_ligers_passes_over_them_twice(liger: Any) -> None:
    """Its GRPO loss takes logits that a product has written: forward once for the sums, backward
    once more for their gradient; a token that is masked gets its row of zeros by a loop of its
    own."""
    forward = liger.compute_block_size_forward(VOCABULARY)
    backward = liger.compute_block_size_backward(VOCABULARY)
    first = theirs(liger._grpo_loss_fwd_kernel, forward)
    second = theirs(liger._grpo_loss_bwd_kernel, backward)
    assert traffic(first, forward) == [(2.0, 0.0)]
    assert sorted(traffic(second, backward)) == [(0.0, 2.0), (2.0, 2.0)]
    print(forward, first.allocated(), backward, second.allocated())
    assert max(first.allocated(), second.allocated()) < tiling.UNIFIED_BUFFER
