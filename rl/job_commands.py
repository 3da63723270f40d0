"""The commands `emberl submit` and `emberl stop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .exits import INTERRUPTED, USAGE, fail

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for the address of the job server."""
app = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(help="The dashboard of the head node, e.g. http://head:8265.", envvar=ADDRESS),
]


@app.command(
    epilog="Example: emberl submit my.yaml seed=1 --address http://head:8265 --env WANDB_API_KEY"
)
def submit(
    config: Annotated[Path, typer.Argument(help="The experiment, within the working directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As of emberl train.")] = None,
    address: Address = None,
    env: Annotated[
        list[str] | None, typer.Option(help="A variable that the job has as it is here.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="emberl itself, for a cluster that has none.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the run's last checkpoint, if there is one.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once.")] = False,
) -> None:
    """Runs an experiment as a Ray job, with what is in the working directory; its log comes here,
    and its exit status is this command's."""
    from .config.load import ConfigError
    from .submit import submit as submit_run

    try:
        status = submit_run(
            config,
            overrides or (),
            address=_needed(address),
            arguments=("--resume", "auto") if resume else (),
            environment=env or (),
            wheel=wheel,
            wait=not no_wait,
        )
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:  # the job goes on
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(status)


@app.command(epilog="Example: emberl stop runs/quickstart")
def stop(
    run: Annotated[str, typer.Argument(help="A run's directory, or with --address a Ray job.")],
    address: Annotated[str | None, typer.Option(help="As of emberl submit.")] = None,
) -> None:
    """Has a run save after the step that it makes, and end."""
    from .config.load import ConfigError
    from .submit import stop as stop_run

    try:
        stop_run(run, address)
    except ConfigError as error:
        fail(str(error), USAGE)


def _needed(address: str | None) -> str:
    if address is None:
        fail(f"give --address http://HEAD:8265, the cluster's dashboard, or set {ADDRESS}", USAGE)
    assert address is not None
    return address
