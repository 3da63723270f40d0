"""The load of a run's machines: processors, memory and, where there are any, devices.

A thread of the driver measures its own machine; on every other node an actor does that takes no
resources. A node that does not answer is left out; nothing here can end or slow a run.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER = 5.0
"""Seconds for a node to answer."""
SMI = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total")
"""Reads the devices' load from outside: a context of ours would take device memory."""


class NodeLoad:
    """Measures the machine that it runs on; `read` covers the time since the last call."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call has no interval, and returns 0
        self._smi = shutil.which(SMI[0])

    def read(self) -> dict[str, float]:
        """`cpu`, `memory`, `device_busy`, `device_memory` as fractions, `memory_gib` in use."""
        memory = psutil.virtual_memory()
        load = {
            "cpu": psutil.cpu_percent() / 100,
            "memory": memory.percent / 100,
            "memory_gib": (memory.total - memory.available) / 2**30,
        }
        if self._smi is not None:
            load |= self._devices()
        return load

    def _devices(self) -> dict[str, float]:
        try:
            command = [*SMI, "--format=csv,noheader,nounits"]
            text = subprocess.run(
                command, capture_output=True, text=True, timeout=ANSWER, check=True
            ).stdout
            rows = [[float(cell) for cell in line.split(",")] for line in text.splitlines() if line]
        # a driver in trouble: it is not asked again
        except (OSError, subprocess.SubprocessError, ValueError):
            self._smi = None
            return {}
        if not rows:
            return {}
        return {
            "device_busy": sum(busy for busy, _, _ in rows) / len(rows) / 100,
            "device_memory": sum(used / total for _, used, total in rows) / len(rows),
        }


class SystemWatch:
    """Reports the load of the machines every so many seconds, until `close`."""

    def __init__(self, every: float, tell: Callable[[float, Mapping[str, float]], None]) -> None:
        """every: seconds; 0: never. tell: is called with the seconds since the start and metrics
        `system/NODE/...`; node 0 is the driver's, the others are numbered in the order of their
        addresses."""
        self._every = every
        self._tell = tell
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="system")
        self._others: dict[int, Any] = {}
        if every:
            self._thread.start()

    def close(self) -> None:
        """Ends the watch; waits at most `ANSWER` seconds for a node that does not answer."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER)
        for actor in self._others.values():
            if ray.is_initialized():
                ray.kill(actor)
        self._others = {}

    def _work(self) -> None:
        begun, own = time.monotonic(), NodeLoad()
        try:
            self._others = _on_other_nodes()
            while not self._end.wait(self._every):
                waiting = {actor.read.remote(): i for i, actor in self._others.items()}
                loads = _named(0, own.read())
                refs = [*waiting]
                done = ray.wait(refs, num_returns=len(refs), timeout=ANSWER)[0] if refs else []
                for reference in done:
                    try:
                        loads |= _named(waiting[reference], ray.get(reference, timeout=ANSWER))
                    except ray.exceptions.RayError:  # that node is lost
                        del self._others[waiting[reference]]
                if not self._end.is_set():
                    self._tell(time.monotonic() - begun, loads)
        # e.g. Ray shuts down, or the disk is full: it must not end the run
        except Exception:
            return


def _on_other_nodes() -> dict[int, Any]:
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: n["NodeManagerAddress"])
    others = [node["NodeID"] for node in nodes if node["NodeID"] != here]
    remote: Any = ray.remote(NodeLoad)
    return {
        i: remote.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        for i, node in enumerate(others, 1)
    }


def _named(node: int, load: Mapping[str, float]) -> dict[str, float]:
    return {f"system/{node}/{name}": value for name, value in load.items()}
