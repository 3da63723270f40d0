"""How far a run has come, and the directory that it may go on from.

<run_dir>/config.yaml  metrics.jsonl  samples.md  learning_curve.png  model/          what a person
looks at <run_dir>/checkpoints/sft-000200/{model.safetensors, config.json, ..., learner/,
progress.json}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .config.load import Config, ConfigError

CHECKPOINTS, PROGRESS, METRICS = "checkpoints", "progress.json", "metrics.jsonl"
SETTINGS = "settings.json"
"""The run's configuration, in each checkpoint; named apart from the model's own config.json beside
it."""
STOP = "stop"
"""A file that asks the run of this directory to save after its step and to end."""
FIXED = ("stages", "data", "model", "seed")
"""Groups that say what a checkpoint is of. A run that goes on with others is another run."""
SHAPE = ("model.tiny", "model.lora", "model.dtype")
"""What the tensors of a checkpoint cannot follow, and the runs' bookkeeping cannot either."""
HOW = ("model.attention", "model.packing", "model.gradient_checkpointing")
"""How a model is computed, not which; may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """All that the driver must remember; with the learner's state it determines the rest of the
    run."""

    stage: int = 0
    """Index into `stages`; equal to their number when the run is done."""
    step: int = 0
    """Steps done of this stage."""
    version: int = 0
    """Of the weights."""
    position: int = 0
    """Problems taken from the source so far."""
    pending: tuple[tuple[int, int], ...] = ()
    """Of these, the ones whose groups have not trained yet: (position, RL step of admission). A
    resumed run asks for them again, before any new ones."""
    tokens: int = 0
    """Completion tokens sampled for training."""
    train_seconds: float = 0.0
    """Wall time of the RL steps that gave these tokens."""
    seconds: float = 0.0
    """Wall time of the whole run, set-up included, over all its attempts."""
    accuracy_start: float | None = None
    accuracy_end: float | None = None
    probe_noise_logp: float | None = None
    """How far engines and learners are apart by rounding alone; None where it was not measured."""
    probe_noise_p: float | None = None
    updates: int = 0
    """Optimizer steps of the policy in RL."""
    entropy_start: float | None = None
    """Nats a token in the first RL step that trained, which `Alarms` compares with."""
    warnings: tuple[str, ...] = ()
    """What was said of a run that does not learn."""

    def advance(self, **changes: Any) -> Progress:
        return replace(self, **changes)


def open_run_dir(config: Config, resume: bool) -> tuple[Path, Path | None]:
    """The run's directory, and the checkpoint to go on from if `resume`; `ConfigError` where that
    cannot be.

    A new run never writes into an old one: without `run_dir` it takes the next free of
    `runs/<name>`, `runs/<name>-2`, ..., and a resumed run the newest of these.
    """
    if config.run_dir:
        folder = Path(config.run_dir)
        if not resume and (folder / METRICS).exists():
            raise ConfigError(
                f"run_dir={config.run_dir} already holds a run; pass --resume to go on with it, or"
                " another run_dir"
            )
    else:
        base = config.output
        taken = sorted(
            (p for p in base.parent.glob(f"{base.name}*") if _number(p, base) is not None),
            key=lambda p: _number(p, base) or 0,
        )
        if resume and not taken:
            raise ConfigError(
                f"--resume found no run named {base}; leave the flag out, or set run_dir"
            )
        number = (_number(taken[-1], base) or 0) + (not resume) if taken else 1
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
    checkpoint = latest_checkpoint(folder) if resume else None
    if resume and checkpoint is None:
        raise ConfigError(
            f"--resume found no checkpoint under {folder / CHECKPOINTS}; leave the flag out to"
            " start anew"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
        asked_to_stop(folder)  # of an attempt that ended before it looked
    except OSError as error:
        raise ConfigError(
            f"run_dir={folder} cannot be written ({error.strerror}); set run_dir to a directory"
            " that can"
        ) from error
    return folder, checkpoint


def _number(path: Path, base: Path) -> int | None:
    if path.name == base.name:
        return 1
    suffix = path.name.removeprefix(f"{base.name}-")
    return int(suffix) if suffix != path.name and suffix.isdigit() else None


def asked_to_stop(run_dir: Path) -> bool:
    """Whether somebody put the file there; takes it away."""
    try:
        (run_dir / STOP).unlink()
    except FileNotFoundError:
        return False
    return True


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = [p for p in (run_dir / CHECKPOINTS).glob("*") if (p / PROGRESS).is_file()]
    return max(found, key=lambda p: (read_progress(p).stage, read_progress(p).step), default=None)


def read_progress(checkpoint: Path) -> Progress:
    fields = json.loads((checkpoint / PROGRESS).read_text())
    pending = tuple((position, step) for position, step in fields.pop("pending", ()))
    warnings = tuple(fields.pop("warnings", ()))
    return Progress(pending=pending, warnings=warnings, **fields)


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
    before, now = _leaves(json.loads(file.read_text())), _leaves(config.model_dump(mode="json"))
    missing = object()
    counted = ("schedule.passes", "schedule.steps") if config.schedule.passes is not None else ()
    changed = {
        key: (before.get(key, missing), now.get(key, missing))
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
        and key not in ("run_dir", "name", *counted)
    }
    lines = {
        key: (
            f"{key}: {'unset' if was is missing else json.dumps(was)}, now"
            f" {'unset' if is_ is missing else json.dumps(is_)}"
        )
        for key, (was, is_) in changed.items()
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


def _under(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{key}.")
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
    folder: Path, progress: Progress, keep: int, config: Config | None = None
) -> Path:
    """Names the directory for good in one rename, so that a checkpoint is whole or absent; then
    drops the oldest. `config` is kept beside it, for `check_resumed`."""
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    if config is not None:
        (folder / SETTINGS).write_text(json.dumps(config.model_dump(mode="json"), indent=1))
    final = folder.with_name(folder.name.removeprefix("."))
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    done = sorted(
        (p for p in final.parent.glob("[!.]*") if (p / PROGRESS).is_file()),
        key=lambda p: (p / PROGRESS).stat().st_mtime,
    )
    for old in done[:-keep]:
        shutil.rmtree(old)
    return final


def trim_metrics(run_dir: Path, stage: str, step: int, stages: tuple[str, ...]) -> None:
    """Drops the rows of steps that a resumed run will do again."""
    file = run_dir / METRICS
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if (stages.index(row["stage"]), row["step"]) <= (stages.index(stage), step):
            kept.append(line)
    file.write_text("".join(f"{line}\n" for line in kept))
