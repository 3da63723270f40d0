"""The settings of `emberl plan`, and the run to simulate (`Scenario`) that follows from them for a
given split of the devices. Times are seconds, lengths tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import ceil, inf, log2
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from ...rollout.schedule import Overdue
from ..config.base import Settings
from ..config.load import ConfigError, user_errors
from ..config.mistakes import explain
from ..config.overrides import merged, tree_of
from .devices import DEVICES, MODELS, DecodeTable, Floats, decode_table, most_slots, read_rates

GB = 1e9
ENOUGH = 64  # answers at a time: fewer leave most of an engine's time to reading weights
MOST_SLOTS = 256  # that an engine is given, whatever memory it has
RELAY_BLOCKS = 64  # of a relayed version: the last node waits for one of them per hop of the tree
ORDERS_S = {"vllm": 0.1, "embedded": 0.01}  # to stop at a token boundary and go on; an assumption


def lognormal(mean: float, cv: float, z: Any) -> Any:
    """Values of this mean and standard deviation over mean, at z of the standard normal."""
    sigma = np.sqrt(np.log1p(cv**2))
    return mean * np.exp(sigma * z - sigma**2 / 2)


class LognormalLengths(Settings):
    """Lognormal answers, cut at a longest one; `--trace` takes recorded ones instead."""

    mean: float = Field(default=8192, gt=0)
    """Tokens, before the cut at `cap`."""
    cv: float = Field(default=1.0, ge=0)
    """Standard deviation over mean, before the cut; 0: all answers are equally long."""
    cap: int = Field(default=32768, ge=1)
    prompt: int = Field(default=512, ge=0)
    correlation: float = Field(default=0.0, ge=0, le=1)
    """Between the logarithms of the answers to one prompt: a hard problem makes all long."""

    def draw(self, rng: np.random.Generator, group_size: int) -> tuple[int, Floats]:
        """A prompt's tokens, and [G] those of its answers."""
        problem, own = rng.standard_normal(), rng.standard_normal(group_size)
        z = np.sqrt(self.correlation) * problem + np.sqrt(1 - self.correlation) * own
        return self.prompt, np.clip(np.rint(lognormal(self.mean, self.cv, z)), 1, self.cap)


class TraceLengths(NamedTuple):
    """Lengths that a run recorded: whole groups are drawn again, so what answers to one prompt have
    in common stays."""

    groups: Sequence[tuple[int, Floats]]
    """A prompt's tokens, and those of its answers."""

    def draw(self, rng: np.random.Generator, group_size: int) -> tuple[int, Floats]:
        """A prompt's tokens, and [G] those of its answers."""
        prompt, own = self.groups[int(rng.integers(len(self.groups)))]
        return prompt, own if len(own) == group_size else rng.choice(own, group_size)


class PlanSchedule(Settings):
    """As `schedule` of a run's configuration."""

    prompts_per_step: int = Field(default=1024, ge=1)
    group_size: int = Field(default=16, ge=1)
    max_staleness: int = Field(default=8, ge=0)
    overdue: Overdue = "wait"
    in_flight: Literal["update", "finish", "park"] = "update"
    oversample: float = Field(default=1.0, ge=1)


class RewardTime(Settings):
    """How long marking takes."""

    seconds: float = Field(default=1.0, ge=0)
    """From a group's last token until the learners may have it; the mean."""
    cv: float = Field(default=1.0, ge=0)
    """0: always the same; else lognormal."""
    graders: int = Field(default=256, ge=1)
    """Groups at a time."""


class Failures(Settings):
    """Of rollout engines."""

    mtbf: float = Field(default=inf, gt=0, allow_inf_nan=True)
    """Hours between two losses of one engine, on average."""
    restart: float = Field(default=300.0, ge=0)
    """Seconds until its replacement decodes."""


class EngineSettings(Settings):
    """One engine."""

    cards: int | None = Field(default=None, ge=1)
    """Devices of one engine (tensor parallel); empty: the smallest power of two that has memory for
    64 answers."""
    slots: int | None = Field(default=None, ge=1)
    """Answers at a time; empty: as many as fit the memory, 256 at most."""


class LearnerSettings(Settings):
    """All learners."""

    fixed: float = Field(default=5.0, ge=0)
    """Seconds of a step besides its tokens: packing, the optimizer, logging. An assumption."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """Empty: the device's."""


class LinkSettings(Settings):
    """The way from learners to rollout nodes."""

    mode: Literal["dense", "patch"] = "patch"
    ratio: float = Field(default=100.0, ge=1)
    """Bytes of the weights over bytes of a patch."""
    bandwidth: float = Field(default=25.0, gt=0, allow_inf_nan=True)
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
    engine: Literal["vllm", "embedded"] = "vllm"
    """What commits the weights: `commit` follows from it, from `mode` and from the model's size."""
    changed: float = Field(default=0.01, gt=0, le=1)
    """Share of the weights that a patch changes."""
    rates: Path | None = None
    """A file of `emberl bench device --json`, with the rates that a commit is made of; empty: the
    device's data sheet."""
    commit: float | None = Field(default=None, ge=0)
    """Seconds in which the engine stands still, where they are known; empty: from the above."""


class PlanSettings(Settings):
    """A plan. Everything can be set as key=value, e.g. link.bandwidth=3."""

    device: str = "910B"
    devices: int = Field(default=1024, ge=2)
    learners: int | None = Field(default=None, ge=1)
    """Devices that learn; the others roll out. Empty: the best split is searched."""
    model: Literal["0.6m", "7b", "32b", "72b"] = "32b"
    lengths: LognormalLengths = LognormalLengths()
    engine: EngineSettings = EngineSettings()
    schedule: PlanSchedule = PlanSchedule()
    learner: LearnerSettings = LearnerSettings()
    link: LinkSettings = LinkSettings()
    reward: RewardTime = RewardTime()
    failures: Failures = Failures()
    steps: int = Field(default=24, ge=2)
    warmup: int = Field(default=12, ge=0)
    seed: int = 0

    @field_validator("device")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.upper() not in DEVICES:
            raise ValueError(f"device={name!r} is none of {', '.join(DEVICES)}")
        return name.upper()

    @model_validator(mode="after")
    def _fits(self) -> PlanSettings:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be below steps={self.steps}")
        return self

    @property
    def mean_context(self) -> float:
        """Tokens that a running answer reads on average: long ones run longer, so it is more than
        half the mean length."""
        lengths = self.lengths
        return lengths.prompt + min(lengths.mean * (1 + lengths.cv**2), lengths.cap) / 2

    def fitting(self, cards: int) -> int:
        """Answers for which an engine of so many devices has memory."""
        return most_slots(DEVICES[self.device], MODELS[self.model], cards, self.mean_context)

    @property
    def cards(self) -> int:
        """Devices of one engine."""
        sizes = (1 << i for i in range(20))
        return self.engine.cards or next(n for n in sizes if self.fitting(n) >= ENOUGH)


def load_plan(overrides: Sequence[str], options: Mapping[str, Any]) -> PlanSettings:
    """Settings from key=value words, with the command's own options on top; `ConfigError` for what
    a person must change."""
    given = {name: value for name, value in options.items() if value is not None}
    with user_errors():
        trees = [tree_of(override, PlanSettings, "link.bandwidth=3") for override in overrides]
    try:
        return PlanSettings.model_validate(reduce(merged, [*trees, given], {}))
    except ValidationError as error:
        raise ConfigError(explain(error, PlanSettings)) from error


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The times of publishing a new version of the weights. The learners wait until every worker
    serves it."""

    encode: float = 0.0  # finding and coding what changed, on the learners
    transfer: float = 0.0  # until the bytes are on every rollout node
    commit: float = 0.0  # writing them into the engine, during which it cannot decode
    staged: bool = True  # decoding goes on during the transfer; else it stands still


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run to simulate."""

    workers: int  # rollout engines
    slots: int  # answers that one of them decodes at a time
    table: DecodeTable
    lengths: LognormalLengths | TraceLengths
    schedule: PlanSchedule
    learner_fixed: float  # of a step, whatever its size: from its last group to the publication
    learner_per_token: float  # and for each token of its groups, prompts included
    reward: RewardTime
    publication: Publication = Publication()
    failures: Failures = field(default_factory=Failures)
    steps: int
    warmup: int  # the first steps, which fill the pipeline: the figures leave them out
    seed: int = 0


def publication(settings: PlanSettings, learners: int) -> Publication:
    """The times of one version when `learners` devices publish it to the others."""
    link, weights = settings.link, MODELS[settings.model].weight_bytes / GB
    per_node = DEVICES[settings.device].per_node
    senders = max(1, learners // per_node)
    receivers = max(1, ceil((settings.devices - learners) / per_node))
    # relayed, the last node waits for a block a hop; else learners send to each node themselves
    relayed = 1 + log2(receivers + 1) / RELAY_BLOCKS
    times = relayed if link.relay else max(1.0, receivers / senders)
    coding = weights / senders / link.encode
    wire, encode = (weights / link.ratio, coding) if link.mode == "patch" else (weights, 0.0)
    transfer = wire / link.bandwidth * times + weights / link.prepare
    commit = commit_seconds(settings)
    return Publication(encode=encode, transfer=transfer, commit=commit, staged=link.staged)


def commit_seconds(settings: PlanSettings) -> float:
    """Seconds in which an engine stands still for one version: a sum over what it does with it
    between two tokens.

    Dense, every process of an engine hashes whole tensors from the host's memory and copies its
    part of them. Of a patch, each changed element is compared and written; to bring them to the
    device, to find where they belong, and to compare checksums goes on beside decoding.
    """
    link, model = settings.link, MODELS[settings.model]
    if link.commit is not None:
        return link.commit
    rates = DEVICES[settings.device] if link.rates is None else read_rates(link.rates)
    part, orders = 1 / settings.cards, ORDERS_S[link.engine]
    if link.mode == "dense":
        hashed = model.weight_bytes / rates.hash_bytes_per_s
        return orders + part * model.weight_bytes / rates.copy_bytes_per_s + hashed
    return orders + part * link.changed * model.parameters / rates.scatter_elements_per_s


def make_scenario(
    settings: PlanSettings, learners: int, lengths: TraceLengths | None = None
) -> Scenario:
    """The scenario in which `learners` of the devices learn. lengths: in the place of lognormal
    ones."""
    device, model, drawn = DEVICES[settings.device], MODELS[settings.model], settings.lengths
    cards, longest = settings.cards, drawn.prompt + drawn.cap
    if not 1 <= learners <= settings.devices - cards:
        raise ConfigError(
            f"devices={settings.devices} with learners={learners} leave no engine of {cards}"
            " devices; use more devices or fewer engine.cards"
        )
    fit = min(MOST_SLOTS, settings.fitting(cards))
    if fit == 0:
        raise ConfigError(
            f"model={settings.model} does not fit engine.cards={cards} x {settings.device}; use"
            " more cards"
        )
    slots = settings.engine.slots or fit
    flops = model.train_flops(drawn.prompt + drawn.mean)
    mfu = settings.learner.mfu or device.mfu
    return Scenario(
        workers=max(1, (settings.devices - learners) // cards),
        slots=slots,
        table=decode_table(device, model, cards, slots=slots, longest=longest),
        lengths=lengths or drawn,
        schedule=settings.schedule,
        learner_fixed=settings.learner.fixed,
        learner_per_token=flops / (learners * device.flops * mfu),
        reward=settings.reward,
        publication=publication(settings, learners),
        failures=settings.failures,
        steps=settings.steps,
        warmup=settings.warmup,
        seed=settings.seed,
    )
