"""The typed configuration: one YAML file is one experiment. Importing this loads no torch.

A file is merged over the preset that its `algorithm` names, `key=value` overrides over the file, and the result is
validated into frozen models; an unknown key is an error that names the nearest one. `configs/README.md` says what each
file is for; `emberl train CONFIG --dry-run` prints the whole resolved configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .algorithm import AdvantageConfig, FilterConfig, KLConfig, LossConfig, OffPolicyConfig, check_algorithm
from .base import Settings
from .cautions import refuse_what_cannot_train
from .data import DataConfig
from .presets import preset
from .settings import (
    CheckpointConfig,
    ClusterConfig,
    CriticConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RewardPart,
    RolloutConfig,
    ScheduleConfig,
    SFTConfig,
    SyncConfig,
    TrackingConfig,
)


class ConfigError(ValueError):
    """What a user must change, in one line that names the key, the value and the fix."""


@contextmanager
def user_errors() -> Iterator[None]:
    """What is reported as a ValueError in here is for the user to mend, and is told without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Config(Settings):
    """One experiment."""

    name: str
    seed: int = 0
    run_dir: str = ""
    """Where everything is written; empty: `runs/<name>`."""
    stages: tuple[Literal["sft", "rl"], ...] = ("rl",)
    algorithm: str = "grpo"
    """A preset for `advantage`, `loss`, `kl`, `offpolicy`, `filter`, `critic` and `schedule`; what those groups set themselves
    wins, and is said at the start (`cautions.changes`)."""
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
        if self.schedule.stream_parts > 1:
            self._check_streaming()
        if self.schedule.oversample > 1 and self.schedule.max_staleness:
            raise ValueError(
                f"schedule.oversample={self.schedule.oversample:g} is for max_staleness=0: with "
                f"schedule.max_staleness={self.schedule.max_staleness} long answers go on anyway; set one of them"
            )
        return self

    def _check_colocated(self) -> None:
        if not self.cluster.colocated:
            return
        wanted = {
            "rollout.engine=vllm": self.rollout.engine == "vllm" and not self.rollout.servers,
            "schedule.max_staleness=0": self.schedule.max_staleness == 0,
            f"cluster.rollouts={self.cluster.learners} (as learners)": self.cluster.rollouts == self.cluster.learners,
            "rollout.engine_args.tensor_parallel_size=1": self.rollout.cards == 1,
            "no rollout.engine_args.weight_transfer_config (a card cannot send to itself)": (
                "weight_transfer_config" not in self.rollout.engine_args
            ),
        }
        for what, met in wanted.items():
            if not met:
                raise ValueError(
                    f"cluster.colocated shares each device between one learner and one engine; it needs {what}"
                )

    def _check_collective(self) -> None:
        if self.sync.transport != "collective":
            return
        wanted = {
            "rollout.engine=vllm": self.rollout.engine == "vllm",
            "rollout.engine_args.weight_transfer_config": ("weight_transfer_config" in self.rollout.engine_args),
            "sync.mode=dense or auto": self.sync.mode != "patch",
        }
        for what, met in wanted.items():
            if not met:
                raise ValueError(
                    "sync.transport=collective sends whole weights into vLLM's own processes; it needs "
                    f"{what}, or set sync.transport=object_store"
                )

    def _check_streaming(self) -> None:
        """A part of a step can train by itself only where nothing needs the whole step."""
        schedule, advantage = self.schedule, self.advantage
        whole = {
            f"schedule.minibatches={schedule.minibatches}": schedule.minibatches > 1,
            f"schedule.epochs={schedule.epochs}": schedule.epochs > 1,
            f"advantage.kind={advantage.kind}": advantage.kind != "group",
            f"advantage.std={advantage.std}": advantage.std == "batch",
            f"advantage.rescale={advantage.rescale}": advantage.rescale != "none",
            "advantage.whiten=true": advantage.whiten,
            "kl.place=reward": self.kl.active and self.kl.place == "reward",
            f"loss.denominator={self.loss.denominator}": self.loss.denominator != "all",
            f"loss.nll_coef={self.loss.nll_coef:g}": self.loss.nll_coef > 0,
            "cluster.colocated=true": self.cluster.colocated,
        }
        if needed := [key for key, needs in whole.items() if needs]:
            raise ValueError(
                f"schedule.stream_parts={schedule.stream_parts} trains on parts of a step, but {', '.join(needed)} needs all of "
                "it; set schedule.stream_parts=1"
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
        """Tokens of the longest prompt and the longest answer together, in training or evaluation."""
        longest = self.rollout.max_response_length
        sets = self.eval.sets.values()
        return max(
            self.data.max_prompt_length + longest,
            *(s.max_prompt_length + (s.max_response_length or longest) for s in sets),
            0,
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of one YAML file with `key=value` overrides; raises `ConfigError`."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"configuration file {str(path)!r} does not exist{_nearby(file)}")
    try:
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: the file must be a mapping of groups such as model, data, rollout")
        for override in overrides:
            if "=" not in override:
                raise ConfigError(f"override {override!r} must have the form key=value, e.g. optim.lr=1e-4")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        tree = OmegaConf.to_container(merged, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except Exception as error:  # the YAML scanner's errors have no common base that can be imported without it
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        raise
    assert isinstance(tree, dict)
    return resolve({str(key): value for key, value in tree.items()})


def resolve(tree: Mapping[str, Any]) -> Config:
    """Merges a plain tree over the preset it names and validates it; raises `ConfigError`."""
    try:
        base = preset(str(tree.get("algorithm", "grpo")))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(dict(base)), OmegaConf.create(dict(tree))))
    assert isinstance(merged, dict)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def to_yaml(config: Config) -> str:
    """The full resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _explain(error: ValidationError) -> str:
    """All problems in one line, each with its key, its value and what would be right."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(_unknown_key(item["loc"]))
        elif item["type"] == "missing":
            problems.append(f"{key} is required but missing; add it to the file or pass {key}=...")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(item["input"], Mapping) or not key else f"{key}={item['input']!r}: "
            problems.append(f"{shown or (key + ': ' if key else '')}{message[0].lower() + message[1:]}")
    return "; ".join(problems)


def _unknown_key(location: tuple[int | str, ...]) -> str:
    key = ".".join(str(part) for part in location)
    parent: Any = Config
    for part in location[:-1]:
        parent = _child(parent, str(part))
    siblings = list(parent.model_fields) if parent is not None else []
    prefix = key[: -len(str(location[-1]))]
    near = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
    if near:
        return f"unknown key {key}; did you mean {prefix}{near[0]}?"
    elsewhere = difflib.get_close_matches(str(location[-1]), [k.rsplit(".", 1)[-1] for k in keys()], n=1, cutoff=0.8)
    full = [k for k in keys() if elsewhere and k.rsplit(".", 1)[-1] == elsewhere[0]]
    return f"unknown key {key}; " + (
        f"did you mean {full[0]}?" if full else f"{prefix or 'the top level '}has {', '.join(siblings)}"
    )


def keys() -> list[str]:
    """Every key that a file may set, dotted."""
    return list(_keys(Config, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        child = _model_of(field)
        if child is not None:
            yield from _keys(child, f"{prefix}{name}.")


def _child(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    if model is None:
        return None
    field = model.model_fields.get(name)
    return _model_of(field) if field is not None else model  # a name chosen by the user, as in reward.parts.<name>


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    pending: list[Any] = [field.annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        origin = get_origin(kind)
        if origin in (Union, UnionType) or (isinstance(origin, type) and issubclass(origin, Mapping)):
            pending.extend(get_args(kind))
    return None


def _nearby(file: Path) -> str:
    folder = file.parent
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    near = difflib.get_close_matches(file.name, names, n=1) or names[:5]
    return f"; {folder} has {', '.join(near)}" if near else ""


__all__ = [
    "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "CriticConfig", "EvalConfig", "LoraConfig", "ModelConfig",
    "OptimConfig", "RewardConfig", "RewardPart", "RolloutConfig", "SFTConfig", "ScheduleConfig", "Settings", "SyncConfig",
    "TrackingConfig", "keys", "load_config", "resolve", "to_yaml", "user_errors",
]  # fmt: skip
