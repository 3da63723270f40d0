"""The commands `emberl train`, `presets` and `keys`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .exits import INTERRUPTED, USAGE, fail, telling_why
from .local_ray import before_import

if TYPE_CHECKING:
    from .config.load import Config
    from .config.stages import Recipe
    from .run_directory import Resume

app = typer.Typer()

File = Annotated[Path, typer.Argument(help="The experiment, a YAML file.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Changes to it, e.g. optim.lr=1e-4.")]
DryRun = Annotated[
    bool, typer.Option(help="Print the resolved configuration and the placement, and stop.")
]
GoOn = Annotated[
    bool,
    typer.Option(help="Go on from the run's last checkpoint; --resume auto: if there is one."),
]
Override = Annotated[
    bool,
    typer.Option(
        help="With --resume: go on although stages, data, model or seed are not the checkpoint's."
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="STAGE",
        help=(
            "Of a recipe: do this stage and all after it anew; what they left is removed. Without"
            " it, what is done is skipped."
        ),
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: the overrides that give the defaults of `verl` or of `trl`."
    ),
]


@app.command(epilog="Example: emberl train configs/quickstart.yaml schedule.steps=50 seed=1")
def train(
    config: File,
    overrides: Changes = None,
    dry_run: DryRun = False,
    resume: GoOn = False,
    override: Override = False,
    start: From = None,
    like: Like = None,
) -> None:
    """Runs an experiment, or the stages of a recipe that are not done; the last line of stdout is
    one JSON object with the result."""
    changes, how = list(overrides or ()), "must" if resume else "never"
    if resume and "auto" in changes:  # the flag's own word, which has no key=value
        changes.remove("auto")
        how = "auto"
    with telling_why(
        "interrupted before anything could be saved; --resume goes on from the last checkpoint, if"
        " there is one"
    ):
        settings = _experiment(config, changes, dry_run, start, like)
        if dry_run:
            show_plan(settings, like)
            return
        result = _run(settings, how, override, start)  # type: ignore[arg-type]
    print(json.dumps(result), flush=True)
    if result["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _experiment(
    file: Path, changes: list[str], dry_run: bool, start: str | None, like: str | None
) -> Config | Recipe:
    """The experiment in the file, with its changes. Raises `ConfigError` for options that do not
    fit it."""
    from .config.likeness import PEERS
    from .config.load import ConfigError
    from .config.stages import Recipe, load_experiment

    settings = load_experiment(file, changes)
    if like is not None and (not dry_run or like not in PEERS):
        raise ConfigError(
            f"--like {like}: give --dry-run --like {' or --dry-run --like '.join(PEERS)}"
        )
    if start is not None and not isinstance(settings, Recipe):
        raise ConfigError(f"--from {start}: {file} has no named stages; leave it out")
    return settings


def _run(
    settings: Config | Recipe, how: Resume, override: bool, start: str | None
) -> dict[str, Any]:
    """Runs the experiment; returns the result for the last line."""
    from .config.stages import Recipe

    stages = [s.config for s in settings.stages] if isinstance(settings, Recipe) else [settings]
    before_import(next((s.cluster.address for s in stages if s.cluster.address), None))
    if isinstance(settings, Recipe):
        from .stages import run_recipe

        return run_recipe(settings, start=start, override=override)
    from .recipe import train as run_training

    return run_training(settings, resume=how, override=override).as_json()


@app.command(epilog="Example: emberl presets")
def presets() -> None:
    """The values of `algorithm`: each with its paper and the settings that it stands for."""
    from .config.cautions import describe_presets

    print("\n".join(describe_presets()))


@app.command(name="keys", epilog="Example: emberl keys rollout")
def reference(
    within: Annotated[
        str, typer.Argument(help="A key or a group; with it the whole of what is said of each.")
    ] = "",
) -> None:
    """Every key of a configuration: its type, its default and what it means."""
    from .config.key_reference import table
    from .config.load import Config

    try:
        print("\n".join(table(Config, within)))
    except ValueError as error:
        fail(str(error), USAGE)


def show_plan(settings: Config | Recipe, like: str | None = None) -> None:
    """Prints the output of `--dry-run`, of a recipe for each stage: configuration, placement,
    changes from the preset, doubtful settings, and remarks on the first rows of the data."""
    from .config.stages import Recipe
    from .model_files import check_files
    from .preflight import check_inputs

    if isinstance(settings, Recipe):
        from .stages import check_recipe

        said = check_recipe(settings)
        for number, stage in enumerate(settings.stages, 1):
            print(f"# stage {number} of {len(settings.stages)}: {stage.name} ({stage.kind})")
            show_run(stage.config, like)
            print()
    else:
        check_files(settings)
        said = check_inputs(settings)
        show_run(settings, like)
    for line in said:
        print(f"data: {line}")


def show_run(settings: Config, like: str | None) -> None:
    """Prints a run's configuration, its placement, and remarks on them."""
    from ..rollout.engine import check_engine
    from .config.cautions import said_at_start
    from .config.likeness import describe
    from .config.load import to_yaml, user_errors
    from .placement import plan_placement

    # where it will run, vLLM may be installed
    if settings.rollout.engine != "vllm" or settings.rollout.servers:
        with user_errors():
            check_engine(
                settings.rollout.engine, settings.rollout.engine_args, settings.rollout.servers
            )
    print(to_yaml(settings).rstrip())
    print("---")
    print(plan_placement(settings).describe())
    for line in said_at_start(settings):
        print(line)
    if like is not None:
        print("---")
        print(describe(settings, "verl" if like == "verl" else "trl"))
