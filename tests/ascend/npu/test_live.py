"""`emberl doctor --live` on an NPU, as far as stand-ins of CANN go: a product and a learner with
values of the CPU, and what the doctor says where a device computes nothing, or a collective's
communicator cannot be made. No rate that is measured here means anything.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401 -- registers the device
from emberl.kernels import ascend, platform
from emberl.rl.data.tiny import make_tiny
from emberl.rl.watch import doctor_live
from emberl.rl.watch import live_parts as live
from emberl.rl.watch.machine import Machine, State
from emberl.rollout.engine import WorkerSpec
from references import REFERENCES, alone
from values import ByTheCPU

SHOWS = {
    "doctor --live: a product, and a learner against an engine, on npu:0 (values of the CPU)": (
        "test_a_product_on_every_card, test_a_learner_against_an_engine"
    ),
    "doctor --live: a dead device and a communicator that cannot be made are said": (
        "test_a_device_that_computes_nothing_is_said, test_a_collective_that_cannot_be_is_said"
    ),
}


def test_a_product_on_every_card() -> None:
    with ByTheCPU() as mode:
        found = live.products("npu", 64)
    assert found["device"] == "Ascend910B3" and found["peak"] == 313e12
    assert found["dtype"] == "bfloat16" and list(found["rates"]) == ["0"]
    assert found["rates"]["0"] > 0
    products = sum(mode.seen.get(f"aten::{name}", 0) for name in ("mm", "matmul"))
    assert products == 6, "five rounds and one before"


def test_a_learner_against_an_engine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded engine decodes on the CPU in float32, the learner of npu:0 runs its fused layers
    in bfloat16: what is between them is rounding, and one matrix that is not the file's shows."""
    alone(monkeypatch)
    ascend._triangle.cache_clear()
    model = str(make_tiny(tmp_path, live.TINY, seed=0))
    spec = WorkerSpec(
        model_path=model, device="cpu", dtype="float32", threads=1, max_num_seqs=16,
        max_model_len=live.PROMPT + live.ANSWER + 1, run_id="doctor", timeout=60.0,
    )  # fmt: skip
    groups = asyncio.run(live._decode(spec, {}))
    with ByTheCPU(REFERENCES) as mode:
        found = live._compared(platform.PLATFORMS["npu"], model, "bfloat16", 1, 60.0, groups)
    assert mode.seen[ascend.OPERATORS["attention"]] > 0
    healthy = {"start_seconds": 1.0, "tokens_per_second": 1.0, "dtype": "bfloat16", **found}
    assert [c.state for c in doctor_live.judged(healthy, "embedded", 60.0)] == [State.OK] * 2
    load = live.LearnerRank.load

    def altered(self: Any, path: str) -> None:
        load(self, path)
        for name, parameter in self.policy.named_parameters():
            if name.endswith("layers.0.mlp.down_proj.weight"):
                parameter.detach().to_local().zero_()

    monkeypatch.setattr(live.LearnerRank, "load", altered)
    with ByTheCPU(REFERENCES):
        found = live._compared(platform.PLATFORMS["npu"], model, "bfloat16", 1, 60.0, groups)
    _, line = doctor_live.judged(healthy | found, "embedded", 60.0)
    assert line.state is State.ERROR, str(line)


class Npu(Machine):
    """This machine, with what it says of NPUs."""

    def listing(self, folder: str) -> list[str]:
        return ["davinci_manager"] if folder == "/dev" else super().listing(folder)


def test_a_device_that_computes_nothing_is_said() -> None:
    [line] = doctor_live.products(Npu(None, os.environ))
    assert line.state is State.ERROR and "npu-smi info" in line.fix
    assert "Error" in line.text, str(line)


def test_a_collective_that_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, each on its card, meet; HCCL's communicator is made by the first collective."""
    monkeypatch.setattr(doctor_live, "COLLECTIVES", 120.0)
    machine = Npu(None, os.environ | {"EMBERL_STUB_DEVICES": "2"})
    [line] = doctor_live.collectives(machine)
    assert line.state is State.ERROR and line.text.startswith("rank "), str(line)
    assert "HCCL_SOCKET_IFNAME" in line.fix


def test_a_link_is_known_by_the_devices_name() -> None:
    assert ascend.generation_of(torch.npu.get_device_name()) is ascend.A2
    assert ascend.generation_of("Ascend910_9382") is ascend.A3
    assert ascend.generation_of("NVIDIA H200") is None
