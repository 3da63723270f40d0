"""The noun `RewardInput`: all that a reward may look at, and `Reward`, the shape of everything that grades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .verdict import Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardInput:
    """One completion with its problem, e.g. `RewardInput(prompt="7+5-3=", completion="<think>..</think>9", answer="9")`."""

    completion: str
    """The decoded completion, end token left out."""
    answer: str = ""
    """The reference answer; empty where a task needs none."""
    prompt: str = ""
    """The prompt as text, chat template applied."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation before the template, each `{"role": ..., "content": ...}`."""
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


class Reward(Protocol):
    """Grades a batch: one verdict for each input, in order. Blocks, is thread-safe and bounds its own time.

    A reward may also have `check_reference(input) -> str | None` (what is wrong with the reference, before training), or
    `check_references(inputs) -> list[str | None]` where the rows are better looked at together, `trial(input) -> None`
    (raises ValueError if it cannot grade), `finished` (a count that grows while it grades, so that a long queue is told
    from a stuck grader) and `close()`.
    """

    def __call__(self, batch: Sequence[RewardInput], /) -> Sequence[Verdict]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BadReference:
    """A reference answer that a part cannot grade against."""

    row: int
    answer: str
    part: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}: the reference {self.answer[:80]!r} cannot be used by {self.part!r}: {self.message}"
