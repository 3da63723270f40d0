"""The typed configuration: one YAML file is one experiment. Importing this loads no torch.

A file is merged over the preset that its `algorithm` names, `key=value` overrides over the file,
and the result is validated into frozen models; an unknown key is an error that names the nearest
one. `configs/README.md` says what each file is for; `emberl train CONFIG --dry-run` prints the
whole resolved configuration.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from .algorithm import (
    AdvantageConfig,
    FilterConfig,
    KLConfig,
    LossConfig,
    OffPolicyConfig,
    check_algorithm,
)
from .base import Settings
from .cautions import refuse_what_cannot_train
from .data import DataConfig, endless
from .mistakes import explain
from .overrides import OverrideError, merged, tree_of
from .presets import preset
from .reference import entries
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
    SFTConfig,
    SyncConfig,
    TrackingConfig,
)


class ConfigError(ValueError):
    """What a user must change, in one line that names the key, the value and the fix."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError into a ConfigError, which the CLI prints without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Config(Settings):
    """One experiment."""

    name: str = Field(min_length=1, max_length=200, pattern="^[^/]*$")
    """Names the run's directory, and the run in W&B."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Fixes every draw: the data's order, sampled tokens, the weights of what is made here."""
    run_dir: str = ""
    """Where everything is written; empty: `runs/<name>`."""
    stages: tuple[Literal["sft", "rl"], ...] = ("rl",)
    """What is done, in this order: a cold start on worked solutions (`sft`), reinforcement learning
    (`rl`)."""
    algorithm: str = "grpo"
    """A preset for `advantage`, `loss`, `kl`, `offpolicy`, `filter`, `critic` and `schedule`; what
    those groups set themselves wins, and is said at the start (`cautions.changes`)."""
    model: ModelConfig
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    kl: KLConfig = KLConfig()
    offpolicy: OffPolicyConfig = OffPolicyConfig()
    filter: FilterConfig = FilterConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sync: SyncConfig = SyncConfig()
    optim: OptimConfig = OptimConfig()
    critic: CriticConfig = CriticConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        check_algorithm(self.advantage, self.kl, self.filter)
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
        if self.schedule.passes is not None and endless(self.data.source):
            raise ValueError(
                f"schedule.passes={self.schedule.passes:g} counts passes over a data set, but "
                f"data.source={self.data.source} makes problems without end; set schedule.steps"
            )
        return self

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

    @property
    def output(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def updates(self) -> int:
        """Optimizer steps of the RL stage, if every part of every step has a signal."""
        return self.schedule.steps * self.schedule.minibatches * self.schedule.epochs

    @property
    def sft_optim(self) -> OptimConfig:
        """The optimizer of the supervised stage."""
        sft = self.sft
        changes = {"lr": sft.lr, "warmup_steps": sft.warmup_steps, "schedule": sft.schedule}
        return self.optim.model_copy(update=changes)

    @property
    def max_model_length(self) -> int:
        """Tokens of the longest prompt and the longest answer together, in training or
        evaluation."""
        longest = self.rollout.max_response_length
        sets = [each.beside(self.data) for each in self.eval.sets.values()]
        return max(
            self.data.max_prompt_length + longest,
            *(s.max_prompt_length + (s.max_response_length or longest) for s in sets),
            0,
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of one YAML file with `key=value` overrides; raises
    `ConfigError`."""
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
        tree = OmegaConf.to_container(loaded)
        for override in overrides:
            tree = merged(tree, tree_of(override, Config))
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
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
    assert isinstance(tree, dict)
    return resolve({str(key): value for key, value in tree.items()})


def resolve(tree: Mapping[str, Any]) -> Config:
    """Merges a plain tree over the preset it names and validates it; raises `ConfigError`."""
    named = tree.get("algorithm", "grpo")
    try:
        # what is no text, validation refuses
        base = preset(named) if isinstance(named, str) else {}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return Config.model_validate(merged(base, tree))
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error


def with_steps(config: Config, problems: int | None) -> tuple[Config, str | None]:
    """The configuration with the steps that `schedule.passes` asks for, and a line that says how
    many passes over so many problems (None: without end) its steps make."""
    schedule = config.schedule
    if problems is None or "rl" not in config.stages:
        return config, None
    if schedule.passes is not None:
        steps = math.ceil(schedule.passes * problems / schedule.prompts_per_step - 1e-9)
        changed = schedule.model_copy(update={"passes": None, "steps": steps})
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
    """The full resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


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
    "RewardPart",
    "RolloutConfig",
    "SFTConfig",
    "ScheduleConfig",
    "Settings",
    "SyncConfig",
    "TrackingConfig",
    "keys",
    "load_config",
    "resolve",
    "to_yaml",
    "user_errors",
]
