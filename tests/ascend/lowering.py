"""Triton kernels through triton-ascend's own passes to linalg, and the result executed on x86 with
Debian's MLIR 19.

What this proves: the front end takes the kernel, the lowering keeps its meaning, its transfers stay
inside their tensors. What it cannot: BiSheng's code, the Unified Buffer at run time,
synchronisation, speed.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LLVM = Path("/usr/lib/llvm-19")
TO_LLVM = [
    "--allow-unregistered-dialect",
    "--convert-elementwise-to-linalg",
    "--linalg-generalize-named-ops",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--convert-linalg-to-loops",
    "--expand-strided-metadata",
    "--memref-expand",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--arith-expand=include-bf16=true",
    "--convert-arith-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-index-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
]
SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4, "i64": 8, "i8": 1, "i1": 1}


def can_execute() -> bool:
    """Whether MLIR 19 and a C compiler, which only links here, are installed."""
    return (LLVM / "bin/mlir-opt").exists() and shutil.which("cc") is not None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A kernel as triton-ascend hands it to BiSheng."""

    name: str
    types: tuple[str, ...]
    """Triton types of the run-time arguments, in order."""
    linalg: str

    @property
    def innermost_loop(self) -> str:
        """The text of the deepest scf.for: what runs once per tile."""
        start = max((m.start() for m in re.finditer(r"scf\.for", self.linalg)), key=self._depth)
        depth, at = 0, self.linalg.index("{", start)
        for end in range(at, len(self.linalg)):
            depth += {"{": 1, "}": -1}.get(self.linalg[end], 0)
            if depth == 0:
                return self.linalg[start:end]
        raise AssertionError("unbalanced braces")

    def _depth(self, at: int) -> int:
        line = self.linalg[self.linalg.rfind("\n", 0, at) + 1 : at]
        return len(line) - len(line.lstrip())

    def allocated(self) -> int:
        """Bytes of all on-chip buffers that the kernel declares, once each."""
        total = 0
        for dims, item in re.findall(
            r"memref\.alloc\(\)[^:]*: memref<([0-9x]+)x(\w+?)>", self.linalg
        ):
            size = ITEM_BYTES[item]
            for dim in dims.split("x"):
                size *= int(dim)
            total += size
        return total


def lower(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> Lowered:
    """Lowers a `triton.jit` kernel; `types` are Triton's (`*bf16`, `i32`, ...), `constants` its
    constexpr arguments."""
    target = GPUTarget("npu", "Ascend910B3", 0)
    backend = AscendBackend(target)
    options = backend.parse_options({})
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constants=dict(constants))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        options, backend.get_codegen_implementation(), backend.get_module_map(), context
    )
    meta = {"target": target, "hash": source.hash(), **options.__dict__}
    linalg = ttir_to_linalg(make_ttir(module, meta, options), meta, options, named_ops=True)
    name = re.search(r"func\.func @(\w+)", linalg)
    assert name is not None
    return Lowered(
        name=name[1], types=tuple(t for t in signature.values() if t != "constexpr"), linalg=linalg
    )


class Executable:
    """A lowered kernel as a shared library; a call runs the whole grid, one program after the
    other."""

    def __init__(self, lowered: Lowered, folder: Path) -> None:
        text = re.sub(
            r" attributes \{[^}]*\}", " attributes {llvm.emit_c_interface}", lowered.linalg, count=1
        )
        text = re.sub(r"\{(tt|hivm)\.[^}]*\}", "", text)
        (folder / "kernel.mlir").write_text(text)
        _tool(
            LLVM / "bin/mlir-opt", folder / "kernel.mlir", *TO_LLVM, "-o", folder / "lowered.mlir"
        )
        _tool(
            LLVM / "bin/mlir-translate",
            folder / "lowered.mlir",
            "--mlir-to-llvmir",
            "-o",
            folder / "kernel.ll",
        )
        _tool(
            LLVM / "bin/llc", folder / "kernel.ll", "-filetype=obj", "-relocation-model=pic", "-O2",
            "-o", folder / "kernel.o",
        )  # fmt: skip
        _tool(
            "cc", "-shared", "-o", folder / "kernel.so", folder / "kernel.o", f"-L{LLVM}/lib",
            "-l:libmlir_c_runner_utils.so.19.1", f"-Wl,-rpath,{LLVM}/lib", "-lm",
        )  # fmt: skip
        self.function = getattr(ctypes.CDLL(str(folder / "kernel.so")), lowered.name)
        self.types = lowered.types

    def __call__(self, programs: int, *values: torch.Tensor | float) -> None:
        """Runs programs 0 to `programs` - 1 with the run-time arguments `values`."""
        arguments: list[Any] = _memref(None) + _memref(None)  # triton-ascend's lock and workspace
        for kind, value in zip(self.types, values, strict=True):
            arguments += (
                _memref(value) if isinstance(value, torch.Tensor) else [SCALARS[kind](value)]
            )
        for program in range(programs):
            self.function(*arguments, *(ctypes.c_int32(v) for v in (programs, 1, 1, program, 0, 0)))


def _memref(tensor: torch.Tensor | None) -> list[Any]:
    """A rank-1 memref descriptor, unpacked: base, aligned base, offset, size, stride."""
    address = ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
    count = 0 if tensor is None else tensor.untyped_storage().nbytes() // tensor.element_size()
    return [address, address, ctypes.c_int64(0), ctypes.c_int64(count), ctypes.c_int64(1)]


def _tool(*command: object) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command[0]}: {done.stderr[:2000]}"
