"""The commands `emberl eval`, `emberl chat` and `emberl sample`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..exits import INTERRUPTED, USAGE, fail, telling_why

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()


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
    from ..local_ray import before_import

    # the imports below load Ray, which reads its environment only then
    before_import(None)
    with telling_why("interrupted; the same command goes on"):
        from .command import evaluate_command

        result = evaluate_command(
            model, data or (), overrides or (), step=step, against=against, ks=k or (), out=out
        )
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
    from .talk import chat_command

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
    from .talk import sample_command

    settings = ["temperature=1.0", f"samples={n}", *(overrides or [])]
    _talking(lambda console: sample_command(model, prompt, settings, console, sys.stdout))


def _talking(talk: Callable[[Console], None]) -> None:
    from rich.console import Console

    from ..config.load import ConfigError

    try:
        talk(Console(stderr=True, soft_wrap=True))
    except ConfigError as error:
        fail(str(error), USAGE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
