"""Faults planted in a faked, healthy Ascend box: each is found, named, and has its fix.

The box is made of what the tools print in public reports (`npu-smi info` of A2 and A3, version
files, `ray status`). None of it was recorded here: no NPU is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emberl.kernels import ascend
from emberl.rl.config.load import load_config
from emberl.rl.watch import doctor
from emberl.rl.watch.doctor_ascend import ASCEND, MATRIX, number
from emberl.rl.watch.machine import Check, Machine, State, examined

ROOT = Path(__file__).parents[3]
OK, WARNING, ERROR = State.OK, State.WARNING, State.ERROR
GIB = 1 << 30
ROW = """\
| {n}     {kind}               | {health:15} | 97.4        35                0    / 0             |
| {n}                         | 0000:C{n}:00.0  | 0           0    / 0          {used} / 65536         |
"""
STATUS = "Resources\n Total Usage:\n 0.0/192.0 CPU\n 0.0/8.0 NPU\n"


def smi(kind: str = "910B3", count: int = 8, health: str = "OK", used: int = 3134) -> str:
    rows = [
        ROW.format(n=n, kind=kind, health=health if n == 3 else "OK", used=used)
        for n in range(count)
    ]
    return "| npu-smi 25.5.0                   Version: 25.5.0          |\n" + "".join(rows)


class Box(Machine):
    """A healthy A2 box with the versions of the first row, where a run's own file is to be run."""

    def __init__(
        self, name: str | None = "8x910b_qwen2.5_7b", overrides: tuple[str, ...] = ()
    ) -> None:
        config = None
        if name is not None:
            config = load_config(ROOT / "configs" / "ascend" / f"{name}.yaml", list(overrides))
        super().__init__(
            config,
            {
                "ASCEND_HOME_PATH": "/cann",
                "ATB_HOME_PATH": "/atb",
                "LD_PRELOAD": "libjemalloc.so.2",
            },
        )
        first = MATRIX[0]
        self.running = "3.11.9"
        self.versions: dict[str, str | None] = {
            "torch": "2.10.0+cpu",
            "torch-npu": first.torch_npu,
            "vllm": "0.23.0+empty",
            "vllm-ascend": first.vllm_ascend,
            "transformers": first.transformers,
            "triton-ascend": first.triton_ascend,
            "numpy": "2.2.6",
        }
        self.files = {
            "/usr/local/Ascend/driver/version.info": "Version=25.5.0\nascendhal_version=7.35\n",
            "/usr/local/Ascend/firmware/version.info": "Version=7.8.0.5.216\n",
            "/cann/ascend_toolkit_install.info": "package_name=Ascend-cann-toolkit\nversion=9.1.0\n",
            "/site/vllm_ascend/_build_info.py": "__device_type__ = 'A2'\n",
            "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
            "/proc/mounts": "overlay / overlay rw 0 0\nserver:/x /share nfs4 rw 0 0\n",
        }
        self.folders = {
            "/dev": [
                "davinci_manager",
                "devmm_svm",
                "hisi_hdc",
                *(f"davinci{n}" for n in range(8)),
            ],
            "/site/triton/backends": ["ascend"],
            "/site/vllm_ascend": ["vllm_ascend_C.cpython-311.so"],
            "/sys/class/net": ["eth0", "lo"],
        }
        self.outputs: dict[str, str | None] = {
            "npu-smi": smi(), "getconf": "glibc 2.35\n", "ray": STATUS,
            "hccn_tool": "link status: UP\n",
        }  # fmt: skip
        self.programs = {"npu-smi": "/usr/local/bin/npu-smi", "clang": "/usr/bin/clang"}
        self.shared = 64 * GIB
        self.closed: set[str] = set()

    def python(self) -> str:
        return self.running

    def version(self, package: str) -> str | None:
        return self.versions.get(package)

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def listing(self, folder: str) -> list[str]:
        return self.folders.get(folder, [])

    def package(self, name: str) -> str | None:
        return {"triton": "/site/triton", "vllm_ascend": "/site/vllm_ascend"}.get(name)

    def output(self, *command: str) -> str | None:
        return self.outputs.get(command[0])

    def which(self, program: str) -> str | None:
        return self.programs.get(program)

    def writable(self, path: str) -> bool:
        return path not in self.closed

    def free(self, path: str) -> int:
        return self.shared


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


Plant = Callable[[Box], Any]


def env(**values: str) -> Plant:
    return lambda box: box.environ.update(values)  # type: ignore[attr-defined]


def versions(**values: str | None) -> Plant:
    return lambda box: box.versions.update({k.replace("_", "-"): v for k, v in values.items()})


def files(**values: str) -> Plant:
    paths = {
        "driver": "/usr/local/Ascend/driver/version.info",
        "cann": "/cann/ascend_toolkit_install.info",
        "build": "/site/vllm_ascend/_build_info.py",
    }
    return lambda box: box.files.update({paths[k]: v for k, v in values.items()})


def tool(**values: str | None) -> Plant:
    names = {"npu_smi": "npu-smi"}
    return lambda box: box.outputs.update({names.get(k, k): v for k, v in values.items()})


def folder(path: str, *names: str) -> Plant:
    return lambda box: box.folders.update({path: list(names)})


def without(path: str, name: str) -> Plant:
    return lambda box: box.folders[path].remove(name)


A3_SMI = smi("Ascend910", 16)
COLOCATED = ("cluster.colocated=true", "cluster.learners=8", "cluster.rollouts=8",
             "schedule.max_staleness=0")  # fmt: skip
CLUSTER = ("cluster.address=10.0.0.1:6379",)
EAGER = ("rollout.engine_args.enforce_eager=true",)
LESS = ("rollout.max_num_seqs=512",)
NZ = ("rollout.engine_args.additional_config.weight_nz_mode=1",)

FAULTS: list[tuple[str, Plant, tuple[str, ...], str, State, str]] = [
    # what is wrong, how it is planted, overrides, the check's name, state, a part of its fix
    ("no driver", tool(npu_smi=None), (), "driver", ERROR, "/usr/local/Ascend/driver"),
    ("an old driver", files(driver="Version=24.1.rc2\n"), (), "driver", WARNING, "25.3.rc1"),
    ("a driver of unknown version", lambda b: (b.files.pop("/usr/local/Ascend/driver/version.info"),
     b.outputs.update({"npu-smi": smi().replace("npu-smi 25.5.0", "")})), (), "driver", WARNING, "version.info"),
    ("no CANN", lambda b: b.environ.pop("ASCEND_HOME_PATH"), (), "CANN", ERROR, "quay.io/ascend/cann"),
    ("set_env.sh was not sourced", lambda b: (b.environ.pop("ASCEND_HOME_PATH"),
     b.folders.update({"/usr/local/Ascend/cann": ["bin"]})), (), "CANN", ERROR, "set_env.sh"),
    ("another CANN", files(cann="version=8.5.0\n"), (), "CANN", WARNING, "install CANN 9.1.0"),
    ("a CANN of unknown version", files(cann=""), (), "CANN", WARNING, "9.1.0"),
    ("nnal was not sourced", lambda b: b.environ.pop("ATB_HOME_PATH"), (), "NNAL/ATB", WARNING, "nnal/atb/set_env.sh"),
    ("no torch-npu", versions(torch_npu=None), (), "torch-npu", ERROR, "torch-npu==2.10.0.post4"),
    ("a torch ahead of torch-npu", versions(torch="2.13.0"), (), "torch pair", ERROR, "torch==2.10.0"),
    ("a torch-npu ahead of vllm-ascend", versions(torch="2.13.0", torch_npu="2.13.0"), (), "torch-npu", ERROR, "2.10.0.post4"),
    ("an early post release", versions(torch_npu="2.10.0.post2"), (), "torch-npu", ERROR, "2.10.0.post4"),
    ("torch for CUDA", versions(torch="2.10.0+cu128"), (), "torch", ERROR, "whl/cpu"),
    ("no vLLM", versions(vllm=None), (), "vllm", ERROR, "VLLM_TARGET_DEVICE=empty"),
    ("another vLLM", versions(vllm="0.32.0"), (), "vllm", ERROR, "v0.23.0"),
    ("no vllm-ascend", versions(vllm_ascend=None), (), "vllm-ascend", ERROR, "vllm-ascend==0.23.0"),
    ("another transformers", versions(transformers="5.24.0"), (), "transformers", WARNING, "transformers==5.5.4"),
    ("an old triton-ascend", versions(triton_ascend="3.2.0"), (), "triton-ascend", WARNING, "triton-ascend==3.2.2"),
    ("no triton-ascend", versions(triton_ascend=None), (), "triton-ascend", ERROR, "mirrors.huaweicloud.com"),
    ("stock triton shadows it", versions(triton="3.6.0"), (), "triton", ERROR, "pip uninstall -y triton"),
    ("a hollow triton", folder("/site/triton/backends"), (), "triton", ERROR, "--no-deps triton-ascend"),
    ("numpy 2.4", versions(numpy="2.4.1"), (), "numpy", ERROR, "numpy>=2,<2.3"),
    ("no clang", lambda b: b.programs.pop("clang"), (), "clang", WARNING, "clang-15"),
    ("Python 3.13", lambda b: setattr(b, "running", "3.13.1"), (), "python for NPUs", WARNING, "3.12"),
    ("an old glibc", tool(getconf="glibc 2.31\n"), (), "glibc", ERROR, "Ubuntu 22.04"),
    ("a wheel for A2 on an A3", tool(npu_smi=A3_SMI), (), "vllm-ascend for", ERROR, "v0.23.0-a3"),
    ("no compiled operators", folder("/site/vllm_ascend", "envs.py"), (), "vllm-ascend C", WARNING, "reinstall"),
    ("no compiled operators, and engines sleep", folder("/site/vllm_ascend"), COLOCATED, "vllm-ascend C", ERROR, "reinstall"),
    ("no cards in the container", folder("/dev", "null"), (), "cards", ERROR, "--device=/dev/davinci0"),
    ("a device file of the driver is missing", without("/dev", "hisi_hdc"), (), "cards", ERROR, "--device=/dev/hisi_hdc"),
    ("cards that are not the user's", lambda b: b.closed.add("/dev/davinci0"), (), "cards", ERROR, "HwHiAiUser"),
    ("fewer cards than the placement", without("/dev", "davinci7"), (), "placement", ERROR, "cluster.learners"),
    ("a sick card", tool(npu_smi=smi(health="Alarm")), (), "card 3", ERROR, "reset"),
    ("somebody on the cards", tool(npu_smi=smi(used=50123)), (), "HBM", WARNING, "npu-smi info"),
    ("NOSET", env(RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES="1"), (),
     "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", ERROR, "unset"),
    ("too few visible cards", env(ASCEND_RT_VISIBLE_DEVICES="0,1"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "unset"),
    ("visible cards that are no list", env(ASCEND_RT_VISIBLE_DEVICES="0-7"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "0,1,2,3"),
    ("NZ by the environment", env(VLLM_ASCEND_ENABLE_NZ="1"), (), "VLLM_ASCEND_ENABLE_NZ", ERROR, "unset"),
    ("NZ by an argument", lambda b: None, NZ, "additional_config.weight_nz_mode", ERROR, "unset"),
    ("segments that expand under sleep", env(PYTORCH_NPU_ALLOC_CONF="expandable_segments:True"), COLOCATED,
     "PYTORCH_NPU_ALLOC_CONF", ERROR, "unset"),
    ("the task queue against graphs", env(TASK_QUEUE_ENABLE="2"), (), "TASK_QUEUE_ENABLE", ERROR, "engines 1"),
    ("no task queue", env(TASK_QUEUE_ENABLE="0"), (), "TASK_QUEUE_ENABLE", WARNING, "unset"),
    ("a debugging switch", env(ASCEND_LAUNCH_BLOCKING="1"), (), "ASCEND_LAUNCH_BLOCKING", WARNING, "unset"),
    ("no graphs", lambda b: None, EAGER, "ACL graphs", WARNING, "FULL_DECODE_ONLY"),
    ("graphs that end too early", lambda b: None, LESS, "ACL graphs", WARNING, "add 512"),
    ("a timeout that HCCL refuses", env(HCCL_CONNECT_TIMEOUT="10000"), (), "HCCL_CONNECT_TIMEOUT", ERROR, "1800"),
    ("a short timeout", env(HCCL_CONNECT_TIMEOUT="120"), (), "HCCL_CONNECT_TIMEOUT", WARNING, "1800"),
    ("one port for two processes", env(HCCL_HOST_SOCKET_PORT_RANGE="60000"), (), "HCCL_HOST_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("ports that the kernel gives away", env(HCCL_IF_BASE_PORT="50000"), (), "HCCL ports", WARNING, "50000-50015"),
    ("a port that there is not", env(HCCL_IF_BASE_PORT="70000"), (), "HCCL_IF_BASE_PORT", ERROR, "unset"),
    ("an interface that there is not", env(HCCL_SOCKET_IFNAME="enp189s0f0"), (), "HCCL_SOCKET_IFNAME", ERROR, "Ray's address"),
    ("a cable that is out", tool(hccn_tool="link status: DOWN\n"), CLUSTER, "card network", ERROR, "hccn_tool"),
    ("Ray without NPUs", tool(ray="0.0/8.0 GPU\n"), CLUSTER, "Ray", ERROR, "not --num-gpus"),
    ("Ray's cards are taken", tool(ray=STATUS.replace("0.0/8.0", "6.0/8.0")), CLUSTER, "Ray", ERROR, "ray status"),
    ("little shared memory", lambda b: setattr(b, "shared", GIB), (), "/dev/shm on NPUs", WARNING, "--shm-size"),
    ("no jemalloc", lambda b: b.environ.pop("LD_PRELOAD"), (), "jemalloc", WARNING, "libjemalloc2"),
    ("checkpoints on a network disk", lambda b: None, ("run_dir=/share/run",), "checkpoints", WARNING, "local disk"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_found_with_its_fix(
    fault: tuple[str, Plant, tuple[str, ...], str, State, str],
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
    [("25.3.rc1", (25, 3)), ("8.5.0", (8, 5, 0)), ("8.3.RC2", (8, 3)), ("x", None)],
)
def test_versions_as_huawei_writes_them(text: str, release: tuple[int, ...] | None) -> None:
    read = number(text)
    assert (read.release if read else None) == release


def test_what_emberl_sets_itself_is_no_fault() -> None:
    """The doctor and the environment of actors agree."""
    for role in ("learner", "rollout"):
        box = Box(None)
        added = ascend.environment(role, {})
        if role == "learner":  # level 2 and the allocator are for this process alone
            added = {
                k: v
                for k, v in added.items()
                if k not in ("TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF")
            }
        box.environ.update(added)  # type: ignore[attr-defined]
        assert found(box) == []
