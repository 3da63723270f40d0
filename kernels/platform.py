"""The only file that knows the names of devices, collectives and their environment variables.

One table row is one kind of machine. torch is imported inside the functions that need it, so that
the configuration can name Ray resources without loading it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ascend

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """One kind of device: its names in torch, torch.distributed and Ray, and what it supports."""

    device: str
    """torch's device type."""
    collective: str
    """The torch.distributed back end."""
    resource: str
    """Ray's resource name; `CPU` means that an actor owns cores rather than a card."""
    visible_devices: str | None = None
    """The environment variable that hides all other cards from a process."""
    ray_noset: str | None = None
    """Set to 1, Ray leaves `visible_devices` alone and every actor sees every card."""
    module: str | None = None
    """The package whose import registers the device with torch."""
    weight_transfer: str = ""
    """The weight-transfer engine by which vLLM's processes receive weights over the devices'
    fabric; ours on a CPU."""
    weight_transfer_later: str = ""
    """Its name in later versions of the device's plugin for vLLM."""
    flash_built_in: bool = False
    """Whether transformers' flash_attention_2 needs no package of its own: on NPUs it is the fused
    attention of torch_npu."""
    interface_variables: tuple[str, ...] = ("GLOO_SOCKET_IFNAME",)
    """Environment variables that name the network interface of collectives."""
    float64: bool = True
    """Whether its collectives sum float64, and its kernels compute in it."""
    fused_layers: bool = False
    """Whether it has operators for the parts of a layer (`kernels/transformer/fused.py`)."""
    wide_products: bool = False
    """Whether torch multiplies bfloat16 matrices here into a float32 result, or onto one, rounding
    nothing (`out_dtype`)."""
    lengths_on_host: bool = False
    """Whether its attention over packed sequences reads their lengths on the host: transformers'
    for NPUs makes a list of them twice in every layer, which waits for the device unless they are
    on the host already."""

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


CPU = Platform(device="cpu", collective="gloo", resource="CPU", weight_transfer="gloo")
CUDA = Platform(
    device="cuda",
    collective="nccl",
    resource="GPU",
    visible_devices="CUDA_VISIBLE_DEVICES",
    ray_noset="RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    weight_transfer="nccl",
    wide_products=True,
)
NPU = Platform(
    device="npu",
    collective="hccl",
    resource="NPU",
    visible_devices="ASCEND_RT_VISIBLE_DEVICES",
    ray_noset="RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES",
    module="torch_npu",
    weight_transfer="nccl",  # vllm-ascend puts its HCCL under this name to 0.26
    weight_transfer_later="hccl",
    flash_built_in=True,
    lengths_on_host=True,
    float64=False,
    fused_layers=True,
    interface_variables=("GLOO_SOCKET_IFNAME", *ascend.INTERFACE_VARIABLES),
)
PLATFORMS = {p.device: p for p in (CPU, CUDA, NPU)}


def named(device: str) -> Platform:
    """The platform called `device`; `auto` is this machine's accelerator, or the CPU where it has
    none."""
    if device == "auto":
        return detect()
    if device not in PLATFORMS:
        raise ValueError(
            f"cluster.device={device!r} is not known; choose one of auto, {', '.join(PLATFORMS)}"
        )
    return PLATFORMS[device]


@lru_cache(maxsize=1)
def detect() -> Platform:
    """This process's platform, by `torch.accelerator`; an NPU shows only once torch_npu is
    imported."""
    import torch

    _register(NPU)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        PLATFORMS[accelerator.type]
        if accelerator is not None and accelerator.type in PLATFORMS
        else CPU
    )


def _register(platform: Platform) -> bool:
    """Imports the package that teaches torch this device; False where it is not installed."""
    if platform.module is None:
        return True
    try:
        __import__(platform.module)
    except ImportError:
        return False
    return True


def sees_all_cards(platform: Platform, environ: Mapping[str, str]) -> bool:
    """Whether Ray was told to leave every card visible to every actor, as it reads `ray_noset`."""
    return environ.get(platform.ray_noset or "", "").lower() in ("1", "true")


def card_index(
    platform: Platform, cards: Sequence[str], environ: Mapping[str, str] = os.environ
) -> int:
    """torch's index of an actor's card: 0 where Ray hides all other cards, else its position among
    the visible ones.

    cards: Ray's names of the actor's cards, of which the first counts. Raises ValueError if
    `visible_devices` hides that card.
    """
    if not cards or not sees_all_cards(platform, environ):
        return 0
    given = environ.get(platform.visible_devices or "", "")
    seen = [name.strip() for name in given.split(",")] if given else None
    if seen is None and cards[0].isdigit():
        return int(cards[0])
    if seen is None or cards[0] not in seen:
        raise ValueError(
            f"{platform.visible_devices}={given} hides card {cards[0]}, which Ray gave to this"
            f" actor: unset {platform.ray_noset}, or start Ray with the same list"
        )
    return seen.index(cards[0])


def device_of_process(platform: Platform, index: int = 0) -> torch.device:
    """The device of a process that uses one card, number `index` of those that it sees
    (`card_index`)."""
    import torch

    if platform.is_cpu:
        return torch.device("cpu")
    if not _register(platform):
        raise ValueError(
            f"cluster.device={platform.device!r} needs the package {platform.module}, which is not"
            " installed"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(platform.device, index)


def device_name(platform: Platform) -> str | None:
    """The name of this process's device as torch reports it, such as `NVIDIA H200` or
    `Ascend910B3`; None for a CPU."""
    import torch

    return (
        None if platform.is_cpu else str(torch.get_device_module(platform.device).get_device_name())
    )


def supports_bf16(platform: Platform) -> bool:
    """Whether bfloat16 matrix products run in hardware: every supported card; a CPU with AMX or
    AVX512-BF16."""
    if not platform.is_cpu:
        return True
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype(name: str, platform: Platform) -> torch.dtype:
    """The dtype called `name` (`auto`, `bfloat16`, `float32`, `float64`); auto is bfloat16 where it
    is fast. Warns when bfloat16 is requested without hardware support."""
    import torch

    if name == "bfloat16" and not supports_bf16(platform):
        _log.warning(
            "model.dtype=bfloat16: this CPU has no bfloat16 products; float32, which auto takes, is"
            " faster here"
        )
    if name == "auto":
        return torch.bfloat16 if supports_bf16(platform) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def sum_dtype(device: str) -> torch.dtype:
    """The dtype of long sums on a device of torch's type: float64 where supported, else float32."""
    import torch

    return torch.float64 if device not in PLATFORMS or PLATFORMS[device].float64 else torch.float32


def set_threads(count: int) -> None:
    """Fixes this process's thread pools. Pools of several actors that fight for the cores slow each
    other 10-20 times, so every actor calls this before its first operation, with the CPUs that Ray
    gave it."""
    import torch

    torch.set_num_threads(max(1, count))


def give_back_memory() -> None:
    """Returns freed memory that the C library keeps to the system (glibc only)."""
    # without it a rank stays at 1.9 GB after 60 steps of changing shapes, with it at 0.8 GB
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def thread_environment(count: int) -> dict[str, str]:
    """The environment with which an actor's process must start so that its OpenMP pool is small and
    sleeps, not spins, between parallel regions."""
    return {
        "OMP_NUM_THREADS": str(max(1, count)),
        "MKL_NUM_THREADS": str(max(1, count)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def actor_environment(device: str, role: str, given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that the process of an actor (`learner` or `rollout`) on this device
    needs besides `thread_environment`; those in `given` are not overridden."""
    return ascend.environment(role, given) if device == NPU.device else {}


def describe_environment(device: str, given: Mapping[str, str]) -> list[str]:
    """One line for each variable of `actor_environment`: value, who set it, and why."""
    return ascend.describe(given) if device == NPU.device else []


def memory_statistics(platform: Platform, device: torch.device | None = None) -> dict[str, float]:
    """Peak GB that this process allocated, and that its allocator reserved, since the last call
    (verl's names); empty on a CPU. device: None means the thread's current one."""
    if platform.is_cpu:
        return {}
    import torch

    module = torch.get_device_module(platform.device)
    peaks = {
        "perf/max_memory_allocated_gb": module.max_memory_allocated(device) / 1e9,
        "perf/max_memory_reserved_gb": module.max_memory_reserved(device) / 1e9,
    }
    module.reset_peak_memory_stats(device)
    return peaks


def process_group(
    platform: Platform, store: Any, rank: int, size: int, name: str, timeout: float
) -> Any:
    """A process group besides torch.distributed's default one, which its members need not have.
    Returns once all `size` ranks have joined; raises RuntimeError after `timeout` seconds."""
    from datetime import timedelta

    from torch.distributed import distributed_c10d as c10d

    within = timedelta(seconds=timeout)
    # what new_group calls, without its demand for a default group
    helper: Any = c10d._new_process_group_helper
    group, _ = helper(size, rank, [], platform.collective, store, group_name=name, timeout=within)
    return group


def host_group(timeout: float) -> Any:
    """A Gloo group of all ranks for tensors in host memory, besides the default group; every rank
    must call this. timeout: seconds."""
    from datetime import timedelta

    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def meeting_store(host: str, port: int, rank: int, timeout: float) -> Any:
    """The TCPStore by which the processes of a group find each other. Rank 0 serves it, at `host`
    only: torch by itself listens at every address of the machine."""
    from datetime import timedelta

    import torch.distributed

    c10d: Any = torch.distributed
    options: dict[str, Any] = {
        "is_master": rank == 0,
        "wait_for_workers": False,
        "timeout": timedelta(seconds=timeout),
    }
    if rank == 0:
        listener = socket.create_server((host, port), backlog=2048)
        options["master_listen_fd"] = listener.detach()  # the store's from now on
    return c10d.TCPStore(host, port, **options)


def meet(platform: Platform, host: str, port: int, rank: int, size: int, timeout: float) -> Any:
    """The `process_group` of processes that all know `host:port`, where rank 0 serves the store."""
    store = meeting_store(host, port, rank, timeout)
    return process_group(platform, store, rank, size, f"meeting-{port}", timeout)


def broadcast(group: Any, tensor: torch.Tensor, timeout: float) -> None:
    """Copies `tensor` from rank 0 of a `process_group` into the others'. Raises RuntimeError after
    `timeout` seconds."""
    from datetime import timedelta

    import torch.distributed

    options: Any = torch.distributed.distributed_c10d.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait(timedelta(seconds=timeout))


def local_cpus() -> int:
    """Cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
