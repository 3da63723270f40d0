"""`emberl doctor [CONFIG]`: checks of this machine, with a fix for whatever a run would lack. Loads
no torch.

Each examination checks one thing of a `Machine`. Only what the configuration needs is an error.
"""

from __future__ import annotations

import platform
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from ...kernels import platform as accelerators
from ..config.load import Config
from .doctor_ascend import ASCEND, INSTALLED, present
from .doctor_live import LIVE
from .machine import Check, Examination, Machine, SandboxUnavailable, State, examined
from .sinks import has_wandb_key, wandb_mode

_GIB = 1 << 30
_EXTRAS = {"vllm", "ascend", "gym"}
TESTED = {
    "torch": ("2.11", "2.13"),
    "ray": ("2.60",),
    "transformers": ("5.5", "5.19", "5.24"),
    "vllm": ("0.23", "0.28", "0.32"),
    "triton-ascend": ("3.2",),
    "wandb": ("0.31",),
}
"""Versions that emberl's tests have run with."""
SANDBOXED = ("code", "gym")
"""Rewards that run programs."""
PROCESSES = 2000
"""Processes and threads that a small run needs: Ray's own, and those of each actor."""


def examine(config: Config | None = None, *, live: bool = False) -> Iterator[Check]:
    """Yields all checks in reading order. Starts and ends a sandbox process; takes about a second.
    live: uses the device too, which takes minutes."""
    yield from examined(Machine(config), (*EXAMINATIONS, *(LIVE if live else ())))


def python(machine: Machine) -> Iterator[Check]:
    version = platform.python_version()
    if Version(version) >= Version("3.11"):
        yield Check(name="python", state=State.OK, text=version)
    else:
        yield Check(name="python", state=State.ERROR, text=version, fix="use Python 3.11 or later")


def packages(machine: Machine) -> Iterator[Check]:
    """A check for each requirement of the distribution. Extras may be absent unless the
    configuration needs them, but must be of a version that fits."""
    rollout = machine.config.rollout if machine.config is not None else None
    # servers (rollout.servers) run a vLLM of their own
    needed = {"vllm"} if rollout and rollout.engine == "vllm" and not rollout.servers else set()
    on_npus = present(machine)
    for requirement in map(Requirement, machine.requirements()):
        marker = requirement.marker
        extra = marker is not None and not marker.evaluate({"extra": ""})
        if extra and not any(
            marker.evaluate({"extra": name})  # type: ignore[union-attr]
            for name in _EXTRAS
        ):
            continue
        if extra and on_npus and requirement.name in INSTALLED:
            continue  # `doctor_ascend.versions` checks it, with the pins that go together
        yield _package(machine, requirement, extra and requirement.name not in needed)


def _package(machine: Machine, requirement: Requirement, optional: bool) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    fix = f"pip install '{name}{wanted}'"
    version = machine.version(name)
    if version is None:
        if optional:
            return Check(name=name, state=State.OK, text="absent (optional)")
        return Check(name=name, state=State.ERROR, text="absent", fix=fix)
    if not requirement.specifier.contains(version, prereleases=True):
        state = State.WARNING if optional else State.ERROR
        return Check(name=name, state=state, text=f"{version}, outside {wanted}", fix=fix)
    tested = TESTED.get(name, ())
    if tested and _minor(version) > max(map(_minor, tested)):
        text = f"{version}, newer than what is tested ({', '.join(tested)})"
        return Check(
            name=name, state=State.WARNING, text=text, fix=f"pip install '{name}~={tested[-1]}.0'"
        )
    said = f" (tested: {', '.join(tested)})" if tested else ""
    return Check(name=name, state=State.OK, text=version + said)


def _minor(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


def sandbox(machine: Machine) -> Iterator[Check]:
    """The sandbox back end that programs in answers get, and what it does not isolate."""
    uses = _rewards(machine.config)
    needed = any(use in SANDBOXED for use, remote in uses if not remote)
    try:
        backend = machine.sandbox()
    except SandboxUnavailable as error:
        text, _, fix = str(error).partition(". To fix: ")
        yield Check(
            name="sandbox",
            state=machine.lacking(needed),
            text=f"no code rewards: {text}",  # other rewards run without a sandbox
            fix=fix or "run on Linux, x86-64 or aarch64",
        )
        return
    held = {
        "landlock": "no files of others, no network, no processes; a program can ask whether a path"
        " of the host exists",
    }.get(backend, "no files of others, no network, no other processes in sight")
    yield Check(name="sandbox", state=State.OK, text=f"back end {backend}: {held}")


def _rewards(config: Config | None) -> Iterator[tuple[str, bool]]:
    """(name of a reward, whether it runs on another machine) of each grader."""
    for part in config.reward.parts.values() if config is not None else ():
        for spec in (part, *part.by_source.values()):
            yield spec.use, "url" in spec.options


def compiler(machine: Machine) -> Iterator[Check]:
    path = machine.which("g++")
    if path is not None:
        yield Check(name="g++", state=State.OK, text=path)
    else:
        yield Check(
            name="g++",
            state=State.WARNING,
            text="absent: no C++ in code rewards",
            fix="apt install g++",
        )


def cores(machine: Machine) -> Iterator[Check]:
    """Whether a run that starts Ray here finds the CPUs of its placement."""
    ours, all_of_it = machine.cores()
    text = f"{ours} of {all_of_it} by affinity and quota" if ours < all_of_it else str(ours)
    config = machine.config
    if config is not None and not config.cluster.address:
        cluster = config.cluster
        workers = len(config.rollout.servers) or cluster.rollouts
        wanted = cluster.learners * cluster.cpus_per_learner + workers * cluster.cpus_per_rollout
        if wanted > ours:
            yield Check(
                name="processors",
                state=State.ERROR,
                text=f"{text}, the placement needs {wanted:g}",
                fix="raise the quota (docker run --cpus, Kubernetes' limits), or lower"
                " cluster.cpus_per_learner and cluster.cpus_per_rollout",
            )
            return
    yield Check(name="processors", state=State.OK, text=text)


def processes(machine: Machine) -> Iterator[Check]:
    """The limit of processes; each of the hundreds of threads of Ray, vLLM and BLAS counts."""
    soft, _ = machine.limit("RLIMIT_NPROC")
    limits = [] if soft < 0 else [("ulimit -u", soft)]
    for path in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        text = (machine.read(path) or "max").strip()
        limits += [(path, int(text))] if text.isdigit() else []
    name, least = min(limits, key=lambda pair: pair[1], default=("", -1))
    if least < 0:
        yield Check(name="processes", state=State.OK, text="no limit")
        return
    text = f"{least} by {name}"
    if least >= PROCESSES:
        yield Check(name="processes", state=State.OK, text=text)
        return
    state = State.WARNING if least >= PROCESSES // 4 else State.ERROR
    fix = f"raise it to {PROCESSES} or more: ulimit -u, docker run --pids-limit, podPidsLimit"
    yield Check(name="processes", state=state, text=text, fix=fix)


def shared_memory(machine: Machine, path: str = "/dev/shm") -> Iterator[Check]:
    """Free space in /dev/shm, which Ray's object store and torch's workers use."""
    fix = "give more: mount -o remount,size=16g /dev/shm, or docker run --shm-size=16g"
    try:
        free = machine.free(path)
    except OSError as error:
        mount = f"mount -t tmpfs tmpfs {path}"
        yield Check(name=path, state=State.ERROR, text=str(error), fix=mount)
        return
    text = f"{free / _GIB:.1f} GiB free"
    if not machine.writable(path):
        chmod = f"chmod 1777 {path}"
        yield Check(name=path, state=State.ERROR, text="not writable", fix=chmod)
    elif free < _GIB // 4:
        yield Check(name=path, state=State.ERROR, text=text, fix=fix)
    elif free < 4 * _GIB:
        yield Check(name=path, state=State.WARNING, text=text, fix=fix)
    else:
        yield Check(name=path, state=State.OK, text=text)


def open_files(machine: Machine) -> Iterator[Check]:
    """The limit of open files; Ray opens several for each worker and object."""
    soft, hard = machine.limit("RLIMIT_NOFILE")
    if soft < 0 or soft >= 8192:
        yield Check(name="open files", state=State.OK, text="no limit" if soft < 0 else str(soft))
        return
    fix = "ulimit -n 65536"
    if 0 <= hard < 65536:
        fix += f" (the hard limit is {hard}: raise it in /etc/security/limits.conf)"
    state = State.WARNING if soft >= 1024 else State.ERROR
    yield Check(name="open files", state=state, text=str(soft), fix=fix)


def disk(machine: Machine) -> Iterator[Check]:
    """Whether the disk has room for the run's checkpoints, and for one that is being written."""
    config = machine.config
    folder = Path(config.output if config is not None else ".").absolute()
    while not folder.exists():
        folder = folder.parent
    free = machine.free(str(folder))
    text = f"{free / _GIB:.1f} GiB free in {folder}"
    if not machine.writable(str(folder)):
        fix = "set run_dir to a directory that can be written"
        state = machine.lacking(True)
        yield Check(name="disk", state=state, text=f"{folder} is not writable", fix=fix)
        return
    wanted = _checkpoints(config)
    if wanted:
        text += f", checkpoints take about {wanted / _GIB:.1f}"
    if free < max(wanted, _GIB):
        fix = "make room, lower checkpoint.keep, or set run_dir to another disk"
        yield Check(name="disk", state=machine.lacking(free < wanted), text=text, fix=fix)
    else:
        yield Check(name="disk", state=State.OK, text=text)


def _checkpoints(config: Config | None) -> int:
    """Bytes of all checkpoints that a run keeps, and of one more; 0 if the model is not here."""
    if config is None or config.model.path is None or not Path(config.model.path).is_dir():
        return 0
    weights = sum(f.stat().st_size for f in Path(config.model.path).glob("*.safetensors"))
    kept = config.checkpoint.keep + config.checkpoint.keep_best + 1
    # a parameter has 14 bytes there: master and two moments in float32, 2 of the served bfloat16;
    # its file has 2
    return kept * 7 * weights


def network(machine: Machine) -> Iterator[Check]:
    """Loopback, which every run needs, Ray's address of this node, for a run on several nodes, and
    the addresses that the configuration names."""
    if not machine.can_listen():
        fix = "bring the loopback interface up: ip link set lo up"
        yield Check(name="ports", state=State.ERROR, text="none can be had", fix=fix)
    else:
        yield Check(name="ports", state=State.OK, text="free ones on 127.0.0.1")
    name, outward = machine.hostname(), machine.outward()
    stands = ", ".join(machine.addresses(name)) or "nothing"
    text = f"{name} stands for {stands}; Ray knows this node as {outward}"
    address = machine.config.cluster.address if machine.config is not None else None
    if address and outward.startswith("127."):
        fix = "ray start --node-ip-address=ADDRESS on every node"
        state = State.WARNING  # no error: right if the cluster is this machine alone
        yield Check(name="address", state=state, text=text, fix=fix)
    else:
        yield Check(name="address", state=State.OK, text=text)
    for where, key in _others(machine.config):
        host, _, port = where.rpartition(":")
        why = (
            machine.joins(where)
            if key == "cluster.address"
            else machine.reaches(host.strip("[]"), int(port))
        )
        if why is None:
            yield Check(name=key, state=State.OK, text=f"{where} answers")
        else:
            fix = f"start it, or set {key} to one that runs"
            yield Check(name=key, state=State.ERROR, text=f"{where}: {why}", fix=fix)


def _others(config: Config | None) -> Iterator[tuple[str, str]]:
    """(host:port, key) of every address in the configuration."""
    if config is None:
        return
    address = config.cluster.address or ""
    if address.rpartition(":")[2].isdigit() and "//" not in address:
        yield address, "cluster.address"
    for server in config.rollout.servers:
        url = urllib.parse.urlparse(server)
        port = url.port or (443 if url.scheme == "https" else 80)
        yield f"{url.hostname}:{port}", "rollout.servers"


def weights_and_biases(machine: Machine) -> Iterator[Check]:
    config, name = machine.config, "W&B"
    wanted = config.tracking.wandb if config is not None else "auto"
    mode = wandb_mode(wanted, machine.environ)
    key = has_wandb_key(machine.environ)
    if mode == "disabled":
        yield Check(name=name, state=State.OK, text="not wanted")
    elif mode == "offline":
        yield Check(name=name, state=State.OK, text="offline, kept in the run's directory")
    elif not key:
        fix = "wandb login, or set WANDB_API_KEY, or tracking.wandb=offline"
        text = f"tracking.wandb={mode}, and there is no key"
        yield Check(name=name, state=machine.lacking(True), text=text, fix=fix)
    else:
        base = machine.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        url = urllib.parse.urlparse(base)
        port = url.port or (443 if url.scheme == "https" else 80)
        why = machine.reaches(url.hostname or base, port)
        if why is None:
            yield Check(name=name, state=State.OK, text=f"key found, {base} answers")
        else:
            # no error: the run keeps its records offline instead
            fix = "open the way there, or set tracking.wandb=offline and upload later"
            yield Check(name=name, state=State.WARNING, text=f"{base}: {why}", fix=fix)


def accelerator(machine: Machine) -> Iterator[Check]:
    """Whether the NVIDIA driver answers; an error only if the configuration names CUDA."""
    device = machine.config.cluster.device if machine.config is not None else "auto"
    wanted = device != "auto" and accelerators.named(device).resource == "GPU"
    cards = machine.output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if cards is not None:
        yield Check(name="CUDA", state=State.OK, text="; ".join(cards.split("\n")[:-1]))
    elif wanted:
        fix = "install NVIDIA's driver (docker run --gpus all), or set cluster.device"
        yield Check(name="CUDA", state=State.ERROR, text="nvidia-smi does not answer", fix=fix)


EXAMINATIONS: tuple[Examination, ...] = (
    python,
    packages,
    accelerator,
    *ASCEND,
    sandbox,
    compiler,
    cores,
    processes,
    shared_memory,
    open_files,
    disk,
    network,
    weights_and_biases,
)
"""In reading order. Those for NPUs are in `doctor_ascend.py`."""

__all__ = ["EXAMINATIONS", "examine"]
