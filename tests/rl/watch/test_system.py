"""The load of a run's machines: what is read of devices, and that nothing there holds up a run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from emberl.rl.watch import system
from emberl.rl.watch.system import NodeLoad, SystemWatch


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_processors_memory_and_devices_as_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo '90, 30000, 40000'; echo '10, 10000, 40000'")
    load = NodeLoad().read()
    assert load["device_busy"] == 0.5 and load["device_memory"] == 0.5
    assert 0 <= load["cpu"] <= 1 and 0 < load["memory"] <= 1 and load["memory_gib"] > 0


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "true"])
def test_a_driver_in_trouble_is_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_smi(tmp_path, monkeypatch, script)
    assert set(NodeLoad().read()) == {"cpu", "memory", "memory_gib"}


def test_it_tells_until_it_is_closed_and_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_on_other_nodes", dict)
    told: list[Mapping[str, float]] = []
    twice = threading.Event()

    def tell(seconds: float, load: Mapping[str, float]) -> None:
        told.append(load)
        if len(told) == 2:
            twice.set()
            raise OSError("no space left on device")

    watch = SystemWatch(0.01, tell)
    assert twice.wait(20)
    time.sleep(0.1)
    watch.close()
    assert len(told) == 2 and {"system/0/cpu", "system/0/memory"} <= set(told[0])
    SystemWatch(0, tell).close()


def test_a_node_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(system, "ANSWER", 0.2)
    monkeypatch.setattr(system, "_on_other_nodes", lambda: gate.wait(30) and {})
    watch = SystemWatch(0.01, lambda *_: None)
    start = time.monotonic()
    watch.close()
    gate.set()
    assert time.monotonic() - start < 5


NODES = """
import time, ray
from ray.cluster_utils import Cluster
from emberl.rl.watch.system import SystemWatch
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
told = []
watch = SystemWatch(0.5, lambda seconds, load: told.append({n.split("/")[1] for n in load}))
def wait(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, told[-3:]
        time.sleep(0.05)
wait(lambda: told[-1:] == [{"0", "1"}])
cluster.remove_node(other)
wait(lambda: told[-2:] == [{"0"}, {"0"}])
start = time.monotonic()
watch.close()
print("both, then one", time.monotonic() - start < 5)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_every_node_is_looked_at_until_it_is_lost() -> None:
    environ = os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environ.pop("RAY_ADDRESS", None)
    ran = subprocess.run(
        [sys.executable, "-c", NODES],
        capture_output=True,
        text=True,
        timeout=200,
        env=environ,
        check=False,
    )
    assert "both, then one True" in ran.stdout, ran.stderr[-3000:]
