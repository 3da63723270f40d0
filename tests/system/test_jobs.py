"""A run as a Ray job, by `emberl submit` and by Ray's own command."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_system import Emberl, read_metrics

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
START_SECONDS = 180.0
# a token in the user's home would switch authentication on for the head but not for the client
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",
}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def submit(address: str, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--address", address, "--", *command],
        capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a cluster of two CPUs with ports of its own; only this cluster is ended
    afterwards, so it is a child to terminate and never `ray stop`, which ends every cluster on the
    machine."""
    folder = tmp_path_factory.mktemp("head")
    # of its own and short: Ray leaves the address of the last cluster in the folder, which a later
    # ray.init() would join, and the paths of its sockets may not be long
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    port, dashboard, client, agent = free_ports(4)
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                "--block",
                f"--port={port}",
                "--num-cpus=2",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--dashboard-agent-listen-port={agent}",
                "--disable-usage-stats",
                f"--temp-dir={scratch}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
    address, deadline, answer = (
        f"http://127.0.0.1:{dashboard}",
        time.monotonic() + START_SECONDS,
        "",
    )
    try:
        while True:
            assert head.poll() is None, (
                f"the head ended: {(folder / 'head.log').read_text()[-3000:]}"
            )
            assert time.monotonic() < deadline, (
                f"no job ran within {START_SECONDS} s: {answer[-3000:]}"
            )
            ready = submit(address, "true", timeout=START_SECONDS)
            if ready.returncode == 0:
                break
            answer = ready.stdout + ready.stderr
            time.sleep(1)
        yield address
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        _, left = psutil.wait_procs(processes, timeout=30)
        for process in left:
            process.kill()
        head.wait(timeout=30)
        shutil.rmtree(scratch, ignore_errors=True)


def emberl_command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [str(BIN / "emberl"), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_is_stopped_saved_and_goes_on(cluster: str, emberl: Emberl) -> None:
    """With a function of one's own beside the configuration, both by relative paths, as in a run
    here; the exit status is the job's."""
    emberl.config.touch()
    (emberl.folder / "mine.py").write_text(
        "import os\n"
        "def score(completion, answer, **_):\n"
        "    return float(os.environ['WORTH']) * (answer in completion)\n"
    )
    at = ("--address", cluster)
    own = ("reward.parts={mine: {use: './mine.py:score'}}", "sft.steps=5")
    os.environ["WORTH"] = ENVIRONMENT["WORTH"] = "0.5"
    submitted = ("submit", "small.yaml", *own, *at, "--env", "WORTH")
    first = emberl_command(emberl.folder, *submitted, "schedule.steps=500")
    assert first.stdout is not None
    job = next(line for line in first.stdout if line.startswith("submitted")).split()[1].rstrip(",")
    run_dir, deadline = emberl.folder / "runs/small", time.monotonic() + START_SECONDS
    while not (run_dir / "metrics.jsonl").exists() or not read_metrics(run_dir):
        assert time.monotonic() < deadline and first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    seen, _ = emberl_command(emberl.folder, "top", job, *at, "--once").communicate(
        timeout=START_SECONDS
    )
    assert f"{job}: running, rl " in seen and "reward" in seen, seen
    stopped = emberl_command(emberl.folder, "stop", job, *at)
    told, _ = stopped.communicate(timeout=START_SECONDS)
    assert stopped.returncode == 0 and "saves after the step" in told, told
    told, _ = first.communicate(timeout=START_SECONDS)
    assert first.returncode == 130 and '"status": "interrupted"' in told, told[-3000:]
    done = len(read_metrics(run_dir))
    assert 0 < done < 500 and (run_dir / f"checkpoints/rl-{done:06}").exists()
    again = emberl_command(emberl.folder, *submitted, "--resume", f"schedule.steps={done + 1}")
    told, _ = again.communicate(timeout=START_SECONDS)
    assert again.returncode == 0 and '"status": "ok"' in told, told[-3000:]
    scores = {row["critic/score/max"] for row in read_metrics(run_dir)}
    assert len(read_metrics(run_dir)) == done + 1 and scores <= {0.0, 0.5}


def test_a_job_is_held_to_the_cluster_it_joined(cluster: str, emberl: Emberl) -> None:
    greedy = submit(
        cluster,
        "emberl",
        "train",
        str(emberl.config),
        f"run_dir={emberl.folder / 'greedy'}",
        "cluster.learners=4",
        "cluster.cpus_per_learner=1",
    )
    assert greedy.returncode != 0, "the job's status is the run's"
    assert "needs 4.5 CPU but the Ray cluster" in greedy.stdout, (
        "it must not start a cluster of its own"
    )
