"""Prompt sources. A source is a pure function of (seed, position), so that one integer is all that
a run has to save of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .arithmetic import ArithmeticSource
from .gym_source import GymSource, task_of
from .rows import GYM, check_source, eval_tables, train_tables
from .table import Head, TableSource, read_head
from .templates import Tokenizer


class PromptSource(Protocol):
    """Disjoint sets of problems to train on and to evaluate on."""

    @property
    def name(self) -> str:
        """Short, as in `val-core/{name}/acc/mean@1`."""

    @property
    def size(self) -> int | None:
        """Problems in an epoch; None if they never repeat by design."""

    @property
    def heldout(self) -> Sequence[Prompt]:
        """The held-out problems, the same for every seed."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for a person: how many rows were dropped, and why."""

    def train(self, i: int) -> Prompt:
        """The problem at position i >= 0 of the run, the same whenever it is asked for."""

    def examples(self) -> Iterable[Prompt]:
        """Every problem that is known beforehand, once; perhaps without token ids."""

    def solution(self, prompt: Prompt) -> str | None:
        """The worked solution that supervised learning imitates; None if the source has none."""


def open_source(settings: DataConfig, tokenizer: Tokenizer, seed: int = 0) -> PromptSource:
    """The source that `data.source` names; `seed` is the run's, used unless `data.seed` is set.

    Reads every row of a data set once. Raises ValueError with the key, its value and the fix.
    """
    seed = seed if settings.seed is None else settings.seed
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
    if settings.scheduled:
        from .mixture import MixtureSource  # here: it is made of the sources below

        return MixtureSource(settings, lambda one: _open_one(one, tokenizer, seed), seed)
    return _open_one(settings, tokenizer, seed)


def _open_one(settings: DataConfig, tokenizer: Tokenizer, seed: int) -> PromptSource:
    if settings.source == "arithmetic":
        return ArithmeticSource(settings, tokenizer, seed)
    if is_gym(settings):
        return GymSource(settings, tokenizer, seed)
    return TableSource(settings, tokenizer, seed)


def is_gym(settings: DataConfig) -> bool:
    """Whether problems are made by reasoning-gym."""
    return isinstance(settings.source, str) and settings.source.startswith(GYM)


def is_table(settings: DataConfig) -> bool:
    """Whether problems are rows of files or of the Hub."""
    return settings.source != "arithmetic" and not is_gym(settings)


def check_data(settings: DataConfig) -> None:
    """Checks, without tokenizer or network, files with their first rows and task names. Raises
    ValueError with the key, its value and the fix."""
    if is_gym(settings):
        task_of(settings)
    elif is_table(settings):
        check_source(settings)
        for table in [
            *train_tables(settings, hub=False),
            *(eval_tables(settings, hub=False) or []),
        ]:
            read_head(settings, table)


def known_sources(settings: DataConfig, heads: Sequence[Head]) -> set[str] | None:
    """The names that prompts may have as their source, from the first rows `heads` of the tables;
    None if rows that were not read may have others."""
    if settings.mixture:
        return set(settings.mixture)
    if settings.source == "arithmetic":
        return {settings.name or "arithmetic"}
    if is_gym(settings):
        return {settings.name or task_of(settings)}
    if settings.name is not None:
        return {settings.name}
    prompts = [prompt for head in heads for prompt in head.prompts()]
    if not heads or any(
        not h.whole and any("data_source" in r for r in h.problems.rows) for h in heads
    ):
        return None
    return {prompt.source for prompt in prompts}
