"""How a command of emberl ends that could not do what it was asked."""

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
    """The last line of a run must say why it failed, whatever failed. interrupted: what it says
    after Ctrl-C."""
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
    """`say`, and a status that is not zero."""
    say(message)
    raise typer.Exit(status)


def say(message: str) -> None:
    """Why it ends: one line for a person on stderr, one JSON line on stdout."""
    line = hidden(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "error", "error": line}), flush=True)
