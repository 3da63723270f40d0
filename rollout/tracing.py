"""A trace of what an actor's process does, by torch's own profiler, as bytes that travel to the
driver: nodes need share no disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig


class ProcessTrace:
    """Off but between `begin` and `end`; costs nothing while off."""

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
        """The trace since `begin`, as gzipped JSON in Chrome's format; none where it was not begun,
        as in an actor that replaced another."""
        profile, self._profile = self._profile, None
        if profile is None:
            return b""
        profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            profile.export_chrome_trace(str(file))
            return file.read_bytes()
