"""A run as a Ray job, by `emberl submit` and by Ray's own command, on a cluster that lets in who
knows its token and where emberl is not installed."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from small_system import Emberl, read_metrics

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
START_SECONDS = 300.0
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
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


def without_emberl(folder: Path) -> Path:
    """The interpreter of an environment with the packages of this one, but for emberl."""
    import ray

    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    # a folder that is merely on the path: links of editable packages in it are not followed
    (site / "packages.pth").write_text(f"{Path(ray.__file__).parents[1]}\n")
    python = folder / "bin/python"
    look = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('ray', 'emberl')])"
    found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True)
    if found.stdout.strip() != "[True, False]":
        pytest.skip("emberl is installed here as a package like any other")
    return python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of a cluster of two CPUs with ports of its own; only this cluster is ended
    afterwards, so it is a child to terminate and never `ray stop`, which ends every cluster on the
    machine."""
    folder = tmp_path_factory.mktemp("head")
    python = without_emberl(folder / "environment")
    path = f"{python.parent}{os.pathsep}{ENVIRONMENT['PATH']}"
    # of its own and short: Ray leaves the address of the last cluster in the folder, which a later
    # ray.init() would join, and the paths of its sockets may not be long
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    port, dashboard, client, agent = free_ports(4)
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [
                str(python),
                "-m",
                "ray.scripts.scripts",
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
            env=ENVIRONMENT | {"PATH": path},
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
        processes = []
        with suppress(psutil.NoSuchProcess):  # it ended, which is said above
            first = psutil.Process(head.pid)
            processes = [first, *first.children(recursive=True)]
        head.terminate()
        _, left = psutil.wait_procs(processes, timeout=30)
        for process in left:
            process.kill()
        head.wait(timeout=30)
        shutil.rmtree(scratch, ignore_errors=True)


def emberl_command(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return started(folder, str(BIN / "emberl"), *arguments, **environment)


def started(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told_by(command: subprocess.Popen[str]) -> str:
    return command.communicate(timeout=START_SECONDS)[0]


def said(command: subprocess.Popen[str], words: str) -> str:
    """The next line with these words."""
    assert command.stdout is not None
    lines = []
    for line in command.stdout:
        lines.append(line)
        if words in line:
            return line
    raise AssertionError("".join(lines)[-4000:])


def until_logged(run_dir: Path, steps: int, command: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < steps:
        assert time.monotonic() < deadline and command.poll() is None, told_by(command)
        time.sleep(0.2)


def kill_driver(run_dir: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "emberl.rl.cli" in line and f"run_dir={run_dir}" in line:
            process.kill()


@contextmanager
def both_cpus_held(cluster: str, folder: Path) -> Iterator[None]:
    """By another job, while the block runs."""
    hold = (
        "import ray, pathlib, time; ray.init();"
        "ray.util.placement_group([{'CPU': 2}]).wait(60); print('held', flush=True);"
        f"[time.sleep(0.2) for _ in range(1500) if not pathlib.Path({str(folder / 'go')!r}).exists()]"
    )
    job = ("job", "submit", "--address", cluster, "--", "python", "-c", hold)
    holder = started(folder, str(BIN / "ray"), *job)
    try:
        said(holder, "held")
        yield
    finally:
        (folder / "go").touch()
        told_by(holder)


def test_a_job_is_killed_submitted_again_and_stopped(
    cluster: str, emberl: Emberl, wheel: Path
) -> None:
    """With a function of one's own beside the configuration, both by relative paths, as in a run
    here; the exit status is the job's."""
    emberl.config.touch()
    (emberl.folder / "mine.py").write_text(
        "import os\n"
        "def score(completion, answer, **_):\n"
        "    return float(os.environ['WORTH']) * (answer in completion)\n"
    )
    at = ("--address", cluster)
    refused = emberl_command(
        emberl.folder, "submit", "small.yaml", *at, RAY_AUTH_TOKEN=secrets.token_hex(32)
    )
    assert "token" in told_by(refused).lower() and refused.returncode == 2
    own = ("reward.parts={mine: {use: './mine.py:score'}}", "sft.steps=5")
    os.environ["WORTH"] = ENVIRONMENT["WORTH"] = "0.5"
    submitted = ("submit", "small.yaml", *own, *at, "--env", "WORTH", "--wheel", str(wheel))
    submitted += ("--resume",)
    run_dir = emberl.folder / "runs/small"

    first = emberl_command(emberl.folder, *submitted, "schedule.steps=500")
    until_logged(run_dir, 3, first)
    kill_driver(run_dir)
    told = told_by(first)
    assert first.returncode not in (0, 130) and ": FAILED: " in told, told[-3000:]

    again = emberl_command(emberl.folder, *submitted, "schedule.steps=500")
    job = said(again, "submitted").split()[1].rstrip(",")
    until_logged(run_dir, 4, again)
    seen = told_by(emberl_command(emberl.folder, "top", job, *at, "--once"))
    assert f"{job}: running, rl " in seen and "reward" in seen, seen
    stopped = emberl_command(emberl.folder, "stop", job, *at)
    told = told_by(stopped)
    assert stopped.returncode == 0 and "saves after the step" in told, told
    told = told_by(again)
    assert again.returncode == 130 and '"status": "interrupted"' in told, told[-3000:]
    rows = read_metrics(run_dir)
    done = len(rows)
    assert [row["step"] for row in rows] == list(range(1, done + 1)) and 3 < done < 500
    assert {row["critic/score/max"] for row in rows} <= {0.0, 0.5}
    assert (run_dir / f"checkpoints/rl-{done:06}").exists()


def test_a_job_waits_its_turn_and_rays_own_stop_leaves_it_time_to_save(
    cluster: str, emberl: Emberl, wheel: Path
) -> None:
    emberl.config.touch()
    at = ("--address", cluster)
    longer = ("sft.steps=5", "schedule.steps=500", "--wheel", str(wheel))
    with both_cpus_held(cluster, emberl.folder):
        run = emberl_command(emberl.folder, "submit", "small.yaml", *longer, *at)
        job = said(run, "submitted").split()[1].rstrip(",")
        assert "CPU, up to cluster.start_timeout" in said(run, "waiting for")
    run_dir = emberl.folder / "runs/small"
    until_logged(run_dir, 3, run)
    stop = [str(BIN / "ray"), "job", "stop", "--address", cluster, job]
    subprocess.run(stop, env=ENVIRONMENT, capture_output=True, timeout=START_SECONDS, check=True)
    told = told_by(run)
    assert run.returncode == 130 and '"status": "interrupted"' in told, told[-3000:]
    assert (run_dir / f"checkpoints/rl-{len(read_metrics(run_dir)):06}").exists()


def test_a_job_is_held_to_the_cluster_it_joined(cluster: str, emberl: Emberl) -> None:
    greedy = submit(
        cluster,
        "emberl",
        "train",
        str(emberl.config),
        f"run_dir={emberl.folder / 'greedy'}",
        "cluster.learners=4",
        "cluster.cpus_per_learner=1",
        "cluster.join_timeout=1",
    )
    assert greedy.returncode != 0, "the job's status is the run's"
    assert "needs 4.5 CPU but the Ray cluster" in greedy.stdout, (
        "it must not start a cluster of its own"
    )


def test_a_job_waits_for_nodes_and_nobody_for_a_lost_head(
    cluster: str, emberl: Emberl, wheel: Path
) -> None:
    """The last test: the job server is gone after it."""
    emberl.config.touch()
    more = ("cluster.learners=4", "cluster.cpus_per_learner=1", "cluster.join_timeout=600")
    at = ("--address", cluster, "--wheel", str(wheel))
    run = emberl_command(emberl.folder, "submit", "small.yaml", *more, *at)
    assert "needs 4.5 CPU but the Ray cluster" in said(run, "waiting for nodes")
    port = cluster.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if f"--port={port}" in line and any("dashboard.py" in word for word in line):
            process.kill()
    told = told_by(run)
    assert run.returncode == 1 and "its job server was lost" in told, told[-3000:]
    assert "Traceback" not in told, told[-3000:]
