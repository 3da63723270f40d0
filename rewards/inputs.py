"""`RewardInput`, everything that a reward may look at, and `Reward`, the base of all rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .verdict import Verdict

MARK = "__emberl_reward__"
"""Name of the attribute in which `reward` stores the style of a function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardInput:
    """One completion with its problem, e.g.
    `RewardInput(prompt="7+5-3=", completion="<think>..</think>9", answer="9")`."""

    completion: str
    """The decoded completion, end token left out."""
    answer: str = ""
    """The reference answer; empty where a task needs none."""
    prompt: str = ""
    """The prompt as text, chat template applied."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation before the template, each `{"role": ..., "content": ...}`."""
    plain_prompt: str | None = None
    """The row's prompt where that is a text; None where the row holds messages."""
    source: str = ""
    """The data source; verl's `data_source`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the data row."""
    token_ids: tuple[int, ...] = ()
    """The completion's tokens; empty when graded without a tokenizer, as `emberl audit` does."""
    finish_reason: str = "stop"
    """`stop`, `length` or `abort`."""
    max_tokens: int = 0
    """The most tokens that the completion could have; 0 when unknown."""
    step: int = 0
    """RL steps done when it is graded; TRL's `trainer_state.global_step`."""
    max_steps: int = 0
    """RL steps of the whole run; 0 when unknown."""


class Reward(ABC):
    """Grades a batch: one verdict for each input, in order. Blocks, is thread-safe and limits its
    own time.

    Only `__call__` must be implemented; the other methods do nothing by default.
    """

    Options: ClassVar[type | None] = None
    """A dataclass with the constructor's keywords, for rewards with many options; else None."""
    inline = False
    """Whether grading is so fast that a thread would cost more."""

    @abstractmethod
    def __call__(self, batch: Sequence[RewardInput], /) -> Sequence[Verdict]:
        """One verdict for each input, in order."""

    @property
    def finished(self) -> int:
        """A count that grows while a batch is graded, which tells a long queue from a stuck
        grader."""
        return 0

    def check_reference(self, row: RewardInput) -> str | None:
        """The fault of a row's reference, checked before training; None if it can be graded
        against."""
        return None

    def check_references(self, rows: Sequence[RewardInput]) -> Sequence[str | None]:
        """The results of `check_reference` for many rows; overridden by rewards that check them
        together. Raises ValueError for faults that dropping rows would not remove."""
        return [self.check_reference(row) for row in rows]

    def trial(self, example: RewardInput) -> None:
        """Grades one example before training. Raises ValueError if that fails."""
        return

    def close(self) -> None:
        """Ends threads and processes that the reward has started."""
        return


@dataclass(frozen=True, kw_only=True, slots=True)
class BadReference:
    """A reference answer that a part cannot grade against."""

    row: int
    answer: str
    part: str
    message: str

    def __str__(self) -> str:
        return (
            f"row {self.row}: the reference {self.answer[:80]!r} cannot be used by {self.part!r}:"
            f" {self.message}"
        )


def reward(function: Callable[..., Any] | None = None, *, batched: bool = False) -> Any:
    """Marks a function of `RewardInput`s as a reward: it maps one input to a score, or with
    `batched=True` a list of them to a list. A score is a number, a bool, a `Verdict`, a mapping
    with `score`, or None if the reward does not apply.

    The function may be `async`. Used as `@reward` or `@reward(batched=True)`.
    """

    def mark(inner: Callable[..., Any]) -> Callable[..., Any]:
        setattr(inner, MARK, "native_batch" if batched else "native")
        return inner

    return mark if function is None else mark(function)
