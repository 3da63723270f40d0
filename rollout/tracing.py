"""A trace of an actor's process by torch's profiler, returned to the driver as bytes, so that nodes
need not share a disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig


class ProcessTrace:
    """A profiler of this process that records between `begin` and `end`, and costs nothing else."""

    def __init__(self) -> None:
        self._profile: Any = None

    def begin(self) -> None:
        """Records all threads from now on, on processors and devices."""
        self._profile = torch.profiler.profile(
            activities=torch.profiler.supported_activities(),  # type: ignore[no-untyped-call]
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self._profile.start()

    def end(self) -> bytes:
        """The trace since `begin`, as gzipped JSON in Chrome's format; b"" without a `begin`, as in
        an actor that replaced another."""
        profile = self._profile
        self._profile = None
        if profile is None:
            return b""
        profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            profile.export_chrome_trace(str(file))
            return file.read_bytes()
