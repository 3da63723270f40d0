"""The last lines that an engine's processes printed, which alone tell why they died."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

LINES = 200


class LogTail:
    """Keeps the last lines of processes that are started within `inherited`: they write into a
    pipe, whose lines a thread passes on to stderr."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LINES)
        source, sink = os.pipe()
        self._read = source
        self._write = sink
        self._onward = os.dup(2)
        self._thread = threading.Thread(target=self._pump, daemon=True, name="engine-log")
        self._thread.start()

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Within it, stdout and stderr of this process are the pipe, so that children inherit
        it."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(self._write, 1)
            os.dup2(self._write, 2)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)

    def lines(self, count: int = 10) -> list[str]:
        """The last non-empty lines."""
        return [line for line in list(self._lines) if line.strip()][-count:]

    def cause(self) -> str:
        """The last line that names an error (a traceback ends with it), else the last line."""
        lines = self.lines(LINES)
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it printed nothing"])[-1].strip()

    def close(self) -> None:
        """Closes this process's end; the thread ends when the last process that inherited the pipe
        has ended. Idempotent."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def _pump(self) -> None:
        with os.fdopen(self._read, "rb") as source:
            for raw in source:
                self._lines.append(raw.decode(errors="replace").rstrip())
                os.write(self._onward, raw)
        os.close(self._onward)
