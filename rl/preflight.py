"""Checks of data, rewards, chat template and the user's own functions, before Ray and the actors
start and for `--dry-run`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..rewards.by_source import BySource
from ..rewards.inputs import RewardInput
from ..rewards.plugins.loading import PluginFile
from ..rewards.suite import RewardSuite, build_suite
from .algorithm.plugins import load_advantage, load_loss
from .answers import reward_input
from .config.algorithm import ADVANTAGES, LOSSES
from .config.data import DataConfig
from .config.distill import DistillConfig
from .config.load import Config, ConfigError, user_errors
from .data.demonstrations import check_rows
from .data.hub import look_up
from .data.rows import eval_tables, train_tables
from .data.sources import check_data, is_table
from .data.table import Head, heldout_note, read_head
from .data.templates import PromptWriter
from .teacher_checks import check_teachers

_REFERENCES = 256
"""Rows of a table whose references are checked."""
_RUN = 16
"""Rows of a table whose references are checked, if that may run programs."""
_RENDERED = 64
"""Rows of a table that are rendered by the chat template."""


def check_inputs(config: Config, *, hub: bool = False) -> list[str]:
    """Reads the first rows of every file, checks their references with the rewards, and tries a
    user's own loss and advantage on tiny batches. Returns remarks for a person; raises
    `ConfigError` for what would end the run. hub: also check data sets and models of the Hub, which
    may be downloaded."""
    with user_errors():
        if config.loss.kind not in LOSSES:
            load_loss(config.loss.kind, config.loss.options, PluginFile.of(config.loss.kind))
        if config.advantage.kind not in ADVANTAGES:
            load_advantage(config.advantage.kind, config.advantage.options)
    parted = bool(config.data.mixture or config.data.levels)
    # of a part it is the last level that is evaluated on
    asked = [part.at_levels[-1] for _, part in config.data.parts.values()] if parted else []
    refuse_nothing_to_evaluate(config, heldout=any(map(_holds_out, asked or [config.data])))
    return _check_parts(config, hub) if parted else _check_source(config, hub)


def _holds_out(data: DataConfig) -> bool:
    return data.heldout > 0 or data.eval_path is not None or data.eval_split is not None


def _check_source(config: Config, hub: bool) -> list[str]:
    """`check_inputs` of a single source, without what is the user's own code."""
    with user_errors():
        if not is_table(config.data):
            check_data(config.data)
        of_sets = _check_sets(config, hub)
        heads = _heads(config.data, hub)
        check_teachers(config, heads[0], hub=hub)
        _check_difficulty(config.data, heads[0])
        said = [head.mapper.describe() for head in (*heads[0], *heads[1])] + of_sets
        for head in (*heads[0], *heads[1]):
            said += _said_of(head)
        said += _said_of_sizes(config, *heads)
        suite = build_suite({name: part.model_dump() for name, part in config.reward.parts.items()})
        try:
            for head in (*heads[0], *heads[1]) if config.grades else ():
                said += check_references(config.data, suite, head)
        finally:
            suite.close()
        if "sft" in config.stages and config.sft.data is not None:
            try:
                for table in train_tables(config.sft.data, hub=hub):
                    check_rows(config.sft.data, table)
            except ValueError as error:
                raise ValueError(f"sft.data: {error}") from error
        tokenizer = _tokenizer(config, hub)
        if tokenizer is not None:
            for head in (*heads[0], *heads[1]):
                _render(config.data, tokenizer, head)
    return said


def refuse_nothing_to_evaluate(config: Config, *, heldout: bool) -> None:
    """Raises ConfigError if the run evaluates and has nothing for it. heldout: whether there are
    held-out problems."""
    sets_alone = bool(config.eval.sets) and config.eval.size is None
    if config.grades and config.eval.size != 0 and not heldout and not sets_alone:
        raise ConfigError(
            f"there is nothing to evaluate on: data.heldout={config.data.heldout} leaves no"
            " held-out problems; raise data.heldout, name data.eval_path or data.eval_split, or"
            " set eval.size=0"
        )


def _check_sets(config: Config, hub: bool) -> list[str]:
    """The same checks of the evaluation sets. Raises ValueError, which names the set."""
    said: list[str] = []
    for name, own in config.eval.sets.items():
        settings, parts = own.beside(config.data), config.reward.parts
        if own.verifier is not None:
            parts = {"answer": own.verifier}
        try:
            check_data(settings)
            if not is_table(settings) or not config.grades:
                continue
            suite = build_suite({part: keys.model_dump() for part, keys in parts.items()})
            try:
                for table in train_tables(settings, hub=hub):
                    lines = check_references(settings, suite, read_head(settings, table))
                    said += [f"eval.sets.{name}: {line}" for line in lines]
            finally:
                suite.close()
        except ValueError as error:
            raise ValueError(f"eval.sets.{name}: {error}") from error
    return said


def _check_parts(config: Config, hub: bool) -> list[str]:
    """The same checks of every source of a mixture at every level."""
    check_teachers(config, [], hub=hub)
    with user_errors():
        said = _check_sets(config, hub)
    evaluated = config.eval.model_copy(update={"sets": {}})
    config = config.model_copy(update={"distill": DistillConfig(), "eval": evaluated})
    for name, (_, part) in config.data.parts.items():
        for number, level in enumerate(part.at_levels):
            key = f"data.mixture.{name}" if config.data.mixture else "data"
            key += f".levels[{number}]" if part.levels else ""
            try:
                one = _check_source(config.model_copy(update={"data": level}), hub)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
            said += [f"{key}: {line}" for line in one]
    return said


def _check_difficulty(settings: DataConfig, heads: Sequence[Head]) -> None:
    """Raises ValueError if `data.curriculum.rate_column` has no numbers, or one outside 0 to 1."""
    column = settings.curriculum.rate_column
    if column is None:
        return
    key = f"data.curriculum.rate_column={column!r}"
    if not is_table(settings):
        raise ValueError(f"{key}: data.source={settings.source} has no columns; leave it out")
    for head in heads:
        values = [row.get(column) for row in head.problems.rows]
        rates = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if not rates:
            columns = sorted({name for row in head.problems.rows for name in row})
            raise ValueError(
                f"{key}: {head.table.where} has no numbers there; its columns are"
                f" {', '.join(columns)}"
            )
        if outside := [rate for rate in rates if not 0 <= rate <= 1]:
            raise ValueError(
                f"{key}: {head.table.where} has {outside[0]:g} there, and a pass rate is between 0"
                " and 1"
            )


def _heads(settings: DataConfig, hub: bool) -> tuple[list[Head], list[Head]]:
    """(heads of the training tables, heads of separate evaluation tables)."""
    if not is_table(settings):
        return [], []
    return tuple(  # type: ignore[return-value]
        [read_head(settings, table) for table in tables or ()]
        for tables in (train_tables(settings, hub=hub), eval_tables(settings, hub=hub))
    )


def _said_of(head: Head) -> list[str]:
    counts, lines = head.problems.counts, []
    some = "" if head.whole else "the first "
    if counts.bad:
        lines.append(
            f"{counts.bad} of {some}{counts.read} rows of {head.table.where} will be left out:"
            f" {counts.example}"
        )
    if counts.folded:
        left = counts.read - counts.bad
        lines.append(
            f"{some}{left} rows of {head.table.where} hold {left - counts.folded} problems; each"
            " counts once"
        )
    return lines


def _said_of_sizes(config: Config, train: Sequence[Head], evaluation: Sequence[Head]) -> list[str]:
    """Remarks on sizes: a held-out part that takes too many problems, an evaluation that uses only
    some, a training set smaller than a step. Raises ValueError if nothing is left to train on."""
    data, lines = config.data, []
    problems = sum(len(head.problems.rows) for head in train)
    if train and all(head.whole for head in train):
        own = not evaluation and data.eval_path is None and data.eval_split is None
        if own and data.heldout >= problems:
            raise ValueError(
                f"data.heldout={data.heldout} leaves nothing to train on of the {problems}"
                " problems; lower it, or name a held-out set in data.eval_path"
            )
        if own and 3 * data.heldout > problems:
            lines.append(heldout_note(data, problems))
        left, step = problems - (data.heldout if own else 0), config.schedule.prompts_per_step
        if left < step:
            lines.append(
                f"{left} problems to train on are fewer than schedule.prompts_per_step={step}:"
                f" every step has each of them {step / left:.1f} times"
            )
    held = sum(len(head.problems.rows) for head in evaluation)
    size = config.eval.size
    if evaluation and size and held > size:
        more = "" if all(head.whole for head in evaluation) else "or more "
        lines.append(
            f"eval.size={size} takes the first {size} of {held} {more}held-out problems; raise it"
            " to take all"
        )
    return lines


def check_references(settings: DataConfig, suite: RewardSuite, head: Head) -> list[str]:
    """Tries the reward on the first problem and the first references; returns a remark if some are
    left out. Raises ValueError if it cannot grade most of them."""
    prompts = [
        prompt for prompt, _ in zip(head.prompts(settings.name), range(_REFERENCES), strict=False)
    ]
    inputs = [reward_input(prompt, None, "") for prompt in prompts]
    suite.trial(reward_input(prompts[0], None, "0"))
    bad = [
        (prompts[i].id, why) for i, why in enumerate(_refusals(suite, inputs)) if why is not None
    ]
    if not bad:
        return []
    line = (
        f"{len(bad)} of {len(inputs)} references of {head.table.where} cannot be graded against:"
        f" {': '.join(bad[0])}"
    )
    if 2 * len(bad) > len(inputs):
        hint = (
            "; its rows have tests, for reward.parts.<name>.use=code"
            if head.mapper.layout.tests
            else ""
        )
        raise ValueError(f"{line}; is it the right column, and the right reward?{hint}")
    if settings.drop == "none":
        raise ValueError(f"{line}; mend them, or set data.drop=bad")
    return [f"{line}; such rows are left out"]


def _refusals(suite: RewardSuite, inputs: Sequence[RewardInput]) -> list[str | None]:
    """For each reference the first part's reason to refuse it, or None. Tests of programs are read,
    but not run."""
    refusals: list[str | None] = [None] * len(inputs)
    for part in suite.parts:
        if isinstance(part.reward, BySource):  # which may run the solutions of its code rows
            messages = part.reward.check_references(inputs[:_RUN])
        else:
            messages = [part.reward.check_reference(row) for row in inputs]
        for i, message in enumerate(messages):
            refusals[i] = refusals[i] or message
    return refusals


def _tokenizer(config: Config, hub: bool) -> Any:
    """The tokenizer of a directory with a tokenizer.json (with `hub` also of the Hub); else None,
    as it is checked later."""
    path = config.model.path
    if path is None:
        return None
    folder = Path(path).expanduser()
    there = os.path.exists(folder)
    if not os.path.isfile(folder / "tokenizer.json") and (there or not hub):
        return None
    if not there:
        look_up()
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer takes twice as long to load

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder) if there else path)
    # of any kind, since the files are the user's: `load_tokenizer` says what is wrong with them
    except Exception:
        return None


def _render(settings: DataConfig, tokenizer: Any, head: Head) -> None:
    """Raises ConfigError if the template refuses one of the first rows."""
    writer = PromptWriter(settings, tokenizer)
    for prompt, _ in zip(head.prompts(settings.name), range(_RENDERED), strict=False):
        try:
            writer.conversation(
                prompt.messages, id="", answer="", source="", columns=prompt.columns
            )
        except ValueError as error:
            raise ConfigError(
                f"{head.table.key}={head.table.where!r}, {prompt.id}: {error}"
            ) from error
