"""Exit statuses of emberl's commands, and the last line of one that failed."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from .config.masking import hidden

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@contextmanager
def telling_why(interrupted: str) -> Iterator[None]:
    """A context in which any error ends the command with the reason in its last line. interrupted:
    the reason given for Ctrl-C."""
    from .config.load import ConfigError

    try:
        yield
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        fail(interrupted, INTERRUPTED)
    except typer.Exit:
        raise
    except Exception as error:
        print(hidden(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        fail(f"{type(error).__name__}: {error}", FAILED)


def fail(message: str, status: int) -> Any:
    """`say`, then exits with this status."""
    say(message)
    raise typer.Exit(status)


def say(message: str) -> None:
    """Prints an error as one line for people on stderr, and as one JSON line on stdout."""
    line = hidden(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "error", "error": line}), flush=True)
