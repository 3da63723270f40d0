"""A faked, healthy Ascend box, and faults that are planted in it: each is found, named, and has its
fix (`test_doctor_ascend.py`, `test_doctor_live.py`; the table of `configs/ascend/doctor.md`).

The box is made of what the tools print in public reports (`npu-smi info` of A2 and A3, version
files, `ray status`). None of it was recorded here: no NPU is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emberl.rl.config.load import load_config
from emberl.rl.watch.doctor_ascend_driver import MATRIX
from emberl.rl.watch.doctor_live import MEAN
from emberl.rl.watch.machine import Machine, State

ROOT = Path(__file__).parents[3]
WARNING, ERROR = State.WARNING, State.ERROR
GIB = 1 << 30
ROW = """\
| {n}     {kind}               | {health:15} | 97.4        35                0    / 0             |
| {n}                         | 0000:C{n}:00.0  | 0           0    / 0          {used} / 65536         |
"""
DRIVER = "Version={0}\nascendhal_version=7.35\ncompatible_version_fw=[7.0.0,8.9.9]\npackage_version={0}\n"
BOARD = """\
        Product Name                   : IT21HMDB02-B2
        Software Version               : 25.5.0
        Firmware Version               : 7.8.0.5.216
        Compatibility                  : {}
"""
PROCESS = "| 0       0                 | 4711          | python3.11               | 5300                    |\n"
STATUS = "Resources\n Total Usage:\n 0.0/192.0 CPU\n 0.0/8.0 NPU\n"


def smi(kind: str = "910B3", count: int = 8, health: str = "OK", used: int = 3134) -> str:
    rows = [
        ROW.format(n=n, kind=kind, health=health if n == 3 else "OK", used=used)
        for n in range(count)
    ]
    return "| npu-smi 25.5.0                   Version: 25.5.0          |\n" + "".join(rows)


def healthy() -> dict[str, dict[str, Any]]:
    """What the parts of `live.py` would find on eight 910B3. The rates are made up."""
    return {
        "products": {
            "device": "Ascend910B3", "dtype": "bfloat16", "peak": 313e12,
            "rates": {str(n): 2.6e14 for n in range(8)},
        },
        "collectives": {"ranks": 8, "all_reduce": 60e9, "broadcast": 40e9, "link": 28e9},
        "engine": {
            "at": "learner", "dtype": "bfloat16", "start_seconds": 41.0, "tokens": 640,
            "tokens_per_second": 2300.0, MEAN: 0.002,
        },
    }  # fmt: skip


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
                "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1",
                "LD_LIBRARY_PATH": "/cann/lib64:/usr/local/Ascend/driver/lib64",
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
            "/usr/local/Ascend/driver/version.info": DRIVER.format("25.5.0"),
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
            "/cann": ["lib64", "bin"],
            "/site/triton/backends": ["ascend"],
            "/site/vllm_ascend": ["vllm_ascend_C.cpython-311.so"],
            "/sys/class/net": ["eth0", "lo"],
        }
        self.outputs: dict[str, str | None] = {
            "npu-smi": smi(), "npu-smi info -t board -i 0": BOARD.format("OK"), "getconf": "glibc 2.35\n", "ray": STATUS,
            "hccn_tool": "link status: UP\n",
        }  # fmt: skip
        self.programs = {"npu-smi": "/usr/local/bin/npu-smi", "clang": "/usr/bin/clang"}
        self.shared = 64 * GIB
        self.closed: set[str] = set()
        self.paths = {"/usr/lib/libjemalloc.so.2"}
        self.answers = healthy()
        self.asked: dict[str, tuple[Mapping[str, Any], float, Mapping[str, str]]] = {}

    def live(
        self, part: str, order: Mapping[str, Any], deadline: float, environ: Mapping[str, str]
    ) -> dict[str, Any]:
        self.asked[part] = (order, deadline, environ)
        return self.answers[part]

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
        return self.outputs.get(" ".join(command), self.outputs.get(command[0]))

    def exists(self, path: str) -> bool:
        return path in self.paths

    def can_listen(self, port: int = 0, host: str = "127.0.0.1") -> bool:
        return host in ("127.0.0.1", "10.0.0.7")

    def which(self, program: str) -> str | None:
        return self.programs.get(program)

    def writable(self, path: str) -> bool:
        return path not in self.closed

    def free(self, path: str) -> int:
        return self.shared


Plant = Callable[[Box], Any]


def env(**values: str) -> Plant:
    return lambda box: box.environ.update(values)  # type: ignore[attr-defined]


def versions(**values: str | None) -> Plant:
    return lambda box: box.versions.update({k.replace("_", "-"): v for k, v in values.items()})


def files(**values: str) -> Plant:
    paths = {
        "driver": "/usr/local/Ascend/driver/version.info",
        "firmware": "/usr/local/Ascend/firmware/version.info",
        "cann": "/cann/ascend_toolkit_install.info",
        "build": "/site/vllm_ascend/_build_info.py",
    }
    return lambda box: box.files.update({paths[k]: v for k, v in values.items()})


def tool(**values: str | None) -> Plant:
    names = {"npu_smi": "npu-smi"}
    return lambda box: box.outputs.update({names.get(k, k): v for k, v in values.items()})


def board(verdict: str | None) -> Plant:
    """What npu-smi says of driver and firmware; None: it does not answer that."""
    said = None if verdict is None else BOARD.format(verdict)
    return lambda box: box.outputs.update({"npu-smi info -t board -i 0": said})


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
RL_CONFIG = ("rollout.engine_args.additional_config.rl_config.enabled=true",)
OFF = ("rollout.engine_args.additional_config.rl_config.enabled=false",)


def newer(box: Box) -> None:
    """vllm-ascend 0.27.1, whose source has this class."""
    box.files["/site/vllm_ascend/ascend_config.py"] = "class RlConfig:\n    enabled: bool = False\n"


FAULTS: list[tuple[str, Plant, tuple[str, ...], str, State, str]] = [
    # what is wrong, how it is planted, overrides, the check's name, state, a part of its fix
    ("no driver", tool(npu_smi=None), (), "driver", ERROR, "/usr/local/Ascend/driver"),
    ("an old driver", files(driver=DRIVER.format("25.2.0")), (), "driver", WARNING, "25.3.rc1"),
    ("a driver that CANN does not take", files(driver=DRIVER.format("25.0.rc1.1")), (), "driver", ERROR, "25.3.rc1"),
    ("a driver of unknown version", lambda b: (b.files.pop("/usr/local/Ascend/driver/version.info"),
     b.outputs.update({"npu-smi": smi().replace("npu-smi 25.5.0", "")})), (), "driver", WARNING, "version.info"),
    ("firmware that the driver refuses", board("NOK"), (), "firmware", ERROR, "HDK 25.5.0"),
    ("firmware outside the driver's range", lambda b: (board(None)(b), files(firmware="Version=6.4.12.1.241\n")(b)), (),
     "firmware", ERROR, "HDK 25.5.0"),
    ("firmware of which the driver says nothing", lambda b: (board("UNKNOWN")(b), files(driver="Version=25.5.0\n")(b)), (),
     "firmware", WARNING, "npu-smi info -t board"),
    ("firmware of unknown version", lambda b: (board(None)(b), b.files.pop("/usr/local/Ascend/firmware/version.info")), (),
     "firmware", WARNING, "Compatibility must be OK"),
    ("no CANN", lambda b: b.environ.pop("ASCEND_HOME_PATH"), (), "CANN", ERROR, "quay.io/ascend/cann"),
    ("set_env.sh was not sourced", lambda b: (b.environ.pop("ASCEND_HOME_PATH"),
     b.folders.update({"/usr/local/Ascend/cann": ["bin"]})), (), "CANN", ERROR, "set_env.sh"),
    ("CANN older than torch-npu wants", files(cann="version=8.5.0\n"), (), "CANN", ERROR, "install CANN 9.1.0"),
    ("a newer CANN", files(cann="version=9.2.0\n"), (), "CANN", WARNING, "install CANN 9.1.0"),
    ("a CANN that is no longer there", env(ASCEND_HOME_PATH="/opt/cann-9.0"), (), "CANN", ERROR, "anew"),
    ("libraries that were set over", env(LD_LIBRARY_PATH="/opt/conda/lib"), (), "LD_LIBRARY_PATH", ERROR, "append"),
    ("nnal for old C++ names", env(ATB_HOME_PATH="/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_0"), (),
     "NNAL/ATB", ERROR, "--cxx_abi=1"),
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
    ("little of a card, but by a process of an earlier run", tool(npu_smi=smi() + PROCESS), (), "HBM", WARNING, "kill 4711"),
    ("cards of another kind", tool(npu_smi=smi("310P3")), (), "kind of card", ERROR, "A2 or A3"),
    ("the driver's own device file is not the user's", lambda b: b.closed.add("/dev/davinci_manager"), (),
     "cards", ERROR, "HwHiAiUser"),
    ("NOSET", env(RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES="1"), (),
     "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", WARNING, "unset"),
    ("too few visible cards", env(ASCEND_RT_VISIBLE_DEVICES="0,1"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "unset"),
    ("visible cards that are no list", env(ASCEND_RT_VISIBLE_DEVICES="0-7"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "0,1,2,3"),
    ("a space among visible cards", env(ASCEND_RT_VISIBLE_DEVICES="0,1,2,3, 4,5,6,7"), (),
     "ASCEND_RT_VISIBLE_DEVICES", ERROR, "no spaces"),
    ("visible cards that fall", env(ASCEND_RT_VISIBLE_DEVICES="7,6,5,4,3,2,1,0"), (),
     "ASCEND_RT_VISIBLE_DEVICES", ERROR, "ascending"),
    ("a card twice", env(ASCEND_RT_VISIBLE_DEVICES="0,1,2,2"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "ascending"),
    ("a card that there is not", env(ASCEND_RT_VISIBLE_DEVICES="0,1,2,8"), (), "ASCEND_RT_VISIBLE_DEVICES", ERROR, "0,1,2,3"),
    ("NZ by the environment", env(VLLM_ASCEND_ENABLE_NZ="1"), (), "VLLM_ASCEND_ENABLE_NZ", ERROR, "unset"),
    ("NZ by an argument", lambda b: None, NZ, "additional_config.weight_nz_mode", ERROR, "unset"),
    ("rl_config where there is none", lambda b: None, RL_CONFIG, "additional_config.rl_config", WARNING, "leave it out"),
    ("rl_config switched off", newer, OFF, "additional_config.rl_config", ERROR, "leave it out"),
    ("segments that expand under sleep", env(PYTORCH_NPU_ALLOC_CONF="expandable_segments:True"), COLOCATED,
     "PYTORCH_NPU_ALLOC_CONF", ERROR, "unset"),
    ("the task queue against graphs", lambda b: (newer(b), env(TASK_QUEUE_ENABLE="2")(b)), (), "TASK_QUEUE_ENABLE", ERROR, "engines 1"),
    ("the task queue of engines for learners, too", env(TASK_QUEUE_ENABLE="1"), (), "TASK_QUEUE_ENABLE", WARNING, "learners 2"),
    ("operators that multiply and communicate", env(VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE="1"), (),
     "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", WARNING, "unset"),
    ("no task queue", env(TASK_QUEUE_ENABLE="0"), (), "TASK_QUEUE_ENABLE", WARNING, "unset"),
    ("a debugging switch", env(ASCEND_LAUNCH_BLOCKING="1"), (), "ASCEND_LAUNCH_BLOCKING", WARNING, "unset"),
    ("CANN's logs of every launch", env(ASCEND_GLOBAL_LOG_LEVEL="1"), (), "ASCEND_GLOBAL_LOG_LEVEL", WARNING, "unset"),
    ("a part of a layer that there is not", env(EMBERL_FUSED="norms"), (), "EMBERL_FUSED", ERROR, "unset"),
    ("no graphs", newer, EAGER, "ACL graphs", WARNING, "FULL_DECODE_ONLY"),
    ("graphs that end too early", newer, LESS, "ACL graphs", WARNING, "add 512"),
    ("a timeout that HCCL refuses", env(HCCL_CONNECT_TIMEOUT="10000"), (), "HCCL_CONNECT_TIMEOUT", ERROR, "1800"),
    ("a short timeout", env(HCCL_CONNECT_TIMEOUT="120"), (), "HCCL_CONNECT_TIMEOUT", WARNING, "1800"),
    ("one port for two processes", env(HCCL_HOST_SOCKET_PORT_RANGE="60000"), (), "HCCL_HOST_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("one port of the cards", env(HCCL_NPU_SOCKET_PORT_RANGE="61000"), (), "HCCL_NPU_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("ranges of ports that overlap", env(HCCL_NPU_SOCKET_PORT_RANGE="61000-61050,61040-61100"), (),
     "HCCL_NPU_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("a range backwards", env(HCCL_HOST_SOCKET_PORT_RANGE="61050-61000"), (), "HCCL_HOST_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("ports of the system", env(HCCL_HOST_SOCKET_PORT_RANGE="1000-1100"), (), "HCCL_HOST_SOCKET_PORT_RANGE", ERROR, "auto"),
    ("a range that the kernel gives away", env(HCCL_HOST_SOCKET_PORT_RANGE="40000-40050"), (),
     "HCCL ports", WARNING, "40000-40050"),
    ("a collective's short deadline", env(HCCL_EXEC_TIMEOUT="60"), (), "HCCL_EXEC_TIMEOUT", WARNING, "3600"),
    ("a deadline in words", env(HCCL_EXEC_TIMEOUT="1h"), (), "HCCL_EXEC_TIMEOUT", ERROR, "3600"),
    ("buffers as large as a model", env(HCCL_BUFFSIZE="4096"), (), "HCCL_BUFFSIZE", WARNING, "unset"),
    ("buffers of no size", env(HCCL_BUFFSIZE="2G"), (), "HCCL_BUFFSIZE", ERROR, "unset"),
    ("an order of sums that HCCL does not know", env(HCCL_DETERMINISTIC="1"), (), "HCCL_DETERMINISTIC", ERROR, "=true"),
    ("ports that the kernel gives away", env(HCCL_IF_BASE_PORT="50000"), (), "HCCL ports", WARNING, "50000-50015"),
    ("a port that there is not", env(HCCL_IF_BASE_PORT="70000"), (), "HCCL_IF_BASE_PORT", ERROR, "unset"),
    ("an interface that there is not", env(HCCL_SOCKET_IFNAME="enp189s0f0"), (), "HCCL_SOCKET_IFNAME", ERROR, "Ray's address"),
    ("an interface's name in full that is none", env(HCCL_SOCKET_IFNAME="=eth"), (), "HCCL_SOCKET_IFNAME", ERROR, "unset"),
    ("a beginning for Gloo, which takes names", env(GLOO_SOCKET_IFNAME="eth"), (), "GLOO_SOCKET_IFNAME", ERROR, "unset"),
    ("loopback between machines", env(HCCL_SOCKET_IFNAME="lo"), CLUSTER, "HCCL_SOCKET_IFNAME", ERROR, "Ray's address"),
    ("the address of another machine", env(HCCL_IF_IP="10.0.0.1"), (), "HCCL_IF_IP", ERROR, "unset"),
    ("an address that is none", env(HCCL_IF_IP="eth0"), (), "HCCL_IF_IP", ERROR, "unset"),
    ("loopback as a machine's address", env(HCCL_IF_IP="127.0.0.1"), CLUSTER, "HCCL_IF_IP", ERROR, "unset"),
    ("a cable that is out", tool(hccn_tool="link status: DOWN\n"), CLUSTER, "card network", ERROR, "hccn_tool"),
    ("Ray without NPUs", tool(ray="0.0/8.0 GPU\n"), CLUSTER, "Ray", ERROR, "not --num-gpus"),
    ("Ray's cards are taken", tool(ray=STATUS.replace("0.0/8.0", "6.0/8.0")), CLUSTER, "Ray", ERROR, "ray status"),
    ("a machine that has not joined", lambda b: None, (*CLUSTER, "cluster.learners=12"), "Ray", ERROR, "--address=HEAD:6379"),
    ("little shared memory", lambda b: setattr(b, "shared", GIB), (), "/dev/shm on NPUs", WARNING, "--shm-size"),
    ("no jemalloc", lambda b: b.environ.pop("LD_PRELOAD"), (), "jemalloc", WARNING, "libjemalloc2"),
    ("jemalloc where there is none", env(LD_PRELOAD="/usr/lib64/libjemalloc.so.2"), (), "LD_PRELOAD", WARNING, "apt install"),
    ("checkpoints on a network disk", lambda b: None, ("run_dir=/share/run",), "checkpoints", WARNING, "local disk"),
]  # fmt: skip


def finds(part: str, **values: Any) -> Plant:
    return lambda box: box.answers[part].update(values)


def fails(part: str, error: str, at: str = "") -> Plant:
    return lambda box: box.answers.update({part: {"error": error} | ({"at": at} if at else {})})


HUNG = "no answer in {} s"
LIVE_FAULTS: list[tuple[str, Plant, tuple[str, ...], str, State, str]] = [
    ("a card that refuses to compute", fails("products", "RuntimeError: ACL error 507015"), (), "products", ERROR, "set_env.sh"),
    ("a product that never ends", fails("products", HUNG.format(180)), (), "products", ERROR, "npu-smi info"),
    ("a third of the data sheet", finds("products", rates={str(n): 1.0e14 for n in range(8)}), (),
     "products", WARNING, "throttled"),
    ("a hundredth of the data sheet", finds("products", rates={str(n): 3.0e12 for n in range(8)}), (),
     "products", ERROR, "throttled"),
    ("one slow card of eight", lambda b: b.answers["products"]["rates"].update({"3": 1.5e14}), (), "card 3", WARNING, "-i 3"),
    ("a collective that hangs", fails("collectives", HUNG.format(160) + " from 8 ranks"), (),
     "collectives", ERROR, "HCCL_SOCKET_IFNAME"),
    ("a rank that cannot bind its port", fails("collectives", "rank 5: EI0006: bind failed"), (),
     "collectives", ERROR, "free ports"),
    ("a sum that is wrong", fails("collectives", "the sum over the ranks is wrong"), (), "collectives", ERROR, "earlier run"),
    ("a sum that goes through the host", finds("collectives", all_reduce=2e9), (),
     "collectives", WARNING, "npu-smi info -t topo"),
    ("an engine that does not start", fails("engine", "EngineLostError: vLLM did not start: libatb.so", "start"), (),
     "engine", ERROR, "VLLM_LOGGING_LEVEL"),
    ("an engine that hangs at its start", fails("engine", HUNG.format(1200)), (), "engine", ERROR, "cluster.start_timeout"),
    ("an engine that ends while it decodes", fails("engine", "EngineLostError: 507015", "decoding"), (),
     "engine", ERROR, "enforce_eager"),
    ("a learner that fails", lambda b: b.answers["engine"].update(error="RuntimeError: HcclGetRootInfo"), (),
     "engine = learner", ERROR, "model.attention"),
    ("a learner that computes something else", finds("engine", **{MEAN: 0.11}), (),
     "engine = learner", ERROR, "EMBERL_FUSED=none"),
    ("an engine that rounds coarsely", finds("engine", **{MEAN: 0.03}), (), "engine = learner", WARNING, "enforce_eager=true"),
    ("probabilities that are no numbers", finds("engine", **{MEAN: float("nan")}), (), "engine = learner", ERROR, "model.dtype"),
]  # fmt: skip
"""The same of `doctor_live.py`, planted in what the parts would find; `test_doctor_live.py` has real
ones beside them."""
