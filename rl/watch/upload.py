"""`emberl sync`: brings what W&B kept offline to its server, by `wandb sync` itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

from ..config.load import ConfigError
from .sinks import has_wandb_key

OFFLINE = "offline-run-*"
RESUMES = Version("0.29")
"""The version since which `wandb sync` heeds `WANDB_RESUME`; before, it had the option --append."""


def sync(folder: Path, tell: Callable[[str], None] = print) -> int:
    """Uploads every offline run of a run's directory, of a recipe's or of one above them; returns
    the exit status. Runs that were uploaded before are skipped. Raises ConfigError if there are no
    runs, or no key."""
    runs = sorted(
        {
            p
            for pattern in ("wandb", "*/wandb", "*/*/wandb")
            for p in folder.glob(f"{pattern}/{OFFLINE}")
        }
    )
    if not runs:
        raise ConfigError(
            f"{folder} has no run that W&B kept offline (wandb/{OFFLINE}); runs with a key, or with"
            " tracking.wandb=online, are uploaded while they go on"
        )
    new = [run for run in runs if not list(run.glob("*.wandb.synced"))]
    if len(new) < len(runs):
        tell(f"{len(runs) - len(new)} of {len(runs)} offline runs were uploaded before")
    if not new:
        return 0
    if not has_wandb_key():
        raise ConfigError(
            f"{len(new)} offline runs wait, but W&B has no key here: run `wandb login`, or set"
            " WANDB_API_KEY (and WANDB_BASE_URL for a server of your own)"
        )
    for run in new:
        tell(f"uploading {run}")
        # appended: the offline run of a resumed attempt has the same id as the one before it
        command = [sys.executable, "-m", "wandb", "sync", str(run)]
        command += ["--append"] if Version(version("wandb")) < RESUMES else []
        environment = os.environ | {"WANDB_RESUME": "allow"}
        ended = subprocess.run(command, check=False, env=environment)
        if ended.returncode or not list(run.glob("*.wandb.synced")):
            tell(f"{run} could not be uploaded; what it holds is still there")
            return ended.returncode or 1
    return 0
