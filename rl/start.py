"""The entry point of the console script `emberl`."""

from __future__ import annotations

import signal


def main() -> None:
    """Loads and runs the command line. Ctrl-C during the imports ends the process without a
    traceback; `cli` restores Python's handler before a command runs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as command

    command()
