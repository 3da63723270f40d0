"""The device as torch-npu shows it to emberl: names, memory, streams, process groups, schemas.

Over stand-ins: they show that names, signatures and calls exist and what torch-npu makes of them in
memory. They show no HCCL, no kernel, no time, and that a card has 64 GB is invented.
"""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_npu
from emberl.kernels import ascend, platform
from emberl.rl.learner import memory
from emberl.rl.watch.doctor_ascend import build
from emberl.rl.watch.doctor_ascend_driver import MATRIX
from emberl.rl.watch.machine import Machine

SHOWS = {
    "device, memory, streams, host-pinned memory": "test_the_platform_finds_it, test_memory_and_streams",
    "an hccl process group is made (its communicator is not)": "test_an_hccl_group_is_made",
    "schemas of every operator called, torch-npu 2.13 and 2.10.0.post4": (
        "test_operators_have_the_schemas_that_are_called, test_adamw_is_one_operator"
    ),
    "doctor's version table against vllm-ascend's wheel": "test_the_doctors_table_is_the_wheels",
}
NPU = platform.NPU


def test_the_platform_finds_it() -> None:
    platform.detect.cache_clear()
    assert platform.named("auto") is NPU
    assert platform.device_of_process(NPU) == torch.device("npu", 0)
    assert platform.device_name(NPU) == "Ascend910B3"
    assert str(platform.device_name(NPU)).startswith(ascend.A2.soc)
    assert platform.compute_dtype("auto", NPU) == torch.bfloat16
    assert dist.get_default_backend_for_device("npu") == NPU.collective


def test_memory_and_streams() -> None:
    before = torch.npu.memory_allocated()
    held = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    taken = torch.npu.memory_allocated() - before
    assert 1 << 20 <= taken <= (1 << 20) + 1024, "rounded up"
    statistics = platform.memory_statistics(NPU)
    assert statistics["perf/max_memory_allocated_gb"] >= 2**20 / 1e9
    del held
    after = platform.memory_statistics(NPU)
    assert after["perf/max_memory_allocated_gb"] <= statistics["perf/max_memory_allocated_gb"]
    assert memory.free_memory(NPU) == 60 << 30, "what the stand-in says"
    x = torch.arange(8.0)
    assert torch.equal(x.to("npu", non_blocking=True).cpu(), x)
    assert x.pin_memory().is_pinned()
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
    stream.synchronize()
    torch.accelerator.synchronize()


def test_what_is_not_intercepted_is_refused() -> None:
    """A value can come from nowhere but the CPU's references."""
    with pytest.raises(RuntimeError):
        (torch.ones(3).to("npu") + 1).cpu()


def test_an_hccl_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(
        NPU.collective, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    try:
        assert dist.get_backend() == "hccl"
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        group = platform.process_group(NPU, store, 0, 1, "beside", 30.0)
        assert group is not None
        with pytest.raises(RuntimeError):  # the first collective would make the communicator
            dist.all_reduce(torch.empty(4, device="npu"))
    finally:
        dist.destroy_process_group()


CALLED = {
    "npu_rms_norm": ("Tensor", "Tensor gamma", "float epsilon"),
    "npu_swiglu": ("Tensor", "int dim"),
    "npu_rotary_mul": ("Tensor", "Tensor r1", "Tensor r2"),
    "npu_fusion_attention": (
        "Tensor query", "Tensor key", "Tensor value", "int head_num", "str input_layout",
    ),
}  # fmt: skip
"""What is given by position, and begins with."""
BY_NAME = {
    "npu_fusion_attention": {
        "atten_mask",
        "scale",
        "actual_seq_qlen",
        "actual_seq_kvlen",
        "sparse_mode",
    }
}


def older(name: str) -> str:
    """The schema in the files of the 2.10.0.post4 wheel, which cannot be loaded beside this one."""
    folder = (
        Path(torch_npu.__file__).parents[2] / "torch-npu-2.10.0" / "torch_npu" / "csrc" / "aten"
    )
    if not folder.exists():
        pytest.skip("the wheel of torch-npu 2.10.0.post4 could not be had")
    text = "".join(path.read_text() for path in folder.glob("*.yaml"))
    return re.findall(rf"func: ({name}\(.*?\) -> .*)", text)[0]


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("version", ["2.13.0", "2.10.0.post4"])
def test_operators_have_the_schemas_that_are_called(name: str, version: str) -> None:
    assert f"npu::{name}" in ascend.OPERATORS.values()
    schema = (
        str(getattr(torch.ops.npu, name).default._schema) if version == "2.13.0" else older(name)
    )
    given = re.split(r", (?=\w)", schema[schema.index("(") + 1 : schema.rindex(") ->")])
    for argument, wanted in zip(given, CALLED[name], strict=False):
        assert argument.startswith(wanted), f"{argument} is given {wanted}"
    names = {re.split(r"[ =]", argument.split("=")[0].strip())[-1] for argument in given}
    assert BY_NAME.get(name, set()) <= names


@pytest.mark.parametrize("version", ["2.13.0", "2.10.0.post4"])
def test_adamw_is_one_operator(version: str) -> None:
    """torch's own fused AdamW, which the learner asks for."""
    if version == "2.13.0":
        has = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")
        assert has
    else:
        assert "Tensor[] state_steps" in older("_fused_adamw_")


@pytest.mark.parametrize("version", ["0.23.0", "0.26.0rc1"])
def test_the_doctors_table_is_the_wheels(version: str) -> None:
    """A row against what that vllm-ascend asks for, and its build information as the doctor reads
    it. CANN's version is in no wheel."""
    wheel = Path(torch_npu.__file__).parents[2] / f"vllm-ascend-{version}"
    if not wheel.exists():
        pytest.skip(f"the wheel of vllm-ascend {version} could not be had")
    [row] = [row for row in MATRIX if row.vllm_ascend == version]
    text = next(wheel.glob("*.dist-info/METADATA")).read_text()
    asked = dict(re.findall(r"^Requires-Dist: ([\w-]+)==(\S+)$", text, re.MULTILINE))
    assert asked["torch"] == row.torch and asked["torch-npu"] == row.torch_npu
    assert asked["transformers"] == row.transformers
    assert asked["triton-ascend"] == row.triton_ascend
    machine = Machine(None, {})
    machine.package = lambda name: str(wheel / "vllm_ascend")  # type: ignore[method-assign]
    machine.output = lambda *_: "| 0     Ascend910       | OK |"  # type: ignore[method-assign]
    [check] = build(machine)
    assert check.text == "vllm-ascend is built for A2, this box is an A3 (910C)"
