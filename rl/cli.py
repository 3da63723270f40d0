"""The command `emberl`."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .evaluation.commands import app as evaluation
from .exits import FAILED, USAGE, fail, say
from .job_commands import app as jobs
from .train_commands import app as training
from .watch.bench_command import app as bench
from .watch_commands import app as watching
from .weights.history_commands import app as patches

app = typer.Typer(
    help="Trains a language model to reason, with reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `start` leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)


app.registered_commands += training.registered_commands  # the first that --help shows


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

        audited = auditing.audit(reward, data, html_path=html, style=style)
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    print(json.dumps(audited.figures) if as_json else auditing.to_text(audited))


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
    from .watch.console import make_console

    try:
        if keys:
            print(planning.describe_keys())
            return
        options = {"device": device, "devices": devices, "learners": learners, "model": model}
        planned = planning.plan(
            overrides or (), options, from_run, trace, also or (), console=make_console()
        )
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    if as_json:
        print(json.dumps(planned.record()))
    else:
        planning.show(planned, Console())


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


app.add_typer(evaluation)
app.add_typer(jobs)
app.add_typer(watching)
app.add_typer(patches, name="patches")
app.add_typer(bench, name="bench")


_DASHED = re.compile(r"--(\w+(?:\.\w+)+)(=.*)?", re.DOTALL)


def main() -> None:
    dashed = next((match for word in sys.argv[1:] if (match := _DASHED.fullmatch(word))), None)
    if dashed is not None:  # click would only say that there is no such option
        say(f"{dashed[0]}: overrides have no dashes; write {dashed[1]}{dashed[2] or '=VALUE'}")
        raise SystemExit(USAGE)
    app()


if __name__ == "__main__":
    main()
