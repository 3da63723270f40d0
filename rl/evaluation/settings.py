"""The arguments of the commands `eval`, `chat` and `sample` as a configuration like a run's.

Keys of a set (`samples=4`, `thinking.budgets=[64,256]`) go to every set, keys of a configuration
(`rollout.max_num_seqs=64`, `seed=1`) to the whole, `eval.sets.NAME.key` to one set.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels import platform
from ..checkpoints import CHECKPOINTS, PROGRESS, latest_checkpoint
from ..config.data import GENERATED, DataConfig, endless
from ..config.load import Config, ConfigError, load_config, resolve
from ..config.overrides import merged, tree_of
from ..config.sampling import EvalConfig, EvalSetConfig, RolloutConfig
from ..run_directory import SUMMARY
from .benchmarks import named_set

CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The model that the argument MODEL stands for."""

    path: str
    """A directory, a GGUF file or a Hub id, as in `model.path`."""
    label: str
    """A short name for folders and tables."""
    run: Config | None = None
    """The configuration of the run that it comes from: its prompts have the same form."""


def find_model(model: str, step: int | None = None) -> Named:
    """The model of a name: of a run's directory its final model, the newest checkpoint if the run
    is not done, or that of an RL `step`. Raises ConfigError if there is none."""
    folder = Path(model).expanduser()
    if (folder / SUMMARY).is_file() and (stages := _stages(folder)):
        raise ConfigError(
            f"{model} is the directory of a recipe; name one of its stages: {', '.join(stages)}"
        )
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        if step is not None:
            raise ConfigError(f"--step {step} is for the directory of a run, and {model} is none")
        label = folder.resolve().parent.name if folder.name == "model" else folder.name
        return Named(path=model, label=label.removesuffix(".gguf"))
    run = load_config(folder / CONFIG)
    weights = folder / "model" if (folder / "model" / "config.json").is_file() else None
    newest = latest_checkpoint(folder)
    if step is not None:
        names = sorted(p.name for p in (folder / CHECKPOINTS).glob("*") if (p / PROGRESS).is_file())
        chosen = [name for name in names if name.endswith(f"-{step:06}")]
        if not chosen:
            raise ConfigError(
                f"--step {step}: {model} has no such checkpoint, only {', '.join(names) or 'none'}"
            )
        # a cold start can have a checkpoint of the same step; the RL one is taken
        weights = folder / CHECKPOINTS / sorted(chosen, key=lambda name: name.startswith("sft"))[0]
    elif newest is not None and (weights is None or _older(weights, newest)):
        weights = newest
    if weights is None:
        raise ConfigError(f"{model} is the directory of a run that has saved no model yet")
    name = folder.resolve().name
    label = name if weights.name == "model" else f"{name}-{weights.name}"
    return Named(path=str(weights), label=label, run=run)


def _stages(folder: Path) -> list[str]:
    """The directories of a recipe's stages that have a model."""
    models = sorted(folder.glob("*/model/config.json"), key=lambda file: file.stat().st_mtime)
    return [str(file.parents[1]) for file in models]


def _older(model: Path, checkpoint: Path) -> bool:
    """Whether the checkpoint is of a later step than the final model, a copy of the newest
    checkpoint of its time that kept that one's modification times."""
    ours, newest = model / "config.json", checkpoint / "config.json"
    return newest.is_file() and ours.stat().st_mtime < newest.stat().st_mtime


def configure(
    model: Named, data: Sequence[str], overrides: Sequence[str], *, own_data: bool = True
) -> Config:
    """The configuration of an evaluation on these sets; without any, on a run's own held-out
    problems (`own_data`), to which keys of a set apply too. Raises ConfigError for an unknown set
    or key."""
    sets: dict[str, dict[str, Any]] = {}
    try:
        for text in data:
            name, keys = named_set(text)
            if name in sets:
                raise ValueError(f"--data {text}: there is a set {name} already; write NAME={text}")
            sets[name] = _generated_as_in(model.run, keys["source"]) | keys
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not sets and own_data and model.run is None:
        raise ConfigError(
            f"nothing to evaluate {model.label} on; name a set, e.g. --data gsm8k or --data"
            " problems.jsonl"
        )
    tree: Any = _base(model, sets)
    for override in overrides:
        top = override.partition("=")[0].partition(".")[0]
        if top in Config.model_fields:
            tree = merged(tree, tree_of(override, Config))
        elif top in EvalSetConfig.model_fields or top == "path":
            change = tree_of(override, EvalSetConfig)
            tree["eval"]["sets"] = {
                name: merged(keys, change) for name, keys in tree["eval"]["sets"].items()
            }
            if tree["eval"].get("size") != 0:
                tree = merged(tree, _of_held_out(top, change, override))
        else:
            known = [*EvalSetConfig.model_fields, *Config.model_fields]
            near = difflib.get_close_matches(top, known, n=1)
            raise ConfigError(
                f"unknown key {top} in {override!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    return resolve(tree)


def _generated_as_in(run: Config | None, source: str) -> dict[str, Any]:
    """The run's settings of generated problems, for a set of the same source: in a mixture those of
    that source, of levels those of the last, which has the held-out problems. {} if the run has no
    such source."""
    if run is None or not endless(source):
        return {}
    for _, part in run.data.parts.values():
        if part.source == source:
            return part.at_levels[-1].model_dump(mode="json", include=set(GENERATED))
    return {}


def _of_held_out(top: str, change: dict[str, Any], override: str) -> dict[str, Any]:
    """A key of a set as the key for a run's own held-out problems. Raises ConfigError if it has
    none."""
    if top in EvalConfig.model_fields:
        return {"eval": change}
    if top in RolloutConfig.model_fields:
        return {"rollout": change}
    group = "data." if top in DataConfig.model_fields else "eval.sets.NAME."
    raise ConfigError(
        f"{override!r} is for sets that --data names, and here the run's own held-out problems are"
        f" evaluated; name a set, or set {group}{override}"
    )


def _base(model: Named, sets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any]
    if model.run is not None:
        tree = model.run.model_dump(mode="json")
        tree["model"] |= {"path": model.path, "tiny": None, "lora": None}
        # an evaluation has no learners to share devices with, and no versions to receive
        tree["cluster"]["colocated"] = False
        tree["schedule"]["passes"] = None
        tree["checkpoint"]["history"] = False
        tree["sync"]["transport"] = "auto"
    else:
        tree = {
            "name": "eval",
            "model": {"path": model.path},
            "data": {"source": "arithmetic"},
            "cluster": {},
        }
        if platform.named("auto").is_cpu:
            tree["cluster"]["cpus_per_rollout"] = float(platform.local_cpus())
    if sets or model.run is None:
        tree["eval"] = {"size": 0, "sets": {name: dict(keys) for name, keys in sets.items()}}
    return tree
