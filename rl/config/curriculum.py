"""The settings `data.curriculum`: which problem comes next. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .base import MOST_STEPS, Settings


class DifficultyStage(Settings):
    """Some RL steps with problems of one range of difficulty."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """RL steps; the last stage goes on to the end."""
    rates: tuple[float, float]
    """The lowest and the highest pass rate of its problems, e.g. [0.5, 1.0] for easy ones."""

    @model_validator(mode="after")
    def _range(self) -> DifficultyStage:
        low, high = self.rates
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"rates=[{low:g}, {high:g}] must be [lowest, highest] within 0 and 1, e.g. [0.5,"
                " 1.0]"
            )
        return self


class CurriculumConfig(Settings):
    """The choice of problems within a source by their measured pass rates. A pass rate is the
    share of correct answers in a problem's groups, where a new group counts half. Problems of a
    generated source are new ones always; for these see `data.levels`."""

    pick: Literal["order", "rate", "thompson"] = "order"
    """`order`: every problem once an epoch; `rate`: drawn with a weight p (1 - p) of the pass rate,
    one that was not measured as with 1/2; `thompson`: the rate itself is drawn from what is known
    of it, and the problem with the largest p (1 - p) taken."""
    drop: bool = False
    """Leaves out problems that the last group always or never solved."""
    revisit: int = Field(default=50, ge=0, le=MOST_STEPS)
    """RL steps after which a dropped problem comes back; 0: never."""
    hard_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of draws that is kept for hard problems, as far as there are any."""
    hard_below: float = Field(default=0.25, gt=0, lt=1)
    """Hard are problems of a pass rate above 0 and at most this."""
    rate_column: str | None = None
    """The data's column with a pass rate between 0 and 1 that is known beforehand (Big-Math:
    `llama8b_solve_rate`), which counts until a problem is measured."""
    stages: tuple[DifficultyStage, ...] = ()
    """Stages by difficulty, one after the other; they need `rate_column`."""
    raise_at: float = Field(default=0.75, gt=0, le=1)
    """The success at which the next of `data.levels` begins."""
    raise_after: int = Field(default=256, ge=1)
    """Answers at a level over which success is measured before it may be raised."""

    @model_validator(mode="after")
    def _known(self) -> CurriculumConfig:
        if self.stages and self.rate_column is None:
            raise ValueError(
                "data.curriculum.stages go by difficulty, which nobody has measured yet; name the"
                " column with each problem's pass rate in data.curriculum.rate_column"
            )
        return self

    @property
    def active(self) -> bool:
        return self != CurriculumConfig()
