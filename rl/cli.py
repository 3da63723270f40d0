"""The command `emberl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .weights.history_commands import app as patches

if TYPE_CHECKING:
    from rich.console import Console

    from .config.load import Config
    from .config.stages import Recipe
    from .run_directory import Resume

app = typer.Typer(
    help="Trains a language model to reason, with reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for the address of the job server."""
FAILED, USAGE, INTERRUPTED = 1, 2, 130


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"emberl {version('emberl')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Each command has --help with an example."""


@app.command(epilog="Example: emberl train configs/quickstart.yaml schedule.steps=50 seed=1")
def train(
    config: Annotated[Path, typer.Argument(help="The experiment, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, e.g. optim.lr=1e-4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the resolved configuration and the placement, and stop.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Go on from the run's last checkpoint; --resume auto: if there is one."),
    ] = False,
    override: Annotated[
        bool,
        typer.Option(
            help=(
                "With --resume: go on although stages, data, model or seed are not the"
                " checkpoint's."
            )
        ),
    ] = False,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help=(
                "Of a recipe: do this stage and all after it anew; what they left is removed."
                " Without it, what is done is skipped."
            ),
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: the overrides that give the defaults of `verl` or of `trl`."
        ),
    ] = None,
) -> None:
    """Runs an experiment, or the stages of a recipe that are not done; the last line of stdout is
    one JSON object with the result."""
    from .config.likeness import PEERS
    from .config.load import ConfigError
    from .config.stages import Recipe, load_experiment

    try:
        changes = list(overrides or ())
        how: Resume = "must" if resume else "never"
        if resume and "auto" in changes:  # the flag's own word, which has no key=value
            changes.remove("auto")
            how = "auto"
        settings = load_experiment(config, changes)
        recipe = isinstance(settings, Recipe)
        if like is not None and (not dry_run or like not in PEERS):
            raise ConfigError(
                f"--like {like}: give --dry-run --like {' or --dry-run --like '.join(PEERS)}"
            )
        if start is not None and not recipe:
            raise ConfigError(f"--from {start}: {config} has no named stages; leave it out")
        if dry_run:
            show_plan(settings, like)
            return
        if isinstance(settings, Recipe):
            from .stages import run_recipe

            found = run_recipe(settings, start=start, override=override)
        else:
            from .recipe import train as run_training

            found = run_training(settings, resume=how, override=override).as_json()
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        fail(
            "interrupted before anything could be saved; --resume goes on from the last checkpoint,"
            " if there is one",
            INTERRUPTED,
        )
    except Exception as error:  # the last line of a run must say why it failed, whatever failed
        import traceback

        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", FAILED)
    print(json.dumps(found), flush=True)
    if found["status"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


@app.command(
    name="eval",
    epilog="Example: emberl eval runs/quickstart samples=8 temperature=0.6 --against base.gguf",
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A run's folder, a folder of weights, a GGUF file or a Hub id."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help=(
                "Keys of every set, e.g. samples=8 temperature=0.6 thinking.budgets=[64,256], or of"
                " a configuration, e.g. rollout.engine=vllm cluster.rollouts=4."
            )
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "A ready set (gsm8k, math500, aime24, ...), files, a Hub data set, or NAME=any of"
                " these; may be repeated. Without it: what the run itself holds out."
            )
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of a run: the checkpoint of this step.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another model, or the folder of its evaluation, to compare with."),
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option(help="Of pass@k and maj@k; may be repeated. 2, 4, ..., n.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; one of the same evaluation goes on. evals/MODEL")
    ] = None,
) -> None:
    """Measures a model on sets of problems; the last line of stdout is one JSON object. Started
    again after a kill it goes on where it was."""
    from .config.load import ConfigError
    from .evaluation.command import evaluate_command

    try:
        result = evaluate_command(
            model, data or (), overrides or (), step=step, against=against, ks=k or (), out=out
        )
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", INTERRUPTED)
    except Exception as error:  # the last line must say why it failed, whatever failed
        import traceback

        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", FAILED)
    print(json.dumps(result), flush=True)


@app.command(epilog="Example: emberl chat models/smollm2-135m temperature=0.7")
def chat(
    model: Annotated[
        str, typer.Argument(help="A run's folder, a folder of weights, a GGUF file or a Hub id.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="E.g. temperature=0.7 system_prompt=... thinking.mode=fast."),
    ] = None,
) -> None:
    """Talks with a model; thoughts are shown apart. From a pipe each line is a turn."""
    from .evaluation.talk import chat_command

    _talking(
        lambda console: chat_command(
            model,
            ["temperature=0.6", "max_prompt_length=4096", "max_response_length=1024"]
            + (overrides or []),
            console,
        )
    )


@app.command(epilog="Example: emberl sample runs/quickstart --prompt '7+5-3=?' -n 4 | jq .answer")
def sample(
    model: Annotated[
        str, typer.Argument(help="A run's folder, a folder of weights, a GGUF file or a Hub id.")
    ],
    prompt: Annotated[
        list[str], typer.Option(help="What is asked; may be repeated; -: each line of stdin.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="E.g. temperature=0.7 top_p=0.9 thinking.budgets=64 template=none."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Answers to each prompt.")] = 1,
) -> None:
    """Samples answers to prompts; off a terminal each is a line of JSON."""
    from .evaluation.talk import sample_command

    settings = ["temperature=1.0", f"samples={n}", *(overrides or [])]
    _talking(lambda console: sample_command(model, prompt, settings, console, sys.stdout))


def _talking(talk: Callable[[Console], None]) -> None:
    from rich.console import Console

    from .config.load import ConfigError

    try:
        talk(Console(stderr=True, soft_wrap=True))
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


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
    from .config.load import Config
    from .config.reference import table

    try:
        print("\n".join(table(Config, within)))
    except ValueError as error:
        fail(str(error), USAGE)


@app.command(epilog="Example: emberl audit math --data graded.jsonl.gz --html report.html")
def audit(
    reward: Annotated[
        str,
        typer.Argument(
            help="A reward's name or path to a function; `sandbox` runs hostile programs."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Graded pairs or recorded completions, JSONL or JSONL.gz.")
    ] = None,
    attacks: Annotated[
        Path | None, typer.Option(help="With `sandbox`: the hostile programs, JSONL.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Where to write the disagreements for a person to read.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="Force a function's style: verl, trl, openrlhf, slime, ...")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON line.")
    ] = False,
) -> None:
    """Measures a reward against labels and a second grader, or the sandbox against programs that
    try to break out."""
    try:
        if reward == "sandbox":
            if attacks is None:
                raise ValueError(
                    "audit sandbox needs --attacks FILE, a JSONL file of hostile programs"
                )
            from ..rewards.audit.attacks import audit_sandbox

            report = audit_sandbox(attacks)
            print(json.dumps(report.record()) if as_json else "\n".join(report.lines()))
            if not report.contained:
                raise typer.Exit(FAILED)
            return
        from ..rewards.audit import audit as auditing

        found = auditing.audit(reward, data, html_path=html, style=style)
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    print(json.dumps(found.figures) if as_json else auditing.to_text(found))


@app.command(epilog="Example: emberl doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False) -> None:
    """Examines this machine: versions, sandbox, shared memory, open files; each line with its
    fix."""
    from .watch.doctor import Level, examine, worst

    checks = examine()
    status = worst(checks)
    if as_json:
        print(json.dumps({"status": status.value, "checks": [str(check) for check in checks]}))
    else:
        print(*checks, sep="\n")
    if status is Level.ERROR:
        raise typer.Exit(FAILED)


app.add_typer(patches, name="patches")


@app.command(
    epilog="Example: emberl plan --device 910B --devices 1024 link.bandwidth=3 link.mode=dense"
)
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as key=value, e.g. link.bandwidth=3; --keys lists them."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="910B, 910C or H200; default 910B.")] = None,
    devices: Annotated[int | None, typer.Option(help="How many; default 1024.")] = None,
    learners: Annotated[
        int | None, typer.Option(help="Of these, how many learn; default: the best split.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="0.6m, 7b, 32b or 72b; default 32b.")] = None,
    from_run: Annotated[
        Path | None,
        typer.Option(
            help="A run's folder: plan with what it measured; settings are then a run's own keys."
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help=(
                "Runs like it with other batch sizes: they tell the learners' fixed time from the"
                " tokens'."
            )
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Answer lengths: a run's folder or a Parquet file.")
    ] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print all settings with their defaults and sources.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Simulates the schedule: step time, idle devices, staleness and exposed sync, and the best
    split of the devices."""
    from rich.console import Console

    from .plan import command as planning

    try:
        if keys:
            print(planning.describe_keys())
            return
        options = {"device": device, "devices": devices, "learners": learners, "model": model}
        found = planning.plan(
            overrides or (), options=options, from_run=from_run, trace=trace, also=also or ()
        )
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    if as_json:
        print(json.dumps(found.record()))
    else:
        planning.show(found, Console())


@app.command(epilog="Example: emberl data train.parquet layout=dapo -m Qwen/Qwen3-0.6B")
def data(
    source: Annotated[
        str,
        typer.Argument(
            help="Files, a folder, a Hub data set, or a configuration (.yaml) whose data is meant."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys of data, e.g. layout=gsm8k, or others, e.g. reward.parts.answer.use=code."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="Whose tokenizer and template; default: the configuration's."
        ),
    ] = None,
) -> None:
    """Shows a data set as a run would see it: three rows as prompts, what the reward says of their
    own references, lengths."""
    from .data_command import show_data

    try:
        for line in show_data(source, overrides or (), model):
            print(line)
    except ValueError as error:
        fail(str(error), USAGE)


def show_plan(settings: Config | Recipe, like: str | None = None) -> None:
    """What `--dry-run` prints, of a recipe for each stage: the configuration, the placement, what a
    file changes of its preset, doubtful settings, and what the first rows of the data show."""
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
    """A run's configuration and placement, and what is said of them."""
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


def fail(message: str, status: int) -> Any:
    """One line for a person on stderr, one JSON line on stdout, and a status that is not zero."""
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    print(json.dumps({"status": "error", "error": line}), flush=True)
    raise typer.Exit(status)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
