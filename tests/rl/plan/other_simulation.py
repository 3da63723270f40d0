"""A system for which figures of an independent, token-level simulation exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from emberl.rl.plan.devices import DecodeTable
from emberl.rl.plan.settings import (
    LognormalLengths,
    PlanSchedule,
    Publication,
    RewardTime,
    Scenario,
)


def steady(tokens_per_second: float) -> DecodeTable:
    """Every answer gets this many tokens a second, whatever else runs."""
    seconds = np.array([[1 / tokens_per_second]])
    return DecodeTable(running=np.array([1.0]), context=np.array([0.0]), seconds=seconds)


def changed(scenario: Scenario, **changes: Any) -> Scenario:
    """With these fields, or keys of its schedule, in the place of its own."""
    own = {name: changes.pop(name) for name in list(changes) if name in PlanSchedule.model_fields}
    return replace(scenario, schedule=scenario.schedule.model_copy(update=own), **changes)


TOY = Scenario(
    workers=16,
    slots=64,
    table=steady(60),
    lengths=LognormalLengths(mean=8192, cv=1, cap=32768, prompt=0),
    schedule=PlanSchedule(prompts_per_step=512, group_size=1, max_staleness=0),
    learner_fixed=90,
    learner_per_token=0,
    reward=RewardTime(seconds=0),
    publication=Publication(commit=1),
    steps=24,
    warmup=8,
)
"""1,024 slots at 60 tokens/s, 512 answers a step, lognormal of mean 8k and CV 1 cut at 32k, 90 s of
training, 1 s of pause."""
TOY_CASES: dict[str, tuple[dict[str, Any], float]] = {
    "synchronous": ({}, 640.0),
    "oversample 1.25": ({"oversample": 1.25, "overdue": "evict"}, 283.0),
}
"""Changes (the second: a quarter more groups, the slowest cut) -> seconds a step of the other
simulation."""
