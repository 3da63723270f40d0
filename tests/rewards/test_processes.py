"""Processors that a quota leaves, in the trees of files that kernels and containers show."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from emberl.rewards.processes import (
    asleep,
    cpu_seconds,
    descendants,
    processors,
    stat_of,
    tells_waiting,
    waited,
)

V1 = (
    "33 31 0:30 {base} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup c rw,memory\n"
)
V2 = "41 31 0:38 {base} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "expected"),
    [
        (V2, "0::/a/b", {"a/b/cpu.max": "250000 100000"}, 3),
        (V2, "0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        (V2, "0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        (V2, "0::/", {"cpu.max": "25000 100000"}, 1),  # a container with a cgroup namespace
        (V2, "0::/a", {"a/cpu.max": "max 100000"}, 64),
        # outside the namespace: what is mounted has to do
        (V2, "0::/../other", {"cpu.max": "100000 100000"}, 1),
        (
            V1,
            "4:cpu,cpuacct:/x\n0::/",
            {"cpu/x/cpu.cfs_quota_us": "25000", "cpu/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            V1,
            "4:cpu,cpuacct:/x",
            {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"},
            64,
        ),
        (
            # version 1 in a container: only its own part is mounted
            V1.replace("{base}", "/docker/id"),
            "4:cpu,cpuacct:/docker/id",
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("", "", {}, 64),
        (V2, "garbage", {"cpu.max": "x"}, 64),
    ],
)
def test_processors(
    tmp_path: Path, monkeypatch, mounts: str, groups: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "1 0 0:1 / / rw - ext4 x rw\n" + mounts.replace("{base}", "/")
    )
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert processors(tmp_path) == expected


def test_the_machine_itself() -> None:
    assert 1 <= processors() <= os.cpu_count()
    assert stat_of(os.getpid())[1] == str(os.getppid())
    assert stat_of(2**22 + 1) is None
    assert os.getpid() in set(descendants(os.getppid())) | {os.getpid()}
    if tells_waiting():
        assert 0 <= waited(os.getpid()) < 10**6
    assert waited(2**22 + 1) == 0


@pytest.mark.parametrize(
    ("code", "sleeps"), [("import time; time.sleep(60)", True), ("while True: pass", False)]
)
def test_who_wants_a_processor_is_not_asleep(code: str, sleeps: bool) -> None:
    """Also one that gets none: it shares its processor with a process that has precedence."""
    place = {min(os.sched_getaffinity(0))}
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        os.sched_setaffinity(child.pid, place)
        deadline = time.monotonic() + 30
        while asleep(child.pid) is not sleeps:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
        rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            os.sched_setaffinity(rival.pid, place)
            time.sleep(0.5)
            used = cpu_seconds(child.pid)
            looks = []
            for _ in range(10):
                looks.append(asleep(child.pid))
                time.sleep(0.05)
            assert looks == [sleeps] * 10 and cpu_seconds(child.pid) - used < 0.25
        finally:
            rival.kill()
            rival.wait()
    finally:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not asleep(child.pid)  # a zombie
        child.wait()
    assert not asleep(child.pid) and cpu_seconds(child.pid) == 0  # it has ended
