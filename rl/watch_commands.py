"""The commands that look at runs, and at a machine before one: `emberl report`, `top`, `sync`,
`dashboard` and `doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .exits import FAILED, USAGE, fail

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="A run's directory.", metavar="DIR")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """A context in which ValueError and OSError end the command with one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)


@app.command(epilog="Example: emberl report runs/quickstart-2 --against runs/quickstart")
def report(
    run: Folder,
    against: Annotated[
        Path | None, typer.Option(help="Another run, whose settings are compared.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report.html in the run's directory.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Where to write who was busy when for ui.perfetto.dev.")
    ] = None,
) -> None:
    """Writes a run as one HTML file: curves, spread, who was busy when, answers, settings."""
    from .watch.report import write_report

    with _user_errors():
        print(write_report(run, out, against))
        if trace is not None:
            from .watch.profiles import write_timeline

            print(write_timeline(run, trace))


@app.command(epilog="Example: emberl sync runs/quickstart")
def sync(run: Folder) -> None:
    """Uploads to W&B what a run kept offline."""
    from .watch.upload import sync as upload

    with _user_errors():
        status = upload(run)
    raise typer.Exit(status)


@app.command(epilog="Example: emberl dashboard runs/quickstart --png dashboard.png")
def dashboard(
    run: Annotated[
        Path | None, typer.Argument(help="A run's directory, for --png.", metavar="[DIR]")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draws the run's own figures into this file instead.")
    ] = None,
    project: Annotated[str, typer.Option(help="Of W&B, as tracking.project.")] = "emberl",
    entity: Annotated[str | None, typer.Option(help="Of W&B; default: your own.")] = None,
    name: Annotated[str, typer.Option(help="Of the workspace.")] = "emberl",
) -> None:
    """Makes a W&B workspace with sections Learning, Rollouts, Rewards, Weight sync, Schedule and
    System, or a picture of them from a local run."""
    from .watch.dashboard import draw_all, save, workspace

    with _user_errors():
        if png is None:
            if run is not None:
                raise ValueError(f"{run}: a local run is drawn with --png FILE")
            print(save(workspace(project, entity, name)))
            return
        if run is None:
            raise ValueError(f"--png {png} needs a run's directory")
        print(draw_all(run, png))


@app.command(epilog="Example: emberl top runs/quickstart")
def top(
    run: Annotated[str, typer.Argument(help="A run's directory, or with --address a Ray job.")],
    address: Annotated[str | None, typer.Option(help="As of emberl submit.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
) -> None:
    """Shows a run that goes on elsewhere: progress, figures, warnings; until it ends or Ctrl-C."""
    from .watch.top import watch

    with _user_errors():
        try:
            watch(run, address, once=once)
        except KeyboardInterrupt:
            raise typer.Exit from None


@app.command(epilog="Example: emberl doctor configs/quickstart.yaml")
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="What is to run here; without it nothing that only some runs need is an error."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as of emberl train.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            help="Uses the device, too: products, collectives, an engine, engine against learner."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Examines this machine: versions, sandbox, processors, limits, disk, network, W&B; each line
    with its fix."""
    from .config.load import ConfigError
    from .config.stages import Recipe, load_experiment
    from .watch.doctor import examine
    from .watch.machine import State, worst

    try:
        settings = None if config is None else load_experiment(config, overrides or ())
    except ConfigError as error:
        fail(str(error), USAGE)
    stages = [s.config for s in settings.stages] if isinstance(settings, Recipe) else [settings]
    checks = []
    for number, stage in enumerate(stages, 1):
        for check in examine(stage, live=live and number == len(stages)):
            if check in checks:  # stages have lines in common
                continue
            checks.append(check)
            if not as_json:
                print(check, flush=True)
    status = worst(checks)
    if as_json:
        print(json.dumps({"status": status, "checks": [asdict(check) for check in checks]}))
    if status is State.ERROR:
        raise typer.Exit(FAILED)
