"""The progress of a run, and the checkpoints from which it can resume.

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
"""The run's configuration, in each checkpoint besides the model's own config.json."""
EVALUATED = "evaluation.json"
"""The results of an evaluation that was still running when its checkpoint was written."""
REMOVED = ".removed-"
"""Prefix of the name of a checkpoint that is being removed."""
FILES = "files.json"
"""Sizes of a checkpoint's files."""
FIXED = ("stages", "data", "model", "seed")
"""Groups of settings that a resumed run must share with its checkpoint, unless `--override`."""
SHAPE = ("model.tiny", "model.lora", "model.dtype")
"""Settings that may never change: the checkpoint's tensors, or the run's bookkeeping, would not
fit."""
HOW = ("model.attention", "model.packing", "model.gradient_checkpointing")
"""Settings of `FIXED` groups that may change: they select an implementation, not a model."""


def latest_checkpoint(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint that is whole, or None. tell: called with a line for each one that is
    skipped."""
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
    """The reason why a run cannot resume from a checkpoint; None if it can, as far as the sizes of
    its files tell."""
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
    if (evaluated := checkpoint / EVALUATED).is_file():
        fields |= json.loads(evaluated.read_text())
    pending = tuple((position, step) for position, step in fields.pop("pending", ()))
    warnings = tuple(fields.pop("warnings", ()))
    return Progress(pending=pending, warnings=warnings, **fields)


def add_evaluation(checkpoint: Path, progress: Progress) -> None:
    """Adds the results of an evaluation to the checkpoint of its step, written before it ended."""
    if not (checkpoint / PROGRESS).is_file():
        return
    results = {
        "evaluating": None,
        "accuracy_start": progress.accuracy_start,
        "accuracy_end": progress.accuracy_end,
    }
    new = checkpoint / f".{EVALUATED}"
    new.write_text(json.dumps(results))
    new.replace(checkpoint / EVALUATED)


def check_resumed(config: Config, checkpoint: Path, override: bool) -> list[str]:
    """A line for each setting that differs from the checkpoint's, e.g.
    `optim.lr: 1e-06, now 1e-05`. Raises `ConfigError` if one of `FIXED` does, unless `override`,
    and always if the checkpoint's tensors would not fit."""
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
    """A message for a resumed run that has no steps left to train; None if it has."""
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
    """key -> a line such as `optim.lr: 1e-06, now 1e-05`, for each key whose values differ."""

    def shown(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "unset"

    pairs = {
        key: (shown(before, key), shown(now, key)) for key in sorted(before.keys() | now.keys())
    }
    return {key: f"{key}: {was}, now {is_}" for key, (was, is_) in pairs.items() if was != is_}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            dotted |= leaves(value, f"{prefix}{key}.")
        else:
            dotted[prefix + key] = value
    return dotted


def begin_checkpoint(run_dir: Path, name: str) -> Path:
    """An empty directory for a new checkpoint, with a dot before its name until
    `finish_checkpoint`."""
    folder = run_dir / CHECKPOINTS / f".{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(
    folder: Path, progress: Progress, keep: int, config: Config | None = None, keep_best: int = 0
) -> Path:
    """Renames the directory to its final name once all its files are on the disk, so that a
    checkpoint is whole or absent; then removes all but the `keep` newest and the `keep_best` of the
    highest held-out accuracy. Returns the final path. `config` is saved with it for
    `check_resumed`."""
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
    _to_disk(final.parent)  # or a loss of power might undo the rename
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
    """Renames a checkpoint before it is removed and returns the new path: one that a crash leaves
    half removed must not look whole."""
    gone = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    return checkpoint.rename(gone)


def remove_halves(run_dir: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Removes checkpoints that a run was writing or removing when it ended. tell: called with a
    line for each that was being written, as the run resumes from the one before."""
    for half in sorted((run_dir / CHECKPOINTS).glob(".*")):
        if not half.name.startswith(REMOVED):
            tell(
                f"checkpoint {half.name.removeprefix('.')} is passed over: the run ended while it"
                " was written"
            )
        shutil.rmtree(half, ignore_errors=True)


def _accuracy(checkpoint: Path) -> float:
    """The held-out accuracy of a checkpoint; -1, below all others, if it is not known yet."""
    progress = read_progress(checkpoint)
    if progress.evaluating is not None or progress.accuracy_end is None:
        return -1.0
    return progress.accuracy_end


def _to_disk(path: Path) -> None:
    """Flushes a file, or a folder's list of names, so that it survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
