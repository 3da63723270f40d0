"""The commands `emberl patches inspect` and `emberl patches apply`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Weight patches: what is in them, and models from a run's history of them.",
    no_args_is_help=True,
)
FAILED = 1


@app.callback()
def _root() -> None:
    """Each command has --help with an example."""


@app.command(
    epilog="Example: emberl patches inspect runs/quickstart/history/00000007-from-00000006.patch"
)
def inspect(
    file: Annotated[Path, typer.Argument(help="A weight patch, or an anchor.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Prints a patch's header and what it changes in each tensor, and verifies it: every checksum;
    of an anchor also the digests of the weights that it makes."""
    from .history import BROKEN, describe, examine

    try:
        examined = examine(file)
    except BROKEN as error:
        _fail(f"{file}: {error}")
    print(json.dumps(examined) if as_json else "\n".join(describe(examined)))


@app.command(
    epilog=(
        "Example: emberl patches apply runs/quickstart/history at-20 --version 20 --model"
        " runs/quickstart/model"
    )
)
def apply(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="BASE PATCH... OUT",
            help=(
                "BASE: an anchor, a model's directory, or a run's history, which has all its"
                " patches. Then patches in their "
                "order. OUT: the directory to write."
            ),
        ),
    ],
    version: Annotated[int | None, typer.Option(help="Stop at this version.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model's directory, for its config and tokenizer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Rebuilds a checkpoint from whole weights and the patches after them; every tensor is verified
    by its digest."""
    from .history import BROKEN, rebuild

    if len(files) < 2:
        _fail("give a base and, last, the directory to write")
    *given, out = files
    try:
        weights = rebuild(given, out, version=version, model=model)
    except BROKEN as error:
        _fail(str(error))
    if as_json:
        print(
            json.dumps(
                {"status": "ok", "version": weights.version, "root": weights.root, "out": str(out)}
            )
        )
    else:
        print(
            f"version {weights.version} in {out}: {len(weights.tensors)} tensors, each verified;"
            f" root {weights.root}"
        )


def _fail(message: str) -> Any:
    """Prints one line on stderr and one JSON line on stdout, and exits with status 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "error", "error": message}), flush=True)
    raise typer.Exit(FAILED)


__all__ = ["app"]
