"""The settings of `emberl plan`, and the scenario that follows from them for a given split of the
devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..config.base import Settings
from ..config.load import ConfigError
from ..config.mistakes import explain
from ..config.overrides import OverrideError, merged, tree_of
from .devices import DEVICES, MODELS, Device, ModelShape, decode_table, most_slots, read_rates
from .scenario import (
    Failures,
    LognormalLengths,
    PlanSchedule,
    Publication,
    RewardTime,
    Scenario,
    TraceLengths,
)

GB = 1e9
ENOUGH = 64
"""Answers that an engine should decode at a time: fewer leave most of its time to reading
weights."""
MOST_SLOTS = 256
"""That an engine is given, whatever memory it has."""
RELAY_BLOCKS = 64
"""A relayed version travels in so many blocks: the last node waits for one block per hop of the
tree, not for all of them."""
ORDERS_S = {"vllm": 0.1, "embedded": 0.01}
"""Seconds to stop an engine at a token boundary and have it go on. An assumption."""


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
    def hardware(self) -> Device:
        return DEVICES[self.device]

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def mean_context(self) -> float:
        """Tokens that a running answer reads on average: long ones run longer, so it is more than
        half the mean length."""
        lengths = self.lengths
        return lengths.prompt + min(lengths.mean * (1 + lengths.cv**2), lengths.cap) / 2

    def _most_slots(self, cards: int) -> int:
        return most_slots(self.hardware, self.shape, cards, self.mean_context)

    @property
    def cards(self) -> int:
        """Devices of one engine."""
        sizes = (1 << i for i in range(20))
        return self.engine.cards or next(n for n in sizes if self._most_slots(n) >= ENOUGH)

    @property
    def slots(self) -> int:
        fit = min(MOST_SLOTS, self._most_slots(self.cards))
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
    tree: dict[str, Any] = {}
    try:
        for override in overrides:
            tree = merged(tree, tree_of(override, PlanSettings, "link.bandwidth=3"))
        given = {name: value for name, value in options.items() if value is not None}
        return PlanSettings.model_validate(tree | given)
    except ValidationError as error:
        raise ConfigError(explain(error, PlanSettings)) from error
    except OverrideError as error:
        raise ConfigError(str(error)) from error


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
        commit=commit_seconds(settings),
        staged=link.staged,
    )


def commit_seconds(settings: PlanSettings) -> float:
    """How long an engine stands still for one version: a sum over what it does with it between two
    tokens.

    Dense, every process of a vLLM engine reads all tensors from the host's memory, hashes them and
    loads its part; the embedded engine copies and hashes them. Of a patch, each changed element is
    compared and written; to bring them to the device, to find where they belong, and to read back
    and compare checksums goes on beside decoding.
    """
    link, shape = settings.link, settings.shape
    if link.commit is not None:
        return link.commit
    rates = settings.hardware.rates if link.rates is None else read_rates(link.rates)
    part, orders = 1 / settings.cards, ORDERS_S[link.engine]
    if link.mode == "dense":
        # every process hashes whole tensors, and keeps its part of them
        hashed = shape.weight_bytes / rates.hash_bytes_per_s
        return orders + part * shape.weight_bytes / rates.copy_bytes_per_s + hashed
    return orders + part * link.changed * shape.parameters / rates.scatter_elements_per_s


def make_scenario(
    settings: PlanSettings, learners: int, lengths: TraceLengths | None = None
) -> Scenario:
    """The scenario in which `learners` of the devices learn. lengths: in the place of lognormal
    ones."""
    settings.check_split(learners)
    hardware, shape, drawn = settings.hardware, settings.shape, settings.lengths
    flops = shape.train_flops(drawn.prompt + drawn.mean)
    mfu = settings.learner.mfu or hardware.mfu
    longest = drawn.prompt + drawn.cap
    return Scenario(
        workers=max(1, (settings.devices - learners) // settings.cards),
        slots=settings.slots,
        table=decode_table(hardware, shape, settings.cards, slots=settings.slots, longest=longest),
        lengths=lengths or drawn,
        schedule=settings.schedule,
        learner_fixed=settings.learner.fixed,
        learner_per_token=flops / (learners * hardware.flops * mfu),
        reward=settings.reward,
        publication=publication(settings, learners),
        failures=settings.failures,
        steps=settings.steps,
        warmup=settings.warmup,
        seed=settings.seed,
    )
