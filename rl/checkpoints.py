"""How far a run has come, and the checkpoints that it may go on from.

<run_dir>/checkpoints/sft-000200/{model.safetensors, config.json, ..., learner/, progress.json}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config.earlier import brought_up
from .config.load import Config, ConfigError, resolve, shown_tree
from .groups import Progress

CHECKPOINTS, PROGRESS = "checkpoints", "progress.json"
SETTINGS = "settings.json"
"""The run's configuration, in each checkpoint; named apart from the model's own config.json beside
it."""
EVALUATED = "evaluation.json"
"""The results of an evaluation that was under way when its checkpoint was written."""
REMOVED = ".removed-"
"""How the name begins of a checkpoint that is being removed."""
FILES = "files.json"
"""Sizes of a checkpoint's files."""
FIXED = ("stages", "data", "model", "seed")
"""Groups that say what a checkpoint is of. A run that goes on with others is another run."""
SHAPE = ("model.tiny", "model.lora", "model.dtype")
"""Settings that neither a checkpoint's tensors nor the run's bookkeeping can follow."""
HOW = ("model.attention", "model.packing", "model.gradient_checkpointing")
"""How a model is computed, not which; may change."""


def latest_checkpoint(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint that is whole. tell: which ones are passed over, and why."""
    order: dict[Path, tuple[int, int]] = {}
    for folder in sorted((run_dir / CHECKPOINTS).glob("[!.]*")):
        reason = broken(folder)
        if reason is None:
            progress = read_progress(folder)
            order[folder] = (progress.stage, progress.step)
        elif (folder / PROGRESS).exists():
            tell(f"checkpoint {folder.name} is passed over: {reason}")
    return max(order, key=lambda folder: order[folder], default=None)


def broken(checkpoint: Path) -> str | None:
    """Why it cannot be gone on from; None where it can, as far as the sizes of its files tell."""
    try:
        read_progress(checkpoint)
        files = checkpoint / FILES
        sizes = json.loads(files.read_text()) if files.is_file() else {}
        for name, size in sizes.items():
            here = (checkpoint / name).stat().st_size
            if here != size:
                return f"{name} has {here} bytes of {size}"
    except (OSError, ValueError, TypeError) as error:  # whatever a crash or a person left there
        return " ".join(str(error).split())
    return None


def read_progress(checkpoint: Path) -> Progress:
    fields = json.loads((checkpoint / PROGRESS).read_text())
    if (found := checkpoint / EVALUATED).is_file():
        fields |= json.loads(found.read_text())
    pending = tuple((position, step) for position, step in fields.pop("pending", ()))
    warnings = tuple(fields.pop("warnings", ()))
    return Progress(pending=pending, warnings=warnings, **fields)


def add_evaluation(checkpoint: Path, progress: Progress) -> None:
    """The results of the evaluation of this checkpoint's step, which it was written before."""
    if not (checkpoint / PROGRESS).is_file():
        return
    found = {
        "evaluating": None,
        "accuracy_start": progress.accuracy_start,
        "accuracy_end": progress.accuracy_end,
    }
    new = checkpoint / f".{EVALUATED}"
    new.write_text(json.dumps(found))
    new.replace(checkpoint / EVALUATED)


def check_resumed(config: Config, checkpoint: Path, override: bool) -> list[str]:
    """A line for each setting that is not the checkpoint's, e.g. `optim.lr: 1e-06, now 1e-05`.
    `ConfigError` where the run would be another one, unless `override`, and always where the
    checkpoint's tensors would not fit."""
    file = checkpoint / SETTINGS
    if not file.is_file():
        return [
            f"{checkpoint.name} holds no {SETTINGS} (an older emberl wrote it): nothing can be"
            " compared with it"
        ]
    tree, _ = brought_up(json.loads(file.read_text()))
    before, now = leaves(tree), leaves(shown_tree(config))
    counted = {  # worked out once the rows are known
        "schedule.passes": config.schedule.passes is not None,
        "schedule.steps": config.schedule.passes is not None,
        "sft.steps": config.sft.epochs is not None,
    }
    plain = {"name": config.name, "model": {"path": "any"}, "data": {"source": "arithmetic"}}
    defaults = leaves(resolve({**plain, "algorithm": config.algorithm}).model_dump(mode="json"))
    lines = {
        key: line
        for key, line in differences(before, now).items()
        if key not in ("run_dir", "name")
        and not counted.get(key)
        # a key that the emberl which wrote it did not know yet
        and not (key not in before and now[key] == defaults.get(key))
    }
    broken = [line for key, line in lines.items() if _under(key, SHAPE)]
    if broken:
        raise ConfigError(
            f"--resume: the model of {checkpoint.name} is another ({'; '.join(broken)}); give its"
            " settings, or start a new run without --resume"
        )
    other = [line for key, line in lines.items() if _under(key, FIXED) and not _under(key, HOW)]
    if other and not override:
        raise ConfigError(
            f"--resume: {checkpoint.name} is of another run ({'; '.join(other)}); give its"
            " settings, add --override to go on all the same, or start a new run without --resume"
        )
    return list(lines.values())


def nothing_left(config: Config, progress: Progress) -> str | None:
    """What a person is told who goes on with a run that has done what it was to do."""
    steps = config.schedule.steps
    last = config.stages[progress.stage : progress.stage + 2] == ("rl",)
    counted = config.schedule.passes is not None  # worked out once the rows are known
    if not last or counted or progress.step < steps or progress.evaluating is not None:
        return None
    return (
        f"rl step {progress.step} of schedule.steps={steps} is done: nothing is left to train; a"
        " larger schedule.steps goes on"
    )


def _under(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """`optim.lr: 1e-06, now 1e-05` for each key whose values differ."""

    def shown(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "unset"

    pairs = {
        key: (shown(before, key), shown(now, key)) for key in sorted(before.keys() | now.keys())
    }
    return {key: f"{key}: {was}, now {is_}" for key, (was, is_) in pairs.items() if was != is_}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def begin_checkpoint(run_dir: Path, name: str) -> Path:
    """An empty directory to save into; `finish_checkpoint` makes it count."""
    folder = run_dir / CHECKPOINTS / f".{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(
    folder: Path, progress: Progress, keep: int, config: Config | None = None, keep_best: int = 0
) -> Path:
    """Names the directory for good in one rename, when everything in it is on the disk, so that a
    checkpoint is whole or absent; then drops all but the `keep` newest and the `keep_best` of the
    highest held-out accuracy. `config` is kept beside it, for `check_resumed`."""
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    if config is not None:
        (folder / SETTINGS).write_text(json.dumps(shown_tree(config), indent=1))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / FILES).write_text(json.dumps(sizes, indent=1))
    for path in [*files, folder / FILES, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _to_disk(path)
    final = folder.with_name(folder.name.removeprefix("."))
    earlier = _out_of_sight(final) if final.exists() else None
    folder.rename(final)
    if earlier is not None:
        shutil.rmtree(earlier, ignore_errors=True)
    _to_disk(final.parent)
    done = sorted(
        (p for p in final.parent.glob("[!.]*") if broken(p) is None),
        key=lambda p: (p / PROGRESS).stat().st_mtime,
    )
    best = sorted(done, key=_accuracy, reverse=True)
    for old in done[:-keep]:
        if old not in best[:keep_best]:
            shutil.rmtree(_out_of_sight(old))
    return final


def _out_of_sight(checkpoint: Path) -> Path:
    """Its name from now on: one that a crash leaves half removed is not to look like a whole."""
    gone = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    return checkpoint.rename(gone)


def remove_halves(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """What a run left of checkpoints that it was writing or removing when it ended. tell: of the
    first kind, since the run goes on from the one before."""
    for half in sorted((run_dir / CHECKPOINTS).glob(".*")):
        if not half.name.startswith(REMOVED):
            tell(
                f"checkpoint {half.name.removeprefix('.')} is passed over: the run ended while it"
                " was written"
            )
        shutil.rmtree(half, ignore_errors=True)


def _accuracy(checkpoint: Path) -> float:
    """Below all where it is not known yet."""
    progress = read_progress(checkpoint)
    if progress.evaluating is not None or progress.accuracy_end is None:
        return -1.0
    return progress.accuracy_end


def _to_disk(path: Path) -> None:
    """Has a file or a folder's list of names survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
