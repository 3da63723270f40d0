"""Machines of a cluster as network namespaces of this one: addresses, host names and a disk of
their own, as containers on several hosts have; a process of one reaches the others by the network
alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
SUBNET = "10.91.7"
# where this file's folder and the environment are not, which all machines see; its name is short,
# as paths of sockets must be
DISK = next(
    path
    for path in ("/mnt", "/srv", "/media", "/tmp")
    if Path(path).is_dir() and not sys.prefix.startswith(f"{path}/")
)
# a token in the user's home would switch authentication on for some of the processes only
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
}


def why_not() -> str | None:
    """Why namespaces cannot be had here; None where they can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "the commands ip and unshare are not here"
    made = subprocess.run(
        ["ip", "netns", "add", "emberl-try"], check=False, capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", "emberl-try"], check=False, capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


@dataclass(frozen=True)
class Node:
    """One machine: `folder` is what its processes see as `DISK`."""

    name: str
    address: str
    folder: Path

    def command(self, *command: str) -> list[str]:
        """The command as a process of this machine."""
        # Debian gives a machine's own name 127.0.1.1
        inside = (
            f"mount --bind {self.folder}/hosts /etc/hosts && hostname {self.name}"
            f" && mount --bind {self.folder} {DISK} && mount -t tmpfs tmpfs /dev/shm && cd {DISK}"
            ' && exec "$@"'
        )
        unshared = ["unshare", "--mount", "--uts", "sh", "-c", inside, "sh", *command]
        return ["ip", "netns", "exec", self.name, *unshared]

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                self.command(*command), stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT
            )


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@contextmanager
def machines(root: Path, count: int) -> Iterator[list[Node]]:
    """So many machines on one bridge, under names and devices that this process alone uses."""
    mark = f"e{os.getpid() % 100_000}"
    nodes = [Node(f"{mark}n{i}", f"{SUBNET}.{i + 1}", root / f"n{i}") for i in range(count)]
    with ExitStack() as cleanup:
        _ip(f"link add {mark}br type bridge")
        cleanup.callback(_ip, f"link del {mark}br")
        _ip(f"link set {mark}br up")
        for i, node in enumerate(nodes):
            node.folder.mkdir(parents=True)
            (node.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {node.name}\n")
            _ip(f"netns add {node.name}")
            cleanup.callback(_ip, f"netns del {node.name}")
            _ip(f"link add {mark}v{i} type veth peer name eth0 netns {node.name}")
            _ip(f"link set {mark}v{i} master {mark}br up")
            _ip(f"-n {node.name} addr add {node.address}/24 dev eth0")
            _ip(f"-n {node.name} link set eth0 up")
            _ip(f"-n {node.name} link set lo up")
        yield nodes


@contextmanager
def ray_cluster(
    nodes: Sequence[Node], cpus: Sequence[int], *, seconds: float = 60
) -> Iterator[str]:
    """A raylet on every machine, the first one the head, all up within so many seconds each; its
    address."""
    head = nodes[0]
    address = f"{head.address}:6379"
    common = ["--block", "--disable-usage-stats", "--object-store-memory=200000000"]
    ray = (sys.executable, "-m", "ray.scripts.scripts")
    started = []
    try:
        for node, number in zip(nodes, cpus, strict=True):
            role = (
                ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={DISK}/ray"]
                if node is head
                else [f"--address={address}"]
            )
            named = [f"--node-ip-address={node.address}", f"--num-cpus={number}"]
            started.append(_started(node, (*ray, "start", *role, *named, *common), seconds))
        _until_joined(nodes, seconds)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _started(node: Node, command: Sequence[str], seconds: float) -> subprocess.Popen[bytes]:
    """Waits until Ray says that the machine's raylet is up. It gives that 30 s, which a busy
    machine needs longer for: then again."""
    deadline = time.monotonic() + seconds
    process = node.start("ray.log", *command)
    while "Ray runtime started" not in (told := (node.folder / "ray.log").read_text()):
        if process.poll() is not None:
            assert time.monotonic() < deadline, told[-3000:]
            process = node.start("ray.log", *command)
        time.sleep(0.3)
    return process


def _until_joined(nodes: Sequence[Node], seconds: float) -> None:
    """Waits until every raylet is known to the head: a run counts what is there as it begins."""
    head = nodes[0]
    look = (
        "import ray, time\n"
        f"deadline = time.monotonic() + {seconds}\n"
        "while not ray.is_initialized():\n"  # refused until the head's own raylet is known to it
        "    try:\n"
        f"        ray.init(address='{head.address}:6379', log_to_driver=False)\n"
        "    except Exception:\n"
        "        if time.monotonic() > deadline:\n"
        "            raise\n"
        "        time.sleep(0.3)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {len(nodes)}:\n"
        "    assert time.monotonic() < deadline\n"
        "    time.sleep(0.3)\n"
    )
    tried = subprocess.run(
        head.command(sys.executable, "-c", look),
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=2 * seconds,
    )
    logs = [(node.folder / "ray.log").read_text()[-1000:] for node in nodes]
    assert tried.returncode == 0, "\n".join([tried.stderr[-2000:], *logs])
