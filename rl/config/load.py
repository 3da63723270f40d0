"""The typed configuration: one YAML file is one experiment. Importing this loads no torch.

A file is merged over the preset that its `algorithm` names, `key=value` overrides over the file,
and the result is validated into frozen models; an unknown key is an error that names the nearest
one. `configs/README.md` says what each file is for; `emberl train CONFIG --dry-run` prints the
whole resolved configuration.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError, model_validator
from yaml import YAMLError

from .algorithm import LOSSES, check_algorithm
from .base import Settings
from .cautions import refuse_what_cannot_train
from .data import endless
from .earlier import brought_up
from .experiment import Experiment
from .key_reference import entries
from .masking import masked, remember, watch_environment
from .mistakes import explain
from .overrides import OverrideError, merged, tree_of, without_null_entries
from .presets import preset
from .reward import RewardConfig, RewardPart
from .sampling import EvalConfig, RolloutConfig
from .settings import (
    CheckpointConfig,
    ClusterConfig,
    CriticConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SyncConfig,
    TrackingConfig,
)
from .supervised import RejectConfig, SFTConfig


class ConfigError(ValueError):
    """A mistake that a user must correct, in one line that names the key, the value and the fix."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError into a ConfigError, which the CLI prints without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Config(Experiment):
    """One experiment whose settings fit together."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        check_algorithm(self.advantage, self.kl, self.filter)
        self._check_distilled()
        refuse_what_cannot_train(self)
        self._check_colocated()
        self._check_collective()
        if self.schedule.oversample > 1 and self.schedule.max_staleness:
            raise ValueError(
                f"schedule.oversample={self.schedule.oversample:g} is for max_staleness=0: with"
                f" schedule.max_staleness={self.schedule.max_staleness} long answers go on anyway;"
                " set one of them"
            )
        return self

    @model_validator(mode="after")
    def _finite(self) -> Config:
        without_end = [p.source for _, p in self.data.parts.values() if endless(p.source)]
        if self.schedule.passes is not None and without_end:
            raise ValueError(
                f"schedule.passes={self.schedule.passes:g} counts passes over a data set, but "
                f"data.source={without_end[0]} makes problems without end; set schedule.steps"
            )
        if self.sft.epochs is not None and self.sft.data is None and endless(self.data.source):
            raise ValueError(
                f"sft.epochs={self.sft.epochs:g} counts passes over a data set, but"
                f" data.source={self.data.source} makes problems without end; set sft.steps"
            )
        if "reject" in self.stages and self.reject.problems is None and endless(self.data.source):
            raise ValueError(
                f"data.source={self.data.source} makes problems without end; set reject.problems"
            )
        return self

    def _check_distilled(self) -> None:
        if self.distill.active and self.filter.zero_variance:
            raise ValueError(
                "filter.zero_variance=true drops groups of equal scores, which teachers have"
                " something to say about; set filter.zero_variance=false, or algorithm=opd"
            )
        if self.distill.active and (self.advantage.needs_critic or self.loss.kind not in LOSSES):
            which = (
                "advantage.kind=gae"
                if self.advantage.needs_critic
                else f"loss.kind={self.loss.kind}"
            )
            raise ValueError(f"distill.teachers and {which} do not go together; leave one out")
        paths = {teacher.path.rstrip("/") for teacher in self.distill.teachers.values()}
        if paths == {(self.model.path or "").rstrip("/")} and not self.distill.reward_coef:
            raise ValueError(
                f"distill.teachers: {self.model.path} is the student's own model, which has nothing"
                " to learn from itself; name another, or set distill.reward_coef"
            )

    def _check_colocated(self) -> None:
        if not self.cluster.colocated:
            return
        wanted = {
            "rollout.engine=vllm": self.rollout.engine == "vllm" and not self.rollout.servers,
            "schedule.max_staleness=0": self.schedule.max_staleness == 0,
            f"cluster.rollouts={self.cluster.learners} (as learners)": (
                self.cluster.rollouts == self.cluster.learners
            ),
            "rollout.engine_args.tensor_parallel_size=1": self.rollout.cards == 1,
            "no rollout.engine_args.weight_transfer_config (a card cannot send to itself)": (
                "weight_transfer_config" not in self.rollout.engine_args
            ),
        }
        for what, met in wanted.items():
            if not met:
                raise ValueError(
                    "cluster.colocated shares each device between one learner and one engine; it"
                    f" needs {what}"
                )

    def _check_collective(self) -> None:
        if self.sync.transport != "collective":
            return
        wanted = {
            "rollout.engine=vllm": self.rollout.engine == "vllm",
            "rollout.engine_args.weight_transfer_config": (
                "weight_transfer_config" in self.rollout.engine_args
            ),
            "sync.mode=dense or auto": self.sync.mode != "patch",
        }
        for what, met in wanted.items():
            if not met:
                raise ValueError(
                    "sync.transport=collective sends whole weights into vLLM's own processes; it"
                    f" needs {what}, or set sync.transport=object_store"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of one YAML file with `key=value` overrides; raises
    `ConfigError`."""
    tree = read_tree(path, overrides)
    stages = tree.get("stages")
    if isinstance(stages, list) and any(isinstance(stage, dict) for stage in stages):
        raise ConfigError(
            f"{path} is a recipe of {len(stages)} stages, and here one run is wanted; emberl train"
            " runs recipes, and a stage's own settings are in its directory's config.yaml"
        )
    return resolve(tree)


def read_tree(
    path: str | Path,
    overrides: Sequence[str] = (),
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    read: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda text, _: tree_of(
        text, Config
    ),
) -> dict[str, Any]:
    """The file with its overrides, interpolations resolved, nothing validated; raises
    `ConfigError`. prepare: is given what the file holds. read: makes a tree of an override, for the
    tree so far."""
    file = Path(path)
    if not file.is_file():
        fault = "is no file" if file.exists() else "does not exist"
        raise ConfigError(f"configuration file {str(path)!r} {fault}{_nearby(file)}")
    try:
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(
                f"{path}: the file must be a mapping of groups such as model, data, rollout"
            )
        held: Any = OmegaConf.to_container(loaded)
        held, earlier = brought_up(held)
        for line in earlier:
            print(f"{path}: {line}", file=sys.stderr)
        tree = prepare(held)
        for override in overrides:
            tree = merged(tree, read(override, tree))
        # before anything is resolved: secrets are known by the values that go through its resolver
        watch_environment()
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        remember(tree, resolved)
    except ConfigError:
        raise
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OverrideError as error:
        raise ConfigError(str(error)) from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        said = str(error).split("\n", 1)[0]
        hint = (
            "; in a text write \\${ for a dollar sign and a brace"
            if "$" in said or "nterpolation" in said
            else ""
        )
        raise ConfigError(f"{path}: {key}{said}{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def resolve(tree: Mapping[str, Any]) -> Config:
    """Merges a plain tree over the preset it names and validates it; raises `ConfigError`."""
    named = tree.get("algorithm", "grpo")
    try:
        # validation refuses a name that is not text
        base = preset(named) if isinstance(named, str) else {}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return Config.model_validate(without_null_entries(merged(base, tree), [Config]))
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error


def with_steps(config: Config, problems: int | None) -> tuple[Config, str | None]:
    """The configuration with `schedule.passes` turned into `schedule.steps`, and a line that says
    how many passes over the data its steps make (None without RL or for endless data).

    problems: how many the data set has; None: it is endless.
    """
    schedule = config.schedule
    if problems is None or "rl" not in config.stages:
        return config, None
    if schedule.passes is not None:
        # 1.1 passes of 100 problems by 10 are 11.000000000000002 steps, which must not become 12
        steps = math.ceil(schedule.passes * problems / schedule.prompts_per_step - 1e-9)
        changed = schedule.model_copy(update={"passes": None, "steps": steps})
        # validated once more: some checks need the number of steps
        config = resolve(config.model_copy(update={"schedule": changed}).model_dump())
    least = "at least " if config.filter.dynamic_sampling or schedule.oversample > 1 else ""
    asked = config.schedule.steps * schedule.prompts_per_step
    return (
        config,
        (
            f"schedule.steps={config.schedule.steps} of {schedule.prompts_per_step} prompts are"
            f" {least}{asked / problems:.3g} passes over {problems:,} problems"
        ),
    )


def to_yaml(config: Config) -> str:
    """The full configuration as YAML, without secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(shown_tree(config)))


def shown_tree(config: Config) -> dict[str, Any]:
    """All settings, safe to write anywhere: secrets are masked, and values from the environment
    are shown as the interpolations that they were."""
    tree: dict[str, Any] = masked(config.model_dump(mode="json"))
    return tree


def keys() -> list[str]:
    """Every key that a file may set, dotted."""
    return [entry.key for entry in entries(Config)]


def _nearby(file: Path) -> str:
    folder = file.parent
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    near = difflib.get_close_matches(file.name, names, n=1) or names[:5]
    return f"; {folder} has {', '.join(near)}" if near else ""


__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RejectConfig",
    "RewardPart",
    "RolloutConfig",
    "SFTConfig",
    "ScheduleConfig",
    "Settings",
    "SyncConfig",
    "TrackingConfig",
    "keys",
    "load_config",
    "read_tree",
    "resolve",
    "shown_tree",
    "to_yaml",
    "user_errors",
]
