"""Two ranks that share the vocabulary give what one rank gives, by sums alone."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from emberl.kernels.loss.fused_loss import linear_loss

WORLD = 2


def _rank(rank: int, folder: str, case: Any, loss: Any, shift: torch.Tensor, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    calls: list[str] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        calls.append(str(op))
        return original(tensor, op=op, group=group)

    dist.all_reduce = counted
    weight = case.weight.chunk(WORLD)[rank].clone().requires_grad_()
    bias = case.bias.chunk(WORLD)[rank].clone().requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    value, stats, metrics = linear_loss(
        hidden, weight, case.targets, loss, bias=bias, shift=shift, group=dist.group.WORLD, chunk_bytes=18 * 8 * 12
    )
    value.backward()
    torch.save(
        {"value": value.detach(), "dh": hidden.grad, "dw": weight.grad, "db": bias.grad, "logp": stats.logp,
         "entropy": stats.entropy, "recomputed": metrics["actor/head_recomputed"].sum(), "calls": calls},
        f"{out}/{rank}.pt",
    )  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, -90.0], ids=["good shift", "useless shift"])
def test_two_ranks_equal_one(kit: SimpleNamespace, tmp_path: Path, offset: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    case = kit.make(23, 8, 36, bias=True)
    loss = kit.clipped(case, bonus=0.2)
    logp, entropy = kit.oracle(case, case.hidden, case.weight, case.bias)
    value, (dh, dw, db) = kit.oracle_gradients(case, loss)
    context = mp.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path), case, loss, loss.old + offset, str(tmp_path)))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for one in got:
        torch.testing.assert_close(one["value"], value.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one["logp"], logp, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one["entropy"], entropy, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one["dh"], dh, rtol=1e-9, atol=1e-12)
        assert one["recomputed"] == (0 if offset == 0 else 23)
    torch.testing.assert_close(torch.cat([one["dw"] for one in got]), dw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([one["db"] for one in got]), db, rtol=1e-9, atol=1e-12)
    # the target logits of the batch, then for each of two chunks the sums and the gradient by hidden; never a MAX
    assert all("SUM" in call for call in got[0]["calls"])
    if offset == 0:
        assert len(got[0]["calls"]) == 1 + 2 * 2
