"""The problems of a run and the rewards for answers to them, checked before training."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..rewards.suite import RewardSuite, build_suite
from ..rollout.stops import token_bytes
from .answers import reward_input
from .config.load import Config, ConfigError, user_errors, with_steps
from .data.mixture import MixtureSource
from .data.sources import PromptSource, open_source
from .data.table import TableSource
from .model_files import load_tokenizer
from .preflight import refuse_nothing_to_evaluate
from .sft import Imitated, open_imitated, with_sft_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Problems:
    """The problems of a run, and the rewards for answers to them."""

    config: Config
    """The configuration, with the numbers of steps that follow from the size of the data."""
    tokenizer: Any
    source: PromptSource
    suite: RewardSuite
    imitated: Imitated | None
    """The worked solutions of a supervised stage."""
    notes: tuple[str, ...]
    """Remarks for a person."""


def open_problems(config: Config, model_path: str, opened: ExitStack) -> Problems:
    """Reads the data and starts the rewards, which `opened` closes."""
    tokenizer = load_tokenizer(model_path, config.data)
    with user_errors():
        if config.rollout.stop:
            token_bytes(tokenizer)  # says whether the engines can find these in its tokens
        source = open_source(config.data, tokenizer, config.seed)
    suite = build_rewards(config, source, tokenizer)
    opened.callback(suite.close)
    config, passes = with_steps(config, source.size)
    notes = [*source.notes, *([passes] if passes else [])]
    imitated = None
    if "sft" in config.stages:
        imitated = open_imitated(config, source, tokenizer)
        config = with_sft_steps(config, imitated.size)
        notes += imitated.notes
    return Problems(
        config=config,
        tokenizer=tokenizer,
        source=source,
        suite=suite,
        imitated=imitated,
        notes=tuple(notes),
    )


def build_rewards(config: Config, source: PromptSource, tokenizer: Any) -> RewardSuite:
    """The reward suite, after a trial on one problem and a check of every reference of a finite
    data set. Raises ConfigError if there is nothing to evaluate on, or if references cannot be
    graded and may not be left out."""
    refuse_nothing_to_evaluate(config, heldout=bool(source.heldout))
    with user_errors():
        suite = build_suite({name: part.model_dump() for name, part in config.reward.parts.items()})
        if not config.grades:
            return suite
        suite.trial(reward_input(source.train(0), tokenizer, "0"))
        rows = list(source.examples())
        bad = suite.check_references([reward_input(prompt, tokenizer, "") for prompt in rows])
    if bad:
        ids = {rows[b.row].id for b in bad}
        shown = "; ".join(f"{rows[b.row].id}: {b}" for b in bad[:3])
        message = (
            f"{len(ids)} of {len(rows)} references of data.source={config.data.source!r} cannot be"
            f" graded against: {shown}"
        )
        if (
            config.data.drop == "none"
            or not isinstance(source, TableSource | MixtureSource)
            or 2 * len(ids) > len(rows)
        ):
            suite.close()
            fix = (
                "mend them, or set data.drop=bad"
                if 2 * len(ids) <= len(rows)
                else "is it the right column?"
            )
            raise ConfigError(f"{message}; {fix}")
        source.leave_out(ids)
        source.notes = (*source.notes, f"left out: {message}")
    return suite
