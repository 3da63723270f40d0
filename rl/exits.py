"""How a command of emberl ends that could not do what it was asked."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from .config.masking import hidden

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def fail(message: str, status: int) -> Any:
    """One line for a person on stderr, one JSON line on stdout, and a status that is not zero."""
    line = hidden(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "error", "error": line}), flush=True)
    raise typer.Exit(status)
