"""A run as a job of a Ray cluster: `emberl submit` and `emberl stop`.

The working directory is uploaded with the job, so that the configuration, the user's functions and
small data sets are found there as here; models, runs and files that git ignores are not uploaded.
Large files are named by absolute paths on a disk that the cluster shares.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config.load import Config, ConfigError
from .config.masking import hidden
from .config.stages import Recipe, load_experiment
from .exits import FAILED, INTERRUPTED
from .run_directory import STOP, SUMMARY

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STAYS = (
    ".git",
    ".venv*",
    "__pycache__",
    "runs",
    "models",
    "build",
    "wandb",
    "*.safetensors",
    "*.gguf",
)
"""Patterns, as in a .gitignore, of files that are not uploaded with a job."""
STOP_WAIT, SAVES_WITHIN = "RAY_JOB_STOP_WAIT_TIME_S", "600"
"""Ray's variable for the seconds between SIGTERM and SIGKILL of a job that is stopped through its
dashboard or API (default 3), and its value for a run, which must end its step and save."""
SILENCE = 30.0
"""Seconds without a line of a job's log after which its job server is checked."""
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
RUN_DIR = "run_dir"


def submit(
    file: Path,
    overrides: Sequence[str],
    *,
    address: str,
    arguments: Sequence[str] = (),
    environment: Sequence[str] = (),
    wheel: Path | None = None,
    wait: bool = True,
    tell: Callable[[str], None] = print,
) -> int:
    """Submits a run from the working directory and, if `wait`, follows it; returns the exit status.

    arguments: of `emberl train`, e.g. `--resume`. environment: names of variables to copy to the
    job. wheel: emberl itself, for a cluster without it. Raises ConfigError before anything is sent.
    """
    loaded = load_experiment(file, overrides)
    here = Path.cwd()
    if not file.resolve().is_relative_to(here):
        raise ConfigError(
            f"{file} is not in the working directory {here}, which is what travels; run emberl"
            " submit in a directory above it"
        )
    missing = [name for name in environment if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: there is no such variable here")
    run_dir = absolute(str(loaded.folder if isinstance(loaded, Recipe) else loaded.output))
    command = ["python", "-m", "emberl.rl.cli", "train", str(file.resolve().relative_to(here))]
    command += [*overrides, *_absolute_paths(loaded), f"run_dir={run_dir}", *arguments]
    runtime: dict[str, Any] = {
        "working_dir": str(here),
        "excludes": list(STAYS),
        "env_vars": {STOP_WAIT: SAVES_WITHIN} | {n: os.environ[n] for n in environment},
    }
    with _ray_errors(address), _unpacked(wheel) as packages:
        runtime["py_modules"] = packages
        client = _client(address)
        job = client.submit_job(
            entrypoint=shlex.join(command), runtime_env=runtime, metadata={RUN_DIR: run_dir}
        )
    shown = hidden(address)
    tell(f"submitted {job}, which writes to {run_dir} on the node where it starts")
    tell(f"follow it: ray job logs --follow --address {shown} {job}")
    tell(f"stop it after a step, saved: emberl stop {job} --address {shown}")
    return follow(client, job, tell) if wait else 0


@contextmanager
def _unpacked(wheel: Path | None) -> Iterator[list[str]]:
    """A context with a wheel's contents as folders that Ray makes importable. The wheel itself Ray
    would install with its dependencies, another torch and another Ray over the cluster's."""
    if wheel is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"--wheel {wheel}: {error}; make it by pip wheel --no-deps, in emberl's repository"
            ) from error
        yield sorted(str(path) for path in Path(folder).iterdir())


def follow(client: JobSubmissionClient, job: str, tell: Callable[[str], None]) -> int:
    """Prints a job's log until it ends; returns its exit status, or without one that of a run which
    was stopped or failed. A job server that is lost meanwhile counts as a failure."""
    from aiohttp import ClientError
    from ray.exceptions import RayError

    try:
        asyncio.run(_print_log(client, job, tell))
        while (info := client.get_job_info(job)).status.value not in FINAL:
            time.sleep(0.5)
    except (OSError, RuntimeError, ClientError, RayError) as error:
        line = " ".join(str(error).split())[:300]
        tell(
            hidden(
                f"{job}: its job server was lost ({type(error).__name__}: {line}); once that is"
                " back, ray job status and ray job logs say what became of it"
            )
        )
        return FAILED
    if info.status.value == "SUCCEEDED":
        return 0
    tell(hidden(f"{job}: {info.status.value}: {info.message}"))
    return info.driver_exit_code or (INTERRUPTED if info.status.value == "STOPPED" else FAILED)


async def _print_log(client: JobSubmissionClient, job: str, tell: Callable[[str], None]) -> None:
    """Prints a job's log to its end. After `SILENCE` it asks the job server for the job's status,
    which fails if the server is gone: a machine that is gone closes no connection."""
    texts = client.tail_job_logs(job)
    following = asyncio.ensure_future(anext(texts, None))
    while True:
        if not (await asyncio.wait({following}, timeout=SILENCE))[0]:
            await asyncio.to_thread(client.get_job_status, job)
            continue
        text = following.result()
        if text is None:
            return
        tell(hidden(text.rstrip("\n")))  # Ray's own first line has the whole command
        following = asyncio.ensure_future(anext(texts, None))


@contextmanager
def follower(
    job: str, address: str, script: str, *, wait: bool
) -> Iterator[tuple[Callable[[], str], Callable[[], list[str]]]]:
    """A context with a small job that runs a shell script in another job's run directory. Yields
    two functions: one returns the other job's state, one the lines that the script has printed.
    wait: yield once the script has ended; otherwise it is stopped at the end."""
    with _ray_errors(address):
        client = _client(address)
        run_dir = _run_dir_of(client, job)
        other = client.submit_job(entrypoint=f"cd {shlex.quote(run_dir)} && {script}")
        try:
            while wait and client.get_job_status(other).value not in FINAL:
                time.sleep(0.5)
            yield (
                lambda: str(client.get_job_status(job).value).lower(),
                lambda: client.get_job_logs(other).splitlines(),
            )
        finally:
            if not wait:
                client.stop_job(other)


def _run_dir_of(client: JobSubmissionClient, job: str) -> str:
    run_dir = (client.get_job_info(job).metadata or {}).get(RUN_DIR)
    if run_dir is None:
        raise ConfigError(f"{job} was not submitted by emberl submit; use ray job")
    return run_dir


def stop(target: str, address: str | None, tell: Callable[[str], None] = print) -> None:
    """Asks a run to save and end after its current step, by a file in its directory; with an
    address `target` is a job, and a second, small job writes the file. Raises ConfigError if there
    is no such run."""
    if address is None:
        folder = Path(target)
        if not any((folder / name).is_file() for name in ("config.yaml", SUMMARY)):
            raise ConfigError(
                f"{target} is no run's directory here; for a job add --address http://HEAD:8265"
            )
        (folder / STOP).touch()
        tell(f"{folder}: it saves after the step that it makes, and ends")
        return
    with _ray_errors(address):
        client = _client(address)
        run_dir = _run_dir_of(client, target)
        other = client.submit_job(entrypoint=f"touch {shlex.quote(f'{run_dir}/{STOP}')}")
        if follow(client, other, tell):
            raise ConfigError(f"{target}: {run_dir} could not be written where it runs")
    tell(f"{target}: it saves after the step that it makes, and ends")


def absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _absolute_paths(loaded: Config | Recipe) -> list[str]:
    """Overrides with the absolute paths of local models, which are not uploaded; without those that
    a recipe's own stages make."""
    if isinstance(loaded, Recipe):
        return [
            f"stages.{stage.name}.{override}"
            for stage in loaded.stages
            for override in _absolute_paths(stage.config)
            if absolute(str(loaded.folder)) not in override
        ]
    named = {"model.path": loaded.model.path, "critic.path": loaded.critic.path}
    return [f"{k}={absolute(v)}" for k, v in named.items() if v is not None and Path(v).exists()]


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


@contextmanager
def _ray_errors(address: str) -> Iterator[None]:
    """Turns errors of the network and of Ray's job server into a ConfigError, which the CLI prints
    without a traceback."""
    from ray.exceptions import RayError  # raised for a wrong token

    try:
        yield
    except (ConnectionError, RuntimeError, RayError) as error:
        if isinstance(error, ConfigError):
            raise
        line = " ".join(str(error).split())[:500]
        raise ConfigError(
            f"--address {address}: {line}; it is the dashboard of the head node, e.g."
            " http://head:8265"
        ) from error
