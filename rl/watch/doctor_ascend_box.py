"""Checks of cards, settings and disks of a machine with Ascend NPUs, for `doctor_ascend.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...kernels import ascend
from ...kernels.platform import NPU, sees_all_cards
from .machine import Check, Examination, Machine, State

_GIB = 1 << 30
USED = 8192
"""MB in use from which a card counts as busy: an idle one has 3 to 4 GB in use."""
SHARED = ("nfs", "nfs4", "cifs", "lustre", "ceph", "fuse.ceph", "fuse.glusterfs", "beegfs", "gpfs")
NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")


def smi(machine: Machine) -> str | None:
    return machine.output("npu-smi", "info")


def generation(machine: Machine) -> ascend.Generation | None:
    """The cards' generation by npu-smi's names: `910B3` on A2, `Ascend910` on A3; None: others."""
    said = smi(machine) or ""
    if re.search(r"\b910B\d", said):
        return ascend.A2
    return ascend.A3 if re.search(r"\bAscend910\b|\b910_93", said) else None


def cards(machine: Machine) -> Iterator[Check]:
    """The device files: whether they exist, may be used, and are enough for the placement."""
    names = machine.listing("/dev")
    devices = [name for name in names if re.fullmatch(r"davinci\d+", name)]
    lacking = [name for name in NODES if name not in names]
    if not devices:
        fix = "docker run --device=/dev/davinci0 ... (configs/ascend/Dockerfile), or the driver"
        yield Check(name="cards", state=machine.lacking(True), text="no /dev/davinci*", fix=fix)
        return
    if lacking:
        fix = " ".join(f"--device=/dev/{name}" for name in lacking)
        text = f"{len(devices)} cards, but no /dev/{', /dev/'.join(lacking)}"
        yield Check(name="cards", state=State.ERROR, text=text, fix=f"docker run {fix}")
    used = [*devices, *(name for name in NODES if name in names)]
    closed = [name for name in used if not machine.writable(f"/dev/{name}")]
    if closed:
        text = f"/dev/{closed[0]} may not be used by this user ({len(closed)} of {len(used)})"
        fix = "usermod -aG HwHiAiUser USER and log in anew, or run as root in a container"
        yield Check(name="cards", state=State.ERROR, text=text, fix=fix)
    if not lacking and not closed:
        yield Check(name="cards", state=State.OK, text=f"{len(devices)} in /dev")
    wanted = placed(machine)
    local = machine.config is not None and not machine.config.cluster.address
    if local and wanted > len(devices):
        fix = "lower cluster.learners or cluster.rollouts, or name a cluster (cluster.address)"
        text = f"the placement needs {wanted}, here are {len(devices)}"
        yield Check(name="placement", state=State.ERROR, text=text, fix=fix)


def placed(machine: Machine) -> int:
    """Cards that the configuration takes; 0 without one."""
    config = machine.config
    if config is None:
        return 0
    cluster = config.cluster
    engines = 0 if config.rollout.servers else cluster.rollouts * config.rollout.cards
    return cluster.learners if cluster.colocated else cluster.learners + engines


KIND = re.compile(r"^\|\s*\d+\s+((?:Ascend)?\d{3}\w*)\s*\|\s*(\w+)\s*\|", re.MULTILINE)
"""The first line of a card in npu-smi's output: its name and its health."""
PROCESS = re.compile(
    r"^\|\s*(\d+)\s+\d+\s*\|\s*(\d+)\s*\|\s*([^|]*?)\s*\|\s*(\d+)\s*\|\s*$", re.MULTILINE
)
"""A line of its table of processes (of this container alone): card, pid, name, MB."""
MADE_FOR = re.compile(r"910B\d|Ascend910(?:_93\w*)?$|910_93")
"""A2 and A3, as npu-smi names their cards."""


def health(machine: Machine) -> Iterator[Check]:
    """The health and kind of each card as npu-smi reports them, and whether it is in use."""
    said = smi(machine)
    if said is None:
        return
    rows = re.findall(r"^\|\s*(\d+)\s+(?:Ascend)?910\S*\s*\|\s*(\w+)\s*\|", said, re.MULTILINE)
    for card, state in rows:
        if state != "OK":
            fix = f"npu-smi info -t health -i {card}, then npu-smi set -t reset -i {card} -c 0;"
            fix += f" or leave it out by {NPU.visible_devices}"
            yield Check(name=f"card {card}", state=State.ERROR, text=f"health {state}", fix=fix)
    others = sorted({kind for kind, _ in KIND.findall(said) if not MADE_FOR.match(kind)})
    if others:
        text = f"{', '.join(others)}: emberl is made for 910B (A2) and 910C (A3); older ones have"
        text += " no bfloat16, 310 do not train"
        fix = "use an A2 or A3 box"
        yield Check(name="kind of card", state=machine.lacking(True), text=text, fix=fix)
    taken = [
        (int(a), int(b))
        for a, b in re.findall(r"(\d+)\s*/\s*(\d+)\s*\|\s*$", said, re.MULTILINE)
        if int(b) > 10_000
    ]
    busy = [used for used, _ in taken if used > USED]
    running = PROCESS.findall(said)
    if not busy and not running:
        return
    if running:
        card, process, name, held = max(running, key=lambda row: int(row[3]))
        text = f"{len(running)} processes on the cards, {name} ({process}) with"
        text += f" {int(held) / 1024:.0f} GB of card {card}"
        fix = f"end what is left of an earlier run (kill {process}), or wait"
    else:
        most = max(busy) / 1024
        text = f"{len(busy)} of {len(taken)} cards hold up to {most:.0f} GB of somebody's"
        fix = "npu-smi info on the host shows the processes; end them, or wait"
    yield Check(name="HBM", state=State.WARNING, text=text, fix=fix)


def visible(machine: Machine) -> Iterator[Check]:
    """The variables that hide cards: Ray sets them for each actor, others interfere."""
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
    cards = sum(re.fullmatch(r"davinci\d+", each) is not None for each in machine.listing("/dev"))
    seen, why = _read_by_cann(given.split(","), cards)
    wanted = placed(machine)
    local = machine.config is not None and not machine.config.cluster.address
    if why:
        text = f"{given!r}: {why}, and CANN reads no further: {seen or 'no'} cards"
        fix = f"export {name}=0,1,2,3 (ascending, no spaces), or unset it"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)
    elif local and seen < wanted:
        text = f"{given} shows {seen} cards, the placement needs {wanted}"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name} before Ray starts")


def _read_by_cann(ids: list[str], cards: int) -> tuple[int, str]:
    """(how many of the numbers CANN takes, the reason why it stops there or ""). It takes plain
    numbers of existing cards in ascending order. cards: how many there are; 0: unknown."""
    for i, each in enumerate(ids):
        if not each.isdigit():
            return i, f"{each!r} is no number"
        if cards and int(each) >= cards:
            return i, f"there is no card {each} among {cards}"
        if i and int(each) <= int(ids[i - 1]):
            return i, f"{each} after {ids[i - 1]} is not ascending"
    return len(ids), ""


def settings(machine: Machine) -> Iterator[Check]:
    """Settings that slow engines down or crash them: formats, allocator, task queue, graphs."""
    env, config = machine.environ, machine.config
    arguments = dict(config.rollout.engine_args) if config is not None else {}
    by_rl_config = _has_rl_config(machine)  # without it emberl always decodes eagerly
    by_vllm = config is None or config.rollout.engine == "vllm"
    eager = bool(arguments.get("enforce_eager", False))
    graphs = by_vllm and by_rl_config and not eager
    additional = arguments.get("additional_config") or {}
    nz = {
        "VLLM_ASCEND_ENABLE_NZ": env.get("VLLM_ASCEND_ENABLE_NZ", "0"),
        "additional_config.weight_nz_mode": str(additional.get("weight_nz_mode", 0)),
    }
    for name, value in nz.items():
        if value != "0":
            text = f"{value}: vllm-ascend refuses new weights in FRACTAL_NZ"
            yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}; emberl sets 0")
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
    yield from _switches(env, graphs)
    if by_rl_config and eager:
        text = "enforce_eager: the host launches each kernel of each decode step"
        fix = "leave enforce_eager out; compilation_config: {cudagraph_mode: FULL_DECODE_ONLY}"
        yield Check(name="ACL graphs", state=State.WARNING, text=text, fix=fix)
    sizes = (arguments.get("compilation_config") or {}).get("cudagraph_capture_sizes")
    if graphs and sizes and config is not None and max(sizes) < config.rollout.max_num_seqs:
        most = config.rollout.max_num_seqs
        text = f"captured to {max(sizes)}, rollout.max_num_seqs={most}: no graph beyond"
        fix = f"add {most} to cudagraph_capture_sizes"
        yield Check(name="ACL graphs", state=State.WARNING, text=text, fix=fix)


def _switches(env: Mapping[str, str], graphs: bool) -> Iterator[Check]:
    """Variables that apply to all processes at once. graphs: whether engines use ACL graphs."""
    if env.get("TASK_QUEUE_ENABLE") == "2" and graphs:
        text = "2 for all processes: engines with ACL graphs fail or are slow"
        fix = "unset TASK_QUEUE_ENABLE; emberl gives learners 2 and engines 1"
        yield Check(name="TASK_QUEUE_ENABLE", state=State.ERROR, text=text, fix=fix)
    slow = {
        "0": "0: every kernel waits for its launch",
        "1": "1 for all processes: learners, which run eagerly, launch faster with 2",
    }
    given = env.get("TASK_QUEUE_ENABLE", "")
    if given in slow:
        fix = "unset TASK_QUEUE_ENABLE (vllm-ascend's image sets it); emberl gives learners 2 and"
        fix += " engines 1"
        name = "TASK_QUEUE_ENABLE"
        yield Check(name=name, state=State.WARNING, text=slow[given], fix=fix)
    if env.get("ASCEND_LAUNCH_BLOCKING", "0") not in ("", "0"):
        text = "1: for debugging; every kernel is waited for"
        yield Check(
            name="ASCEND_LAUNCH_BLOCKING",
            state=State.WARNING,
            text=text,
            fix="unset ASCEND_LAUNCH_BLOCKING",
        )
    if env.get("ASCEND_GLOBAL_LOG_LEVEL", "3") in ("0", "1"):
        text = f"{env['ASCEND_GLOBAL_LOG_LEVEL']}: CANN logs every launch, which slows it and fills"
        text += " the disk (~/ascend/log)"
        name = "ASCEND_GLOBAL_LOG_LEVEL"
        yield Check(name=name, state=State.WARNING, text=text, fix=f"unset {name} (3: errors)")
    try:
        ascend.switched_on(env)
    except ValueError as error:
        fix = f"unset {ascend.SWITCH}"
        yield Check(name=ascend.SWITCH, state=State.ERROR, text=str(error), fix=fix)


def _has_rl_config(machine: Machine) -> bool:
    """Whether vllm-ascend has `rl_config`, decided as in `rollout.vllm_backend.graphs`."""
    source = machine.read(f"{machine.package('vllm_ascend')}/ascend_config.py") or ""
    return "class RlConfig" in source


def _rl_config(machine: Machine, given: Any, has_it: bool) -> Iterator[Check]:
    """vllm-ascend's `rl_config` (0.27.1 and later) for weights that change; graphs need it."""
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


def ray(machine: Machine) -> Iterator[Check]:
    """Whether a Ray cluster that is joined has as many free NPUs as the placement needs."""
    config = machine.config
    if config is None or not (config.cluster.address or machine.environ.get("RAY_ADDRESS")):
        return
    said = machine.output("ray", "status")
    if said is None:
        return  # `doctor.network` reports that the cluster does not answer
    match = re.search(rf"([\d.]+)/([\d.]+) {NPU.resource}\b", said)
    if match is None:
        fix = "ray start --resources '{\"" + NPU.resource + "\": 8}' on every node (not --num-gpus)"
        text = f"the cluster has no {NPU.resource}"
        yield Check(name="Ray", state=State.ERROR, text=text, fix=fix)
    elif float(match[2]) < placed(machine):
        text = f"the cluster has {match[2]} {NPU.resource}, {placed(machine)} are needed"
        fix = "ray start --address=HEAD:6379 on the other machines, with --resources where Ray"
        fix += " finds no card there"
        yield Check(name="Ray", state=State.ERROR, text=text, fix=fix)
    elif float(match[2]) - float(match[1]) < placed(machine):
        text = f"{match[1]} of {match[2]} {NPU.resource} are taken, {placed(machine)} are needed"
        yield Check(
            name="Ray",
            state=State.ERROR,
            text=text,
            fix="end what holds them: ray status, ray list actors",
        )
    else:
        yield Check(name="Ray", state=State.OK, text=f"{match[2]} {NPU.resource}, {match[1]} taken")


def host(machine: Machine) -> Iterator[Check]:
    """Shared memory for engines, the memory allocator, and the disk of the checkpoints."""
    try:
        free = machine.free("/dev/shm")
    except OSError:
        free = 0
    if free < 16 * _GIB:
        text = f"{free / _GIB:.1f} GiB free: engines hand tensors to their ranks through it"
        yield Check(
            name="/dev/shm on NPUs", state=State.WARNING, text=text, fix="docker run --shm-size=64g"
        )
    preloaded = re.split(r"[\s:]+", machine.environ.get("LD_PRELOAD", ""))
    lost = [p for p in preloaded if p.startswith("/") and not machine.exists(p)]
    if lost:
        text = f"{lost[0]}: there is no such file, and nothing is preloaded"
        fix = "apt install libjemalloc2; export LD_PRELOAD=libjemalloc.so.2"
        yield Check(name="LD_PRELOAD", state=State.WARNING, text=text, fix=fix)
    elif not any("jemalloc" in each or "tcmalloc" in each for each in preloaded):
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
    """The type of the file system that holds `folder`; "" if unknown."""
    rows = [line.split() for line in mounts.splitlines() if len(line.split()) > 2]
    above = [(len(row[1]), row[2]) for row in rows if folder.is_relative_to(row[1])]
    return max(above, default=(0, ""))[1]


BOX: tuple[Examination, ...] = (cards, health, visible, settings, ray, host)
