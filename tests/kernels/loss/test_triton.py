"""The Triton kernels in Triton's interpreter (a CPU, float32) against the torch passes and the
float64 oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below
pytest.importorskip("triton", reason="stock Triton is not installed")

from emberl.kernels.loss.head import Head, Transform
from emberl.kernels.loss.passes import TorchPasses
from emberl.kernels.loss.triton_exp import TritonPasses
from forced_loss import linear_logprob


def tile(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Shifted logits with excluded entries, in a buffer whose padding columns hold NaN."""
    u = torch.full((rows, -(-n // 128) * 128), float("nan"), dtype=dtype)[:, :n]
    u.copy_(torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)) * 3 - 4)
    u[torch.arange(n) % rows, torch.arange(n)] = float("-inf")
    return u


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (31, 7), (32, 128), (33, 130), (1000, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_agree_with_torch(
    dtype: torch.dtype, rows: int, n: int, bias: bool, softcap: float | None
) -> None:
    torch.manual_seed(0)
    raw = torch.linspace(-2, 6, n)
    head = Head(weight=torch.zeros(rows, 2, dtype=dtype), softcap=softcap)
    t = Transform.around(head, raw, -torch.rand(n), torch.linspace(0.7, 1.3, n), dtype)
    b = torch.randn(rows) if bias else None
    results, same = [], tile(rows, n, dtype).float().exp().to(dtype)
    for passes in (TorchPasses(), TritonPasses()):
        u = tile(rows, n, dtype)
        sums, moments = torch.zeros(n), torch.zeros(n)
        passes.exp_stats(u, t, b, sums, moments)
        e = u.float().clone()
        u.copy_(same)  # the second pass from equal numbers, whatever the first one rounded
        passes.factor(u, t, torch.linspace(-1, 1, n), torch.linspace(0.5, -0.5, n))
        results.append((sums, moments, e, u.float()))
    digits = 1e-4 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=digits, atol=digits)
    # excluded entries stay excluded
    assert (results[1][2][torch.arange(n) % rows, torch.arange(n)] == 0).all()


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_the_whole_loss_on_triton(kit: SimpleNamespace, head_options: Any, bonus: float) -> None:
    case = kit.make(v=77, **head_options(23))
    kit.check_float32(case, bonus, torch.device("cpu"), backend="triton", chunk_bytes=77 * 4 * 9)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90])
def test_the_kernels_compile_for_cuda(architecture: int) -> None:
    """Without a card: each variant becomes machine code that keeps its tile in registers (no local
    memory; at least three programs fit a multiprocessor's 65,536) and moves it in loads of 16 bytes
    a thread, once in the loop, once at its end."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, str(Path(__file__).with_name("cuda_kernels.py")), str(architecture)]
    out = subprocess.run(
        script, env=environment, capture_output=True, text=True, timeout=600, check=True
    ).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2 * 8 + 2 * 2
    for row in rows:
        assert row["local"] == 0 and row["stack"] <= 8 and row["reg"] * 128 * 3 <= 65_536, row
        assert row["wide_loads"] == 2 * row["wide_loads_of_a_tile"], row


def test_a_useless_shift_is_recomputed_on_triton(kit: SimpleNamespace) -> None:
    case = kit.make()
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    small = case.to(torch.float32)
    stats = linear_logprob(
        small.hidden, small.weight, case.targets, shift=logp - 90, backend="triton"
    )
    torch.testing.assert_close(stats.logp, logp.float(), rtol=1e-5, atol=1e-5)
