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
"""From here on `wandb sync` heeds `WANDB_RESUME`; before it had an option of its own."""


def sync(folder: Path, tell: Callable[[str], None] = print) -> int:
    """Uploads every offline run of a run's directory, of a recipe's or of one above them; the exit
    status. What was uploaded before is passed over. `ConfigError` where there is nothing, or no
    key."""
    found = sorted(
        {
            p
            for pattern in ("wandb", "*/wandb", "*/*/wandb")
            for p in folder.glob(f"{pattern}/{OFFLINE}")
        }
    )
    if not found:
        raise ConfigError(
            f"{folder} has no run that W&B kept offline (wandb/{OFFLINE}); runs with a key, or with"
            " tracking.wandb=online, are uploaded while they go on"
        )
    new = [run for run in found if not list(run.glob("*.wandb.synced"))]
    if len(new) < len(found):
        tell(f"{len(found) - len(new)} of {len(found)} offline runs were uploaded before")
    if not new:
        return 0
    if not has_wandb_key():
        raise ConfigError(
            f"{len(new)} offline runs wait, but W&B has no key here: run `wandb login`, or set"
            " WANDB_API_KEY (and WANDB_BASE_URL for a server of your own)"
        )
    for run in new:
        tell(f"uploading {run}")
        # a later sitting goes on where the earlier one ended, and does not take its place
        command = [sys.executable, "-m", "wandb", "sync", str(run)]
        command += ["--append"] if Version(version("wandb")) < RESUMES else []
        environment = os.environ | {"WANDB_RESUME": "allow"}
        ended = subprocess.run(command, check=False, env=environment)
        if ended.returncode or not list(run.glob("*.wandb.synced")):
            tell(f"{run} could not be uploaded; what it holds is still there")
            return ended.returncode or 1
    return 0
