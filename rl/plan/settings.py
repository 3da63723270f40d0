"""The settings of `emberl plan`, and the scenario that follows from them for a given split of the
devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from math import ceil, inf, log2
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from ...rollout.schedule import QUEUE_DEPTH
from ..config.load import ConfigError, Settings
from .commit import Engine, commit_seconds, read_rates
from .devices import MODELS, Device, ModelShape, decode_table, device, most_slots
from .scenario import Failures, InFlight, LognormalLengths, Publication, RewardTime, Scenario

GB = 1e9
ENOUGH = 64
"""Answers that an engine should decode at a time: fewer leave most of its time to reading
weights."""


class LengthSettings(Settings):
    """Lognormal answers; `--trace` takes recorded ones instead."""

    mean: float = Field(default=8192, gt=0)
    """Tokens, before the cut at `cap`."""
    cv: float = Field(default=1.0, ge=0)
    """Standard deviation over mean."""
    cap: int = Field(default=32768, ge=1)
    prompt: int = Field(default=512, ge=0)
    correlation: float = Field(default=0.0, ge=0, le=1)
    """Between the logarithms of the answers to one prompt."""


class EngineSettings(Settings):
    cards: int | None = Field(default=None, ge=1)
    """Devices of one engine (tensor parallel); empty: the smallest power of two that has memory for
    `ENOUGH` answers."""
    slots: int | None = Field(default=None, ge=1)
    """Answers at a time; empty: as many as fit the memory, 256 at most."""


class PlanSchedule(Settings):
    """As `schedule` of a run's configuration."""

    prompts_per_step: int = Field(default=1024, ge=1)
    group_size: int = Field(default=16, ge=1)
    max_staleness: int = Field(default=8, ge=0)
    overdue: Literal["wait", "evict"] = "wait"
    in_flight: InFlight = "update"
    oversample: float = Field(default=1.0, ge=1)


class LearnerSettings(Settings):
    fixed: float = Field(default=5.0, ge=0)
    """Seconds of a step besides its tokens: packing, the optimizer, logging. An assumption."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Empty: the device's."""


class LinkSettings(Settings):
    """The way from learners to rollout nodes."""

    mode: Literal["dense", "patch"] = "patch"
    ratio: float = Field(default=100.0, ge=1)
    """Bytes of the weights over bytes of a patch."""
    bandwidth: float = Field(default=25.0, gt=0)
    """GB/s of one node, shared by its devices; inf: a perfect link."""
    relay: bool = True
    """Nodes pass blocks on to each other (each receives them once). False: the learners send to
    every node themselves."""
    staged: bool = True
    """Decoding goes on while the bytes come. False: it stands still."""
    encode: float = Field(default=8.0, gt=0)
    """GB/s of weights that one learner node compares and codes. An assumption: 8 cores at 1
    GB/s."""
    prepare: float = Field(default=40.0, gt=0)
    """GB/s of weights that one rollout node verifies by digest before it commits. An assumption: 8
    cores at 5 GB/s."""
    engine: Engine = "vllm"
    """What commits the weights: `commit` follows from it, from `mode` and from the model's size."""
    changed: float = Field(default=0.01, gt=0, le=1)
    """Share of the weights that a patch changes."""
    rates: Path | None = None
    """A file of `emberl bench device --json`, with the rates that a commit is made of; empty: the
    device's data sheet."""
    commit: float | None = Field(default=None, ge=0)
    """Seconds in which the engine stands still, where they are known; empty: from the above."""


class RewardSettings(Settings):
    seconds: float = Field(default=1.0, ge=0)
    """To mark a group."""
    cv: float = Field(default=1.0, ge=0)
    graders: int = Field(default=256, ge=1)
    """Groups at a time."""


class FailureSettings(Settings):
    mtbf: float = Field(default=inf, gt=0)
    """Hours between two losses of one engine."""
    restart: float = Field(default=300.0, ge=0)
    """Seconds."""


class PlanSettings(Settings):
    """A plan. Everything can be set as key=value, e.g. link.bandwidth=3."""

    device: str = "910B"
    devices: int = Field(default=1024, ge=2)
    learners: int | None = Field(default=None, ge=1)
    """Devices that learn; the others roll out. Empty: the best split is searched."""
    model: Literal["0.6m", "7b", "32b", "72b"] = "32b"
    lengths: LengthSettings = LengthSettings()
    engine: EngineSettings = EngineSettings()
    schedule: PlanSchedule = PlanSchedule()
    learner: LearnerSettings = LearnerSettings()
    link: LinkSettings = LinkSettings()
    reward: RewardSettings = RewardSettings()
    failures: FailureSettings = FailureSettings()
    steps: int = Field(default=24, ge=2)
    warmup: int = Field(default=12, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be below steps={self.steps}")
        return self

    @cached_property
    def hardware(self) -> Device:
        return device(self.device)

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def mean_context(self) -> float:
        """Tokens that a running answer reads on average: long ones run longer, so it is more than
        half the mean length."""
        lengths = self.lengths
        return lengths.prompt + min(lengths.mean * (1 + lengths.cv**2), lengths.cap) / 2

    @property
    def cards(self) -> int:
        """Devices of one engine."""
        if self.engine.cards is not None:
            return self.engine.cards
        sizes = (1 << i for i in range(20))
        context = self.mean_context
        return next(n for n in sizes if most_slots(self.hardware, self.shape, n, context) >= ENOUGH)

    @property
    def slots(self) -> int:
        fit = min(256, most_slots(self.hardware, self.shape, self.cards, self.mean_context))
        if fit == 0:
            raise ConfigError(
                f"model={self.model} does not fit engine.cards={self.cards} x {self.device}; use"
                " more cards"
            )
        return self.engine.slots or fit

    def check_split(self, learners: int) -> None:
        if not 1 <= learners <= self.devices - self.cards:
            raise ConfigError(
                f"devices={self.devices} with learners={learners} leave no engine of {self.cards}"
                " devices; use more devices or fewer engine.cards"
            )


def load_plan(overrides: Sequence[str], options: Mapping[str, Any]) -> PlanSettings:
    """Settings from key=value words, with the command's own options on top; `ConfigError` for what
    a person must change."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} must have the form key=value, e.g. link.bandwidth=3")
    tree = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(tree, dict)
    given = {str(key): value for key, value in tree.items()}
    try:
        return PlanSettings.model_validate(
            given | {k: v for k, v in options.items() if v is not None}
        )
    except ValidationError as error:
        raise ConfigError("; ".join(map(_problem, error.errors()))) from error


def _problem(item: Mapping[str, Any]) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']}" if key else str(item["msg"])
    group = PlanSettings.model_fields.get(str(item["loc"][0]))
    kind = PlanSettings if len(item["loc"]) == 1 or group is None else group.annotation
    assert isinstance(kind, type) and issubclass(kind, Settings)
    near = get_close_matches(str(item["loc"][-1]), list(kind.model_fields), n=1, cutoff=0.5)
    hint = (
        f"did you mean {key.removesuffix(str(item['loc'][-1]))}{near[0]}?"
        if near
        else "see emberl plan --keys"
    )
    return f"unknown key {key}; {hint}"


def publication(settings: PlanSettings, learners: int) -> Publication:
    """The times of one version when `learners` devices publish it to the others."""
    link, weights = settings.link, settings.shape.weight_bytes / GB
    per_node = settings.hardware.per_node
    senders = max(1, learners // per_node)
    receivers = max(1, ceil((settings.devices - learners) / per_node))
    wire = weights / link.ratio if link.mode == "patch" else weights
    arrival = wire / link.bandwidth
    if link.relay:
        arrival *= 1 + log2(receivers + 1) / RELAY_BLOCKS
    else:
        arrival *= max(1.0, receivers / senders)
    return Publication(
        encode=weights / senders / link.encode if link.mode == "patch" else 0.0,
        transfer=arrival + weights / link.prepare,
        commit=commit(settings),
        staged=link.staged,
    )


def commit(settings: PlanSettings) -> float:
    """Seconds in which an engine stands still for one version."""
    link = settings.link
    if link.commit is not None:
        return link.commit
    return commit_seconds(
        settings.shape,
        settings.hardware.commit if link.rates is None else read_rates(link.rates),
        engine=link.engine,
        mode=link.mode,
        cards=settings.cards,
        changed=link.changed,
    )


RELAY_BLOCKS = 64
"""A relayed version travels in so many blocks: the last node waits for one block per hop of the
tree, not for all of them."""


def make_scenario(settings: PlanSettings, learners: int) -> Scenario:
    """The scenario in which `learners` of the devices learn."""
    settings.check_split(learners)
    hardware, shape = settings.hardware, settings.shape
    lengths, schedule = settings.lengths, settings.schedule
    source = LognormalLengths(
        mean_uncut=lengths.mean,
        cv=lengths.cv,
        cap=lengths.cap,
        prompt=lengths.prompt,
        correlation=lengths.correlation,
    )
    flops = shape.train_flops(lengths.prompt + lengths.mean)
    mfu = settings.learner.mfu or hardware.mfu
    return Scenario(
        workers=max(1, (settings.devices - learners) // settings.cards),
        slots=settings.slots,
        given=QUEUE_DEPTH * settings.slots if schedule.max_staleness else None,
        table=decode_table(
            hardware,
            shape,
            settings.cards,
            slots=settings.slots,
            longest=lengths.prompt + lengths.cap,
        ),
        lengths=source,
        prompts_per_step=schedule.prompts_per_step,
        group_size=schedule.group_size,
        learner_fixed=settings.learner.fixed,
        learner_per_token=flops / (learners * hardware.flops * mfu),
        max_staleness=schedule.max_staleness,
        overdue=schedule.overdue,
        in_flight=schedule.in_flight,
        oversample=schedule.oversample,
        reward=RewardTime(
            seconds=settings.reward.seconds, cv=settings.reward.cv, graders=settings.reward.graders
        ),
        publication=publication(settings, learners),
        failures=Failures(mtbf=settings.failures.mtbf * 3600, restart=settings.failures.restart),
        steps=settings.steps,
        warmup=settings.warmup,
        seed=settings.seed,
    )
