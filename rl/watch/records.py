"""The records in a run's directory, for `emberl report`, `top` and `dashboard`."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.load import ConfigError
from ..run_directory import LOCK, METRICS, RESULT, read_metrics
from .dashboard import all_rows

ALERTS = "alerts.jsonl"
SYSTEM = "system.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The current state of a run."""

    folder: Path
    config: dict[str, Any]
    logged: list[dict[str, Any]]
    """Rows of `metrics.jsonl`."""
    alerts: list[dict[str, Any]]
    """`time`, `title` and `text` of each."""
    result: dict[str, Any] | None
    """The final JSON line; None before the end."""
    running: bool
    """Whether it runs on this machine."""
    host: str
    """The host of its newest attempt; "" if unknown."""

    @property
    def state(self) -> str:
        if self.running:
            return "running"
        if self.result is None and self.host not in ("", socket.gethostname()):
            return f"running, or ended without a result, on {self.host}"
        return "ended without a result" if self.result is None else str(self.result["status"])


def read_record(folder: Path) -> Record:
    """The records of a run's directory. Raises ConfigError if it is none."""
    if not (folder / METRICS).is_file() or not (folder / "config.yaml").is_file():
        parts = sorted(p.parent.name for p in folder.glob(f"*/{METRICS}"))
        fix = f"give one of its stages: {', '.join(parts)}" if parts else "give a run's directory"
        raise ConfigError(f"{folder} has no {METRICS}: {fix}")
    result = folder / RESULT
    return Record(
        folder=folder,
        config=yaml.safe_load((folder / "config.yaml").read_text()) or {},
        logged=read_metrics(folder / METRICS),
        alerts=_lines(folder / ALERTS),
        result=json.loads(result.read_text()) if result.is_file() else None,
        running=is_running(folder),
        host=lock.read_text().rpartition(" on ")[2] if (lock := folder / LOCK).is_file() else "",
    )


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """The run's rows as of `dashboard.all_rows`. Raises ConfigError if there is no run."""
    return all_rows(read_record(folder).logged, _lines(folder / SYSTEM))


def is_running(folder: Path) -> bool:
    """Whether a process of this machine holds the directory's lock; does not take it."""
    try:
        inode = (folder / LOCK).stat().st_ino
        held = Path("/proc/locks").read_text()
    except OSError:  # no lock yet, or another system than Linux
        return False
    # lines with `->` are of processes that wait for a lock
    return any(f":{inode} " in f"{line} " for line in held.splitlines() if "->" not in line)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; lines that are incomplete are left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
