"""Faults planted in a faked, healthy Ascend box (`planted.py`): each is found, named, and has its
fix."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from emberl.kernels import ascend
from emberl.rl.watch import doctor
from emberl.rl.watch.doctor_ascend import ASCEND
from emberl.rl.watch.doctor_ascend_driver import field, number
from emberl.rl.watch.doctor_ascend_hccl import _chosen
from emberl.rl.watch.machine import Check, Machine, State, examined

planted: Any = sys.modules["planted"]  # `conftest.py` has loaded it
Box, FAULTS, A3_SMI, STATUS = planted.Box, planted.FAULTS, planted.A3_SMI, planted.STATUS
SHOWS = {
    "doctor: faults of versions, cards, settings and networks are found with their fixes (a faked box)": (
        "test_a_planted_fault_is_found_with_its_fix, test_a_healthy_box_has_no_fault,"
        " test_what_only_looks_like_a_fault_is_none"
    ),
}
OK, WARNING, ERROR = State.OK, State.WARNING, State.ERROR


def look(machine: Machine) -> list[Check]:
    return list(examined(machine, ASCEND))


def found(machine: Machine) -> list[Check]:
    return [check for check in look(machine) if check.state is not OK]


def test_a_healthy_box_has_no_fault() -> None:
    assert found(Box()) == []
    names = [check.name for check in look(Box())]
    assert {"driver", "firmware", "CANN", "torch", "torch-npu", "vllm", "cards"} <= set(names)


def test_other_machines_hear_nothing_of_it() -> None:
    bare = Box(None)
    bare.folders["/dev"], bare.programs, bare.versions = ["null"], {}, {"torch": "2.13.0"}
    assert look(bare) == []
    cuda = Box(overrides=("cluster.device=cuda",))
    assert look(cuda) == []


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_found_with_its_fix(
    fault: tuple[str, Any, tuple[str, ...], str, State, str],
) -> None:
    _, plant, overrides, name, state, fix = fault
    box = Box(overrides=overrides)
    plant(box)
    named = [check for check in found(box) if check.name == name]
    assert len(named) == 1, [str(check) for check in found(box)]
    assert named[0].state is state and fix in named[0].fix, str(named[0])
    assert named[0].text, "what was found"


def test_there_are_more_than_thirty_and_no_examination_is_without_one() -> None:
    assert len({fault[0] for fault in FAULTS}) == len(FAULTS) >= 30
    silent = set(range(len(ASCEND)))
    for _, plant, overrides, *_ in FAULTS:
        box = Box(overrides=overrides)
        plant(box)
        for i in list(silent):
            if any(check.state is not OK for check in ASCEND[i](box)):
                silent.discard(i)
    assert not silent


def test_a_box_of_910c_is_healthy_with_its_own_wheel() -> None:
    box = Box("2x16_910c_qwen3_30b")
    box.outputs |= {"npu-smi": A3_SMI, "ray": STATUS.replace("0.0/8.0", "0.0/32.0")}
    box.folders["/dev"] += [f"davinci{n}" for n in range(8, 16)]
    box.files["/site/vllm_ascend/_build_info.py"] = "__device_type__ = 'A3'\n"
    assert found(box) == []


def test_a_package_has_one_line_and_the_fix_for_npus() -> None:
    box = Box()
    box.versions["vllm"] = None
    box.requirements = lambda: ("vllm>=0.23; extra == 'vllm'",)  # type: ignore[method-assign]
    lines = [c for c in (*doctor.packages(box), *look(box)) if c.name == "vllm"]
    assert len(lines) == 1 and "VLLM_TARGET_DEVICE=empty" in lines[0].fix


def test_torch_may_be_newer_where_no_vllm_ascend_holds_it_back() -> None:
    """The learner and the embedded engine run on torch 2.10 to 2.13."""
    box = Box(overrides=("rollout.engine=embedded", "rollout.engine_args={}"))
    box.versions |= {"torch": "2.13.0", "torch-npu": "2.13.0", "vllm-ascend": None, "vllm": None}
    assert {c.name: c.state for c in found(box)} == {"torch": WARNING, "torch-npu": WARNING}


def test_without_a_configuration_what_only_some_runs_need_is_a_warning() -> None:
    box = Box(None)
    box.outputs["npu-smi"], box.versions["vllm"] = None, None
    assert {check.name: check.state for check in found(box)} == {"driver": WARNING, "vllm": WARNING}


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("25.3.rc1", (25, 3)),
        ("8.5.0", (8, 5, 0)),
        ("8.3.RC2", (8, 3)),
        ("x", None),
        ("25.0.rc1.1", (25, 0)),
        ("25.5.0.b061", (25, 5, 0)),
        ("9.1.0-beta.3", (9, 1, 0)),
    ],
)
def test_versions_as_huawei_writes_them(text: str, release: tuple[int, ...] | None) -> None:
    read = number(text)
    assert (read.release if read else None) == release


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("runtime_running_version=[7.5.0.1.129:8.0.RC3]\n", "runtime_running_version", "8.0.RC3"),
        ("Version=8.2.0.0.201\nversion_dir=8.2.RC1\n", "version_dir", "8.2.RC1"),
        (planted.BOARD.format("NOK"), "Compatibility", "NOK"),
        (planted.BOARD.format("OK"), "Firmware Version", "7.8.0.5.216"),
        ("package_name=x\n", "version", None),
    ],
)
def test_what_files_and_tools_say_is_read(text: str, name: str, found: str | None) -> None:
    assert field(text, name) == found


def test_firmware_in_its_drivers_range_is_well_without_npu_smi() -> None:
    """As on a box whose npu-smi says nothing of the pair: the driver's own file names a range."""
    box = Box()
    box.outputs["npu-smi info -t board -i 0"] = None
    [line] = [check for check in look(box) if check.name == "firmware"]
    assert line.state is OK and "7.0.0 to 8.9.9" in line.text


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("eth", ["eth0", "eth1"]), ("=eth0", ["eth0"]), ("=eth", []), ("^eth", ["lo"]),
        ("^=eth0", ["eth1", "lo"]), ("ib,eth1", ["eth1"]), ("^docker", ["eth0", "eth1", "lo"]),
    ],
)  # fmt: skip
def test_interfaces_as_hccl_reads_them(given: str, chosen: list[str]) -> None:
    assert _chosen(given, ["eth0", "eth1", "lo"], prefixes=True) == chosen


@pytest.mark.parametrize("given", ["eth0,lo", "lo"])
def test_gloo_takes_names(given: str) -> None:
    assert _chosen(given, ["eth0", "lo"], prefixes=False) == sorted(given.split(","))
    assert _chosen("eth", ["eth0", "lo"], prefixes=False) == []


def test_what_only_looks_like_a_fault_is_none() -> None:
    """Settings that others use and that are right."""
    box = Box("16x910b_qwen3_32b")
    box.outputs["ray"] = STATUS.replace("0.0/8.0", "0.0/16.0")
    box.environ.update(  # type: ignore[attr-defined]
        HCCL_SOCKET_IFNAME="^docker", GLOO_SOCKET_IFNAME="eth0", HCCL_BUFFSIZE="200",
        HCCL_HOST_SOCKET_PORT_RANGE="61000-61050", HCCL_NPU_SOCKET_PORT_RANGE="61000,61050-61100",
        HCCL_EXEC_TIMEOUT="0", ASCEND_RT_VISIBLE_DEVICES="0,1,2,3,4,5,6,7",
        LD_PRELOAD="/usr/lib/libjemalloc.so.2", HCCL_IF_IP="10.0.0.7",
    )  # fmt: skip
    assert found(box) == []
    eager = Box(overrides=(*planted.EAGER, *planted.LESS))  # emberl's own choice with 0.23
    eager.environ["TASK_QUEUE_ENABLE"] = "2"  # type: ignore[index]
    assert found(eager) == []


def test_what_emberl_sets_itself_is_no_fault() -> None:
    """The doctor and the environment of actors agree."""
    for role in ("learner", "rollout"):
        box = Box(None)
        added = ascend.environment(role, {})
        # of the task queue and the allocator each role has its own, which are not for all
        for name in ("TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF"):
            added.pop(name, None)
        box.environ.update(added)  # type: ignore[attr-defined]
        assert found(box) == []
