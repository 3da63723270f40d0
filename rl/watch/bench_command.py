"""The command `emberl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..exits import FAILED, USAGE, fail

app = typer.Typer(help="Measures this machine.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Each measurement is a command of its own."""


@app.command(epilog="Example: emberl bench device --json device.json")
def device(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Where to write the figures; they are printed too."),
    ] = None,
    name: Annotated[
        str,
        typer.Option("--device", help="As cluster.device; auto: an accelerator if there is one."),
    ] = "auto",
    model: Annotated[
        str | None, typer.Option(help="A local model to decode with; default: a tiny one.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes: whether everything runs.")] = False,
) -> None:
    """GEMM, memory, host link, collective, decoding and what an update costs an engine, as one
    JSON object for `emberl plan link.rates=FILE`; about two minutes on a card."""
    from .bench_device import QUICK, measure, write

    try:
        results = measure(name, QUICK if quick else None, model)
        print(write(results, json_file))
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    if failed := [
        part for part, value in results.items() if isinstance(value, dict) and "error" in value
    ]:
        raise typer.Exit(FAILED if failed != ["collective"] or results["count"] > 1 else 0)
