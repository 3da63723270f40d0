"""`emberl data`: a data set as a run would read it, with its first rows as prompts and the reward's
verdicts on their references."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..rewards.code_tests.solutions import solutions_of
from ..rewards.suite import build_suite
from ..rollout.samples import Prompt
from .answers import reward_input
from .config.data import DataConfig
from .config.load import Config, load_config, resolve
from .data.rows import train_tables
from .data.sources import is_table
from .data.table import Head, read_head
from .data.templates import PromptWriter, Tokenizer

SHOWN = 3
_BARS = 10
_WIDTH = 40


def show_data(source: str, overrides: Sequence[str], model: str | None) -> Iterator[str]:
    """The lines to print. source: a configuration (.yaml), or a value of `data.source`.

    Raises ValueError for data that a run would refuse.
    """
    config = _config(source, overrides, model)
    for name, (_, settings) in config.data.parts.items():
        if is_table(settings):
            heads = [read_head(settings, table) for table in train_tables(settings)]
            tokenizer = _tokenizer(config, model)
            for head in heads:
                yield from _table(config, settings, head, tokenizer)
        elif config.data.mixture:
            yield f"data.mixture.{name}: made by {settings.source}"
        else:
            raise ValueError(
                f"data.source={settings.source!r} is generated; emberl data shows rows of files and"
                " of the Hub"
            )


def _config(source: str, overrides: Sequence[str], model: str | None) -> Config:
    changes = [*overrides, *([f"model.path={model}", "model.tiny=null"] if model else [])]
    if Path(source).suffix in (".yaml", ".yml"):
        return load_config(source, changes)
    from omegaconf import OmegaConf

    tree: dict[str, Any] = {
        "name": "data",
        "data": {"source": source},
        "model": {} if model else {"tiny": {"vocabulary": "bytes"}},
    }
    changes = [
        change
        if "." in change.partition("=")[0] or change.startswith("reward=")
        else f"data.{change}"
        for change in changes
    ]
    for change in changes:
        if "=" not in change:
            raise ValueError(f"{change!r} must have the form key=value, e.g. layout=gsm8k")
    merged = OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(changes))
    )
    assert isinstance(merged, dict)
    return resolve({str(key): value for key, value in merged.items()})


def _tokenizer(config: Config, model: str | None) -> Any:
    """The model's tokenizer; None without a model, in which case text is counted in bytes."""
    if config.model.path is None:
        return None
    from .model_files import load_tokenizer

    return load_tokenizer(config.model.path, config.data)


def _table(
    config: Config, settings: DataConfig, head: Head, tokenizer: Tokenizer | None
) -> Iterator[str]:
    counts = head.problems.counts
    yield head.mapper.describe()
    known = head.table.rows
    size = (
        f"{counts.read} rows"
        if head.whole
        else f"the first {counts.read} of {known or 'more'} rows"
    )
    yield (
        f"{size}: {len(head.problems.rows)} problems, {counts.folded} repeated, {counts.bad}"
        " left out"
    )
    if counts.bad:
        yield f"left out: {counts.example}"
    writer = None if tokenizer is None else PromptWriter(settings, tokenizer)
    prompts = list(head.prompts(settings.name))
    specs = _specs(config, head)
    suite = build_suite(specs)
    try:
        for number, prompt in enumerate(islice(prompts, SHOWN), 1):
            yield f"--- row {head.problems.numbers[number - 1] + 1}, source {prompt.source}"
            yield _shown(prompt, writer, tokenizer)
            completion, what = _own_answer(prompt, head)
            yield f"--- {what}"
            verdict = suite.grade([reward_input(prompt, None, completion)])[0]
            refusal = suite.check_references([reward_input(prompt, None, "")])
            used = ", ".join(str(spec["use"] or "by source") for spec in specs.values())
            why = f" ({verdict.message})" if verdict.message else ""
            yield f"--- {used}: {verdict.status.value}{why}" + (
                f"; unfit: {refusal[0]}" if refusal else ""
            )
    finally:
        suite.close()
    yield "---"
    yield from _histogram(
        [_length(p, writer) for p in prompts], "bytes" if writer is None else "tokens", settings
    )


def _specs(config: Config, head: Head) -> Mapping[str, Mapping[str, Any]]:
    """The configuration's rewards; if none was chosen, the one for the layout's task."""
    specs = {name: part.model_dump() for name, part in config.reward.parts.items()}
    if (
        set(specs) == {"answer"}
        and specs["answer"]["use"] == "math"
        and "reward" not in config.model_fields_set
    ):
        specs["answer"]["use"] = head.mapper.task
    return specs


def _own_answer(prompt: Prompt, head: Head) -> tuple[str, str]:
    """(the row's own reference as an answer, its description): a program if rows have tests."""
    if head.mapper.task == "code" or not prompt.answer:
        own = solutions_of(prompt.columns)
        return (
            (own[0], f"its own solution\n{own[0]}")
            if own
            else ("", "the row has no solution of its own to try")
        )
    return f"\\boxed{{{prompt.answer}}}", f"reference {prompt.answer}"


def _shown(prompt: Prompt, writer: PromptWriter | None, tokenizer: Any) -> str:
    """The prompt with every special token."""
    if writer is None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    made = _made(prompt, writer)
    return str(tokenizer.decode(list(made.token_ids), skip_special_tokens=False))


def _made(prompt: Prompt, writer: PromptWriter) -> Prompt:
    return writer.conversation(
        prompt.messages,
        id=prompt.id,
        answer=prompt.answer,
        source=prompt.source,
        columns=prompt.columns,
    )


def _length(prompt: Prompt, writer: PromptWriter | None) -> int:
    if writer is None:
        return sum(len(message["content"].encode()) for message in prompt.messages)
    return len(_made(prompt, writer).token_ids)


def _histogram(lengths: Sequence[int], unit: str, settings: DataConfig) -> Iterator[str]:
    counts, edges = np.histogram(lengths, bins=min(_BARS, max(1, len(set(lengths)))))
    yield (
        f"prompts have {min(lengths)} to {max(lengths)} {unit}, half of them up to"
        f" {int(np.median(lengths))} (data.max_prompt_length={settings.max_prompt_length} tokens)"
    )
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(_WIDTH * count / max(counts))
        yield f"{int(low):7} to {int(np.ceil(high)):7}  {count:6}  {bar}".rstrip()
