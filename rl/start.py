"""What a shell's `emberl` runs."""

from __future__ import annotations

import signal


def main() -> None:
    """The command. A Ctrl-C while it is loaded ends it like any program, without the traceback of
    whatever was being imported; `cli` undoes that before anything is done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as command

    command()
