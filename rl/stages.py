"""Runs a recipe: each stage as a run in a directory of its own, finished ones skipped, with a table
of each stage's gain.

<run_dir>/<stage>/{config.yaml, metrics.jsonl, model/ or samples.jsonl, ...}   as a single run's
<run_dir>/<stage>/done.json     proof of completion: settings, inputs and their hash
<run_dir>/summary.md, summary.json   results of the finished stages
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from .checkpoints import differences, latest_checkpoint, leaves
from .config.distill import DistillConfig
from .config.load import Config, ConfigError, SFTConfig, resolve
from .config.masking import masked
from .config.stages import REFERENCE, Recipe, Stage
from .contents import code_files, contents
from .model_files import check_files
from .preflight import check_inputs
from .recipe import Result, train
from .reject import totals
from .run_directory import METRICS, SUMMARY, alone_in, read_metrics
from .watch.console import make_console, say

DONE = "done.json"
FREE = ("name", "run_dir", "tracking", "cluster", "checkpoint", "sync")
"""Groups of settings that do not affect a stage's output: a finished stage stays valid if they
change."""
LENGTH = re.compile(r"val-aux/([^@]+/)?response_length/mean")
"""Metrics of the length of answers without a thinking budget."""
COLUMNS = ("stage", "kind", "before", "after", "tokens", "steps", "minutes", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the summary."""

    stage: str
    kind: str
    before: float | None = None
    """Held-out accuracy of the model that the stage started from."""
    accuracy: float | None = None
    """Held-out accuracy after the stage."""
    length: float | None = None
    """Mean number of tokens of a held-out answer."""
    steps: int = 0
    seconds: float = 0.0
    note: str = ""


def run_recipe(
    recipe: Recipe,
    *,
    start: str | None = None,
    override: bool = False,
    run: Callable[..., Result] = train,
) -> dict[str, Any]:
    """Runs the stages that are not done; returns the summary. start: run this one and all after it,
    done or not. override: a stage that was stopped may go on with other data or another model.
    Raises `ConfigError`, before anything is loaded if the fault can be known by then."""
    names = [stage.name for stage in recipe.stages]
    if start is not None and start not in names:
        raise ConfigError(f"--from {start}: there is no such stage; there are {', '.join(names)}")
    anew = names[names.index(start) :] if start is not None else []
    tell = partial(say, make_console())
    for line in check_recipe(recipe):
        tell(line)
    done = finished(recipe, anew)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(recipe.folder):
        for name in anew:
            shutil.rmtree(recipe.folder / name, ignore_errors=True)
        summary = run_stages(recipe, done, tell, partial(run, resume="auto", override=override))
    tell((recipe.folder / "summary.md").read_text())
    return summary


def run_stages(
    recipe: Recipe,
    done: dict[str, dict[str, Any]],
    tell: Callable[[str], None],
    run: Callable[[Config], Result],
) -> dict[str, Any]:
    """Runs the stages that are not in `done`, and adds them to it; returns the summary."""
    began = time.time()
    summary = write_summary(recipe, done, "ok", began)
    for stage in recipe.stages:
        if stage.name in done:
            tell(f"stage {stage.name} ({stage.kind}) is done")
            continue
        tell(f"stage {stage.name} ({stage.kind})")
        proof = proof_of(recipe, stage, done)
        try:
            result = run(stage.config)
        except ConfigError as error:
            begun = latest_checkpoint(stage.config.output) is not None
            fix = f" (--from {stage.name} does the stage anew)" if begun else ""
            raise ConfigError(f"stage {stage.name}: {error}{fix}") from error
        if result.status == "ok":
            done[stage.name] = finish_stage(stage, proof, row_of(stage, result))
        summary = write_summary(recipe, done, result.status, began)
        if result.status != "ok":
            break
    return summary


def write_summary(
    recipe: Recipe, done: Mapping[str, Mapping[str, Any]], status: str, began: float
) -> dict[str, Any]:
    """Writes the table and the results so far; returns the latter."""
    rows = [Row(**done[stage.name]["row"]) for stage in recipe.stages if stage.name in done]
    known = [row for row in rows if row.accuracy is not None]
    summary = {
        "status": status,
        "accuracy_start": known[0].before if known else None,
        "accuracy_end": known[-1].accuracy if known else None,
        "stages": [asdict(row) for row in rows],
        "seconds": round(time.time() - began, 1),
        "run_dir": str(recipe.folder),
    }
    (recipe.folder / "summary.md").write_text(f"# {recipe.name}\n\n{table(rows)}")
    (recipe.folder / SUMMARY).write_text(json.dumps(summary, indent=1))
    return summary


def check_recipe(recipe: Recipe) -> list[str]:
    """Checks files, data and rewards of all stages; returns remarks for a person, each once. Raises
    ConfigError, which names the stage."""
    said: dict[str, None] = {}
    made = {str(stage.output) for stage in recipe.stages}
    for stage in recipe.stages:
        config = stage.config
        # the output of an earlier stage is checked when it exists
        if config.sft.data is not None and made & {*config.sft.data.sources}:
            config = config.model_copy(update={"sft": SFTConfig()})
        if made & {teacher.path for teacher in config.distill.teachers.values()}:
            config = config.model_copy(update={"distill": DistillConfig()})
        try:
            if config.model.path not in made:
                check_files(config)
            said |= dict.fromkeys(check_inputs(config))
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from error
    return list(said)


def finished(recipe: Recipe, anew: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name -> `done.json` of the finished stages except those of `anew`. Raises `ConfigError` if
    one was done with other settings or inputs, if its output is gone, or if one before those of
    `anew` is not done."""
    done: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages:
        file, redo = stage.config.output / DONE, f"redo it with --from {stage.name}"
        if stage.name in anew:
            continue
        if not file.is_file():
            if anew:
                raise ConfigError(
                    f"--from {anew[0]}: stage {stage.name} before it is not done; take --from"
                    f" {stage.name}, or leave it out"
                )
            continue
        said = json.loads(file.read_text())
        if not stage.output.exists():
            raise ConfigError(f"stage {stage.name} is done, but {stage.output} is gone; {redo}")
        proof = proof_of(recipe, stage, done)
        if changed := changes(said, proof, stage.config):
            raise ConfigError(
                f"stage {stage.name} is done, with other settings or inputs:"
                f" {'; '.join(changed[:5])}; {redo}, which redoes what follows too, give them back,"
                " or take another run_dir"
            )
        done[stage.name] = said
    return done


def changes(said: Mapping[str, Any], proof: Mapping[str, Any], config: Config) -> list[str]:
    """A line for each setting and input of a finished stage that is different now. A key that is
    newer than its record counts only if it is not at its default."""
    if said["hash"] == proof["hash"]:
        return []
    plain = {"name": config.name, "model": {"path": "any"}, "data": {"source": "arithmetic"}}
    defaults = leaves(resolve({**plain, "algorithm": config.algorithm}).model_dump(mode="json"))
    settings = {
        key: line
        for key, line in differences(said["settings"], proof["settings"]).items()
        if key in said["settings"] or proof["settings"][key] != defaults.get(key)
    }
    return [*settings.values(), *differences(said["inputs"], proof["inputs"]).values()]


def proof_of(recipe: Recipe, stage: Stage, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of a stage's output: dotted settings, inputs, and the hash of both."""
    text = json.dumps(masked(stage.config.model_dump(mode="json", exclude=set(FREE))))
    for each in recipe.stages:  # by names, so that a recipe's directory may be moved
        text = text.replace(json.dumps(str(each.output)), json.dumps(REFERENCE + each.name))
    inputs = {"settings": leaves(json.loads(text)), "inputs": inputs_of(stage, done)}
    return {"hash": sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(), **inputs}


def inputs_of(stage: Stage, done: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """name -> identity of a stage's inputs: the id of each earlier stage that it uses, and hashes
    of local files (models, data and a user's own functions)."""
    config = stage.config
    inputs = {
        REFERENCE + name: str(done[name]["id"]) if name in done else "not done"
        for name in stage.takes
    }
    read = [part for _, part in config.data.parts.values()]
    read += [config.sft.data] if config.sft.data is not None else []
    named = [
        config.model.path or (),
        *(teacher.path for teacher in config.distill.teachers.values()),
        *(n for data in read for n in (data.source, data.eval_path or ())),
        code_files(config.model_dump(mode="json")),
    ]
    paths = [p for each in named for p in ([each] if isinstance(each, str) else each) if p]
    return inputs | contents(p for p in paths if config.output.parent not in Path(p).parents)


def finish_stage(stage: Stage, proof: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Writes a stage's `done.json` atomically; returns its contents."""
    said = {**proof, "id": uuid.uuid4().hex, "row": asdict(row)}
    file = stage.config.output / DONE
    file.with_suffix(".part").write_text(json.dumps(said, indent=1))
    file.with_suffix(".part").replace(file)
    return said


def row_of(stage: Stage, result: Result) -> Row:
    """A finished stage's line in the summary, from its own metrics."""
    folder = stage.config.output
    logged = read_metrics(folder / METRICS)
    steps = max((each["step"] for each in logged if each["axis"] == "train"), default=0)
    row = Row(stage=stage.name, kind=stage.kind, steps=steps, seconds=result.seconds)
    if stage.config.stages == ("reject",):
        counts = totals(folder)
        correct, answers, kept = counts["correct"], counts["answers"], counts["rows"]
        share = f"{correct / answers:.1%}"
        note = f"{correct:,} of {answers:,} answers accepted ({share}), {kept:,} kept"
        return replace(row, note=note)
    looked = [each for each in logged if "val-core/accuracy" in each]
    if not looked:
        return row
    before = looked[0]["val-core/accuracy"] if looked[0]["step"] == 0 else None
    lengths = [v for k, v in looked[-1].items() if LENGTH.fullmatch(k)]
    return replace(
        row,
        before=before,
        accuracy=looked[-1]["val-core/accuracy"],
        length=sum(lengths) / len(lengths),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, padded to its widest cells."""
    cells: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        accuracies = ["" if x is None else f"{x:.1%}" for x in (row.before, row.accuracy)]
        length = "" if row.length is None else f"{row.length:.0f}"
        minutes = f"{row.seconds / 60:.1f}"
        cells.append((row.stage, row.kind, *accuracies, length, str(row.steps), minutes, row.note))
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    cells.insert(1, tuple("-" * width for width in widths))
    lines = [
        " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) for line in cells
    ]
    return "".join(f"| {line} |\n" for line in lines)
