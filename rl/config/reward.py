"""The settings of the reward: the graders of answers, and how their scores add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .algorithm import MOST
from .base import LONGEST, Settings


class RewardSpec(Settings):
    """A grader of answers; `math` alone stands for `{use: math}`."""

    use: str = ""
    """`math`, `code`, `gym`, `judge`, `format`, `language`, `overlong`, `repetition`,
    `package.module:function`, `./file.py:function`, or an entry point of the group
    `emberl.rewards`."""
    timeout: float = Field(default=10.0, gt=0, le=LONGEST)
    """Seconds for one completion."""
    concurrency: int | None = Field(default=None, ge=1)
    """Grading processes (of `judge`: requests at a time); empty: the reward's own choice."""
    style: str | None = None
    """A user's function is of this style: native, verl, verl_full, trl, openrlhf, slime, verifiers,
    ...; empty: seen from its signature."""
    isolation: Literal["process", "inline"] | None = None
    """Where a user's function runs; empty: in a process of its own."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the reward itself, e.g. of `judge` {base_url, model, prompt, pattern}."""
    kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Keywords for every call of a user's function (verl's reward_kwargs), or of the class or
    factory that makes it."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


class RewardPart(RewardSpec):
    """One named part of the reward."""

    by_source: Mapping[str, RewardSpec] = Field(default_factory=dict)
    """Instead of `use`: what marks the rows of each data source, a name or a pattern of it, e.g.
    {openai/gsm8k: math, taco*: code, "*": ./mine.py:score}. A source without a pattern ends the run
    before training."""
    weight: float = Field(default=1.0, ge=-MOST, le=MOST)
    """How often the part counts in the score."""
    gate: str | None = None
    """Another part's name: this one counts only where that one scored above 0."""
    deadline: float = Field(default=600.0, gt=0, le=LONGEST)
    """Seconds for a batch; what has no verdict by then is a verifier error."""

    @model_validator(mode="after")
    def _one_way(self) -> RewardPart:
        if bool(self.use) == bool(self.by_source):
            raise ValueError(
                "a part of the reward has either use, e.g. math, or by_source, e.g. {taco: code,"
                " '*': math}"
            )
        return self


class RewardConfig(Settings):
    """The grading of answers; `reward: ./mine.py:score` alone is one part, `answer`, and
    `reward.by_source` stands for `reward.parts.answer.by_source`. The score is the sum of weight
    x score over the parts that apply to a sample; a part that returns None does not, and the
    others' weights stay (as in TRL)."""

    parts: Mapping[str, RewardPart] = Field(
        default_factory=lambda: {"answer": RewardPart(use="math")}
    )
    max_error_fraction: float = Field(default=0.01, ge=0, le=1)
    """A step with more than this share of verifier errors ends the run with the cause."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"parts": {"answer": value}}
        if not isinstance(value, Mapping) or not (by_source := value.get("by_source")):
            return value
        rest = {key: part for key, part in value.items() if key != "by_source"}
        parts = rest.get("parts") or {}
        if "answer" in parts:
            raise ValueError("reward.by_source is reward.parts.answer.by_source: set one of them")
        return rest | {"parts": {"answer": {"by_source": by_source}, **parts}}

    @field_validator("parts")
    @classmethod
    def _parts(cls, parts: Mapping[str, RewardPart]) -> Mapping[str, RewardPart]:
        if not any(part.weight for part in parts.values()):
            raise ValueError(
                "no part of the reward has a weight, so every score is 0; give reward.parts one"
            )
        for name, part in parts.items():
            if part.gate is not None and part.gate not in parts.keys() - {name}:
                raise ValueError(
                    f"reward.parts.{name}.gate={part.gate} names no other part; there are"
                    f" {', '.join(parts)}"
                )
        return parts
