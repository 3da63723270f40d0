"""A run as a Ray job: joins the cluster it was submitted to, and its exit status is the job's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_system import Emberl

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
PORT, DASHBOARD = 26379, 28265


def ray_command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [str(BIN / "ray"), *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A local cluster with a job server. Blocking, so that ending it ends this cluster and no other on the machine."""
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}", "--disable-usage-stats",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    address = f"http://127.0.0.1:{DASHBOARD}"
    try:
        deadline = time.monotonic() + 120
        while ray_command("job", "submit", "--address", address, "--", "true").returncode != 0:
            assert time.monotonic() < deadline and head.poll() is None, "the job server did not come up"
            time.sleep(1)
        yield address
    finally:
        head.terminate()
        head.wait(timeout=60)


def test_a_job_joins_its_cluster_and_passes_its_status_on(cluster: str, emberl: Emberl) -> None:
    run_dir = emberl.folder / "run"
    submit = ["job", "submit", "--address", cluster, "--", "emberl", "train", str(emberl.config)]
    done = ray_command(*submit, f"run_dir={run_dir}", "schedule.steps=2", timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert '"status": "ok"' in done.stdout
    assert (run_dir / "model/model.safetensors").exists()
    failed = ray_command(*submit, f"run_dir={run_dir}", timeout=300)
    assert failed.returncode != 0
    assert "already holds a run; pass --resume" in failed.stdout
    greedy = ray_command(
        *submit, f"run_dir={run_dir}2", "cluster.learners=4", "cluster.cpus_per_learner=1", timeout=300
    )
    assert greedy.returncode != 0
    assert "needs 4.5 CPU but the Ray cluster" in greedy.stdout, (
        "it must join the cluster of two CPUs, not start another"
    )
