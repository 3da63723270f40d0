"""Cards, settings, networks and disks of a machine with Ascend NPUs, for `doctor_ascend.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...kernels import ascend
from ...kernels.platform import NPU, sees_all_cards
from .machine import Check, Examination, Machine, State

_GIB = 1 << 30
USED = 8192
"""MB of a card that say that somebody is on it: 3 to 4 GB are taken on an idle one."""
PORTS = (60000, 60015)
"""HCCL's own, where no range is given."""
TIMEOUTS = (120, 7200)
"""Seconds that HCCL_CONNECT_TIMEOUT may have."""
SHARED = ("nfs", "nfs4", "cifs", "lustre", "ceph", "fuse.ceph", "fuse.glusterfs", "beegfs", "gpfs")
NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")


def smi(machine: Machine) -> str | None:
    return machine.output("npu-smi", "info")


def cards(machine: Machine) -> Iterator[Check]:
    """The device files, those of the driver beside them, and whether this user may use them."""
    names = machine.listing("/dev")
    found = [name for name in names if re.fullmatch(r"davinci\d+", name)]
    lacking = [name for name in NODES if name not in names]
    if not found:
        fix = "docker run --device=/dev/davinci0 ... (configs/ascend/Dockerfile), or the driver"
        yield Check(name="cards", state=machine.lacking(True), text="no /dev/davinci*", fix=fix)
        return
    if lacking:
        fix = " ".join(f"--device=/dev/{name}" for name in lacking)
        text = f"{len(found)} cards, but no /dev/{', /dev/'.join(lacking)}"
        yield Check(name="cards", state=State.ERROR, text=text, fix=f"docker run {fix}")
    closed = [name for name in found if not machine.writable(f"/dev/{name}")]
    if closed:
        text = f"/dev/{closed[0]} may not be used by this user ({len(closed)} of {len(found)})"
        fix = "usermod -aG HwHiAiUser USER and log in anew, or run as root in a container"
        yield Check(name="cards", state=State.ERROR, text=text, fix=fix)
    if not lacking and not closed:
        yield Check(name="cards", state=State.OK, text=f"{len(found)} in /dev")
    wanted = placed(machine)
    local = machine.config is not None and not machine.config.cluster.address
    if local and wanted > len(found):
        fix = "lower cluster.learners or cluster.rollouts, or name a cluster (cluster.address)"
        text = f"the placement needs {wanted}, here are {len(found)}"
        yield Check(name="placement", state=State.ERROR, text=text, fix=fix)


def placed(machine: Machine) -> int:
    """Cards that the configuration takes; 0 where there is none, or it names another device."""
    config = machine.config
    if config is None:
        return 0
    cluster = config.cluster
    engines = 0 if config.rollout.servers else cluster.rollouts * config.rollout.cards
    return cluster.learners if cluster.colocated else cluster.learners + engines


def health(machine: Machine) -> Iterator[Check]:
    """What npu-smi says of each card, and whether somebody else is on it."""
    said = smi(machine)
    if said is None:
        return
    rows = re.findall(r"^\|\s*(\d+)\s+(?:Ascend)?910\S*\s*\|\s*(\w+)\s*\|", said, re.MULTILINE)
    for card, state in rows:
        if state != "OK":
            fix = f"npu-smi info -t health -i {card}, then npu-smi set -t reset -i {card} -c 0;"
            fix += f" or leave it out by {NPU.visible_devices}"
            yield Check(name=f"card {card}", state=State.ERROR, text=f"health {state}", fix=fix)
    taken = [
        (int(a), int(b))
        for a, b in re.findall(r"(\d+)\s*/\s*(\d+)\s*\|\s*$", said, re.MULTILINE)
        if int(b) > 10_000
    ]
    busy = [used for used, _ in taken if used > USED]
    if busy:
        fix = "npu-smi info shows the processes; end them, or wait"
        text = (
            f"{len(busy)} of {len(taken)} cards hold up to {max(busy) / 1024:.0f} GB of somebody's"
        )
        yield Check(name="HBM", state=State.WARNING, text=text, fix=fix)


def visible(machine: Machine) -> Iterator[Check]:
    """Ray hides the other cards from each actor; a variable from outside interferes."""
    name, switch = str(NPU.visible_devices), str(NPU.ray_noset)
    given = machine.environ.get(name)
    if sees_all_cards(NPU, machine.environ):
        text = (
            "every actor sees every card; emberl's take the one that Ray gave them, by its number"
        )
        fix = f"unset {switch} before Ray starts, unless something else in the cluster needs it"
        yield Check(name=switch, state=State.WARNING, text=text, fix=fix)
    if given is None:
        return
    ids = given.split(",")
    if not all(i.strip().isdigit() for i in ids) or len(set(ids)) < len(ids):
        text = f"{given!r} is no list of card numbers"
        yield Check(
            name=name, state=State.ERROR, text=text, fix=f"export {name}=0,1,2,3, or unset it"
        )
    elif len(ids) < placed(machine):
        text = f"{given} shows {len(ids)} cards, the placement needs {placed(machine)}"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name} before Ray starts")


def settings(machine: Machine) -> Iterator[Check]:
    """Switches that make engines slow or end them: formats, allocator, task queue, graphs."""
    env, config = machine.environ, machine.config
    arguments = dict(config.rollout.engine_args) if config is not None else {}
    graphs = not arguments.get("enforce_eager", False)
    additional = arguments.get("additional_config") or {}
    nz = {
        "VLLM_ASCEND_ENABLE_NZ": env.get("VLLM_ASCEND_ENABLE_NZ", "0"),
        "additional_config.weight_nz_mode": str(additional.get("weight_nz_mode", 0)),
    }
    for name, value in nz.items():
        if value != "0":
            text = f"{value}: vllm-ascend refuses new weights in FRACTAL_NZ"
            yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}; emberl sets 0")
    by_rl_config = _has_rl_config(machine)
    yield from _rl_config(machine, additional.get("rl_config"), by_rl_config)
    sleeps = bool(arguments.get("enable_sleep_mode")) or bool(config and config.cluster.colocated)
    if (
        sleeps
        and not by_rl_config
        and "expandable_segments:True" in env.get("PYTORCH_NPU_ALLOC_CONF", "")
    ):
        text = "expandable segments end an engine that sleeps"
        fix = "unset PYTORCH_NPU_ALLOC_CONF; emberl sets it for learners alone"
        yield Check(name="PYTORCH_NPU_ALLOC_CONF", state=State.ERROR, text=text, fix=fix)
    if env.get("TASK_QUEUE_ENABLE") == "2" and graphs:
        text = "2 for all processes: engines with ACL graphs fail or are slow"
        fix = "unset TASK_QUEUE_ENABLE; emberl gives learners 2 and engines 1"
        yield Check(name="TASK_QUEUE_ENABLE", state=State.ERROR, text=text, fix=fix)
    if env.get("TASK_QUEUE_ENABLE") == "0":
        text = "0: every kernel waits for its launch"
        yield Check(
            name="TASK_QUEUE_ENABLE", state=State.WARNING, text=text, fix="unset TASK_QUEUE_ENABLE"
        )
    if env.get("ASCEND_LAUNCH_BLOCKING", "0") not in ("", "0"):
        text = "1: for debugging; every kernel is waited for"
        yield Check(
            name="ASCEND_LAUNCH_BLOCKING",
            state=State.WARNING,
            text=text,
            fix="unset ASCEND_LAUNCH_BLOCKING",
        )
    if not graphs:
        text = "enforce_eager: the host launches each kernel of each decode step"
        fix = "leave enforce_eager out; compilation_config: {cudagraph_mode: FULL_DECODE_ONLY}"
        yield Check(name="ACL graphs", state=State.WARNING, text=text, fix=fix)
    sizes = (arguments.get("compilation_config") or {}).get("cudagraph_capture_sizes")
    if graphs and sizes and config is not None and max(sizes) < config.rollout.max_num_seqs:
        most = config.rollout.max_num_seqs
        text = f"captured to {max(sizes)}, rollout.max_num_seqs={most}: no graph beyond"
        fix = f"add {most} to cudagraph_capture_sizes"
        yield Check(name="ACL graphs", state=State.WARNING, text=text, fix=fix)


def _has_rl_config(machine: Machine) -> bool:
    """As `rollout.vllm_backend.graphs` finds it out."""
    source = machine.read(f"{machine.package('vllm_ascend')}/ascend_config.py") or ""
    return "class RlConfig" in source


def _rl_config(machine: Machine, given: Any, has_it: bool) -> Iterator[Check]:
    """The switch of 0.27.1 and later for weights that change, on which graphs depend."""
    have, name = machine.version("vllm-ascend"), "additional_config.rl_config"
    if given is not None and not has_it:
        text = f"vllm-ascend {have} has no such key (0.27.1 and later): it does nothing"
        fix = "leave it out, emberl sets what the installed version has"
        yield Check(name=name, state=State.WARNING, text=text, fix=fix)
    elif given is not None and not dict(given).get("enabled", True):
        text = "enabled: false, but weights change: matrices go to FRACTAL_NZ, graphs keep old ones"
        fix = "leave it out, emberl sets enabled: true"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)
    if have is not None and not has_it:
        text = f"off: graphs of vllm-ascend {have} would read weights of before an update"
        text += " (from 0.27.1 on emberl decodes with them)"
        yield Check(name="graphs", state=State.OK, text=text)


def collectives(machine: Machine) -> Iterator[Check]:
    """HCCL's timeouts, ports and interfaces."""
    env = machine.environ
    given = env.get("HCCL_CONNECT_TIMEOUT")
    least, most = TIMEOUTS
    if given is not None and not (given.isdigit() and least <= int(given) <= most):
        text = f"{given}: HCCL takes {least} to {most} seconds"
        yield Check(
            name="HCCL_CONNECT_TIMEOUT",
            state=State.ERROR,
            text=text,
            fix="export HCCL_CONNECT_TIMEOUT=1800",
        )
    elif given is not None and int(given) < 600:
        text = f"{given} s: less than a large model takes to load"
        yield Check(
            name="HCCL_CONNECT_TIMEOUT",
            state=State.WARNING,
            text=text,
            fix="unset it; emberl sets 1800",
        )
    yield from _ports(machine)
    here = set(machine.listing("/sys/class/net"))
    for name in (*ascend.INTERFACE_VARIABLES, "GLOO_SOCKET_IFNAME"):
        wanted = env.get(name, "").lstrip("=^").split(",")[0]
        if wanted and here and not any(each.startswith(wanted) for each in here):
            text = f"{wanted}: there is no such interface ({', '.join(sorted(here))})"
            yield Check(
                name=name,
                state=State.ERROR,
                text=text,
                fix=f"unset {name}, or name the one of Ray's address",
            )
    several = machine.config is not None and machine.config.cluster.address is not None
    link = machine.output("hccn_tool", "-i", "0", "-link", "-g") if several else None
    if link is not None and "UP" not in link.upper():
        text = f"card 0: {' '.join(link.split())}"
        fix = "check cable and switch of every card: hccn_tool -i N -link -g, -ip -g, -ping -g"
        yield Check(name="card network", state=State.ERROR, text=text, fix=fix)


def _ports(machine: Machine) -> Iterator[Check]:
    """Without a range HCCL takes 16 ports from 60000 on, which the kernel may have given away."""
    name = "HCCL_HOST_SOCKET_PORT_RANGE"
    given = machine.environ.get(name)
    if given is not None and given != "auto" and _count(given) < 2:
        text = f"{given}: a learner and an engine on one card need a port each"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}; emberl sets auto")
    base = machine.environ.get("HCCL_IF_BASE_PORT")
    if base is not None and not (base.isdigit() and 1024 <= int(base) <= 65520):
        text = f"{base}: must be 1024 to 65520"
        yield Check(name="HCCL_IF_BASE_PORT", state=State.ERROR, text=text, fix="unset it")
        return
    if given == "auto" or (given is None and base is None):
        return  # emberl's own
    first = int(base) if base is not None and given is None else PORTS[0]
    drawn = (machine.read("/proc/sys/net/ipv4/ip_local_port_range") or "0 0").split()
    kept = machine.read("/proc/sys/net/ipv4/ip_local_reserved_ports") or ""
    if int(drawn[0]) <= first <= int(drawn[1]) and not _covers(kept, first):
        text = f"ports {first} to {first + 15} may be given to others by the kernel"
        fix = f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{first + 15}"
        yield Check(name="HCCL ports", state=State.WARNING, text=text, fix=fix)


def _ranges(text: str) -> Iterator[tuple[int, int]]:
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield int(first), int(last) if last.isdigit() else int(first)


def _count(text: str) -> int:
    return sum(last - first + 1 for first, last in _ranges(text))


def _covers(text: str, port: int) -> bool:
    return any(first <= port <= last for first, last in _ranges(text))


def ray(machine: Machine) -> Iterator[Check]:
    """A cluster that is joined must know its cards."""
    config = machine.config
    if config is None or not (config.cluster.address or machine.environ.get("RAY_ADDRESS")):
        return
    said = machine.output("ray", "status")
    if said is None:
        return  # `cluster.address` is asked elsewhere
    found = re.search(rf"([\d.]+)/([\d.]+) {NPU.resource}\b", said)
    if found is None:
        fix = "ray start --resources '{\"" + NPU.resource + "\": 8}' on every node (not --num-gpus)"
        text = f"the cluster has no {NPU.resource}"
        yield Check(name="Ray", state=State.ERROR, text=text, fix=fix)
    elif float(found[2]) - float(found[1]) < placed(machine):
        text = f"{found[1]} of {found[2]} {NPU.resource} are taken, {placed(machine)} are needed"
        yield Check(
            name="Ray",
            state=State.ERROR,
            text=text,
            fix="end what holds them: ray status, ray list actors",
        )
    else:
        yield Check(name="Ray", state=State.OK, text=f"{found[2]} {NPU.resource}, {found[1]} taken")


def host(machine: Machine) -> Iterator[Check]:
    """Shared memory for engines, the memory allocator, and where checkpoints go."""
    try:
        free = machine.free("/dev/shm")
    except OSError:
        free = 0
    if free < 16 * _GIB:
        text = f"{free / _GIB:.1f} GiB free: engines hand tensors to their ranks through it"
        yield Check(
            name="/dev/shm on NPUs", state=State.WARNING, text=text, fix="docker run --shm-size=64g"
        )
    if "jemalloc" not in machine.environ.get(
        "LD_PRELOAD", ""
    ) and "tcmalloc" not in machine.environ.get("LD_PRELOAD", ""):
        text = "not preloaded: the host that launches kernels is slower without"
        fix = "apt install libjemalloc2; export LD_PRELOAD=libjemalloc.so.2"
        yield Check(name="jemalloc", state=State.WARNING, text=text, fix=fix)
    config = machine.config
    if config is not None:
        kind = _file_system(machine.read("/proc/mounts") or "", Path(config.output).absolute())
        if kind in SHARED:
            text = (
                f"{config.output} is on {kind}: a checkpoint of all learners goes over the network"
            )
            fix = "set run_dir to a local disk; checkpoints are brought to the driver"
            yield Check(name="checkpoints", state=State.WARNING, text=text, fix=fix)


def _file_system(mounts: str, folder: Path) -> str:
    """The type of what holds `folder`."""
    rows = [line.split() for line in mounts.splitlines() if len(line.split()) > 2]
    above = [(len(row[1]), row[2]) for row in rows if folder.is_relative_to(row[1])]
    return max(above, default=(0, ""))[1]


BOX: tuple[Examination, ...] = (cards, health, visible, settings, collectives, ray, host)
