"""A data set as a source of prompts: columns mapped, held-out problems kept apart, an order for each epoch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .rows import Table, is_file, read_eval, read_train
from .templates import PromptWriter, Tokenizer, column, fields, fill

GROUND_TRUTH = "reward_model.ground_truth"
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mapped:
    """What a row says: a question or messages, and a reference answer."""

    content: str | Messages
    answer: str


class Mapper:
    """Finds prompt, answer and solution in the rows of one table; ValueError names the setting that is wrong."""

    def __init__(self, settings: DataConfig, table: Table) -> None:
        self._settings = settings
        self._table = table
        self.prompt = settings.prompt_column or "prompt"
        has_truth = "reward_model" in table.columns
        self.answer = settings.answer_column
        if self.answer is None:
            self.answer = GROUND_TRUTH if has_truth else "answer"
        if settings.prompt_column is not None or settings.prompt_template is None:
            self._require("prompt_column", self.prompt)
        for name in fields(settings.prompt_template or ""):
            self._require("prompt_template", name)
            if name == self.answer:
                raise ValueError(
                    f"data.prompt_template shows the model {{{name}}}, the reference answer; take it out, or write "
                    f"{{{{{name}}}}} if the braces are meant"
                )
        if self.answer:
            self._require("answer_column", self.answer)
        if settings.solution_column is not None:
            self._require("solution_column", settings.solution_column)

    def _require(self, key: str, name: str) -> None:
        try:
            column(self._table.rows[0], name)
        except KeyError as error:
            raise ValueError(f"data.{key}={name!r}: in {self._table.where!r} {error.args[0]}") from None

    def __call__(self, number: int) -> _Mapped:
        """The row with this number, counted from 0."""
        row = self._table.rows[number]
        try:
            return _Mapped(content=self._content(row), answer=self._answer(row))
        except ValueError as error:
            raise ValueError(f"{self._table.key}={self._table.where!r}, row {number + 1}: {error}") from None
        except KeyError as error:
            raise ValueError(f"{self._table.key}={self._table.where!r}, row {number + 1}: {error.args[0]}") from None

    def _content(self, row: Mapping[str, Any]) -> str | Messages:
        if self._settings.prompt_template is not None:
            return fill(self._settings.prompt_template, row)
        content = column(row, self.prompt)
        if isinstance(content, str):
            if not content.strip():
                raise ValueError(f"the column {self.prompt!r} (data.prompt_column) is empty; remove the row")
            return content
        ok = isinstance(content, Sequence) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in content
        )
        if not content or not ok:
            raise ValueError(
                f"the column {self.prompt!r} (data.prompt_column) must be text or a list of messages with role and "
                f"content, got {content!r:.80}"
            )
        return tuple({"role": m["role"], "content": m["content"]} for m in content)

    def _answer(self, row: Mapping[str, Any]) -> str:
        if not self.answer:
            return ""
        value = column(row, self.answer)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"no answer in the column {self.answer!r} (data.answer_column); fill it or remove the row")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if self._settings.answer_pattern is None:
            return text.strip()
        found = list(re.finditer(self._settings.answer_pattern, text))
        if not found or not found[-1].group(1):
            raise ValueError(
                f"data.answer_pattern={self._settings.answer_pattern!r} finds nothing in the column {self.answer!r}: "
                f"{text[-80:]!r}"
            )
        return str(found[-1].group(1)).strip()

    def solution(self, row: Mapping[str, Any], answer: str) -> str | None:
        if self._settings.solution_column is None:
            return None
        value = column(row, self._settings.solution_column)
        return None if not value else fill(self._settings.solution_template, {"solution": value, "answer": answer})


def check_rows(settings: DataConfig) -> None:
    """Reads the files and maps every row, without a tokenizer; ValueError for the first thing that is wrong.

    Data sets of the Hub are only looked at when they are opened, since that may download them.
    """
    local = is_file(settings.source)
    evaluation = read_eval(settings) if local or settings.eval_path is not None else None
    for table in ([read_train(settings)] if local else []) + ([evaluation] if evaluation is not None else []):
        mapper = Mapper(settings, table)
        for number in range(len(table.rows)):
            mapper(number)


class TableSource:
    """The problems of a data set. Position i is row `order[i % size]` of epoch `i // size`, each epoch in an order of
    its own."""

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.name = settings.name or _short_name(settings.source)
        self._settings = settings
        self._writer = PromptWriter(settings, tokenizer)
        self._table = read_train(settings)
        self._mapper = Mapper(settings, self._table)
        evaluation = read_eval(settings)
        notes: list[str] = []
        keys = self._keys(self._table, self._mapper, notes)
        if evaluation is None:
            held_rows = _split_off(keys, settings, self._table)
            held_table, held_mapper = self._table, self._mapper
            held_keys = {keys[number] for number in held_rows}
        else:
            held_table, held_mapper = evaluation, Mapper(settings, evaluation)
            by_row = self._keys(evaluation, held_mapper, notes)
            held_rows, held_keys = list(by_row), set(by_row.values())
        self._rows = [number for number, key in keys.items() if key not in held_keys]
        notes += self._writer.notes
        dropped = len(keys) - len(self._rows) - (len(held_rows) if evaluation is None else 0)
        if dropped:
            notes.append(f"{dropped} rows of {self._table.where} left out of training: they are held-out problems too")
        if not self._rows:
            raise ValueError(
                f"data.source={settings.source!r}: every row is held out or too long; none is left to train on"
            )
        self.size = len(self._rows)
        self.notes: Sequence[str] = tuple(notes)
        self.heldout: Sequence[Prompt] = [
            self._prompt(held_table, held_mapper, number, f"{self.name}/heldout/{number}") for number in held_rows
        ]
        self._order = lru_cache(maxsize=2)(lambda epoch: _order(self.size, seed, epoch))

    def train(self, i: int) -> Prompt:
        epoch, at = divmod(i, self.size)
        number = self._rows[int(self._order(epoch)[at])]
        # Two epochs can meet within one step, and ids must not.
        name = f"{self.name}/{number}" + (f"@{epoch}" if epoch else "")
        return self._prompt(self._table, self._mapper, number, name)

    def leave_out(self, ids: Set[str]) -> None:
        """Drops problems by their ids, those of training as in the first epoch. Call it before the first problem is used."""
        self._rows = [number for number in self._rows if f"{self.name}/{number}" not in ids]
        self.size = len(self._rows)
        self._order.cache_clear()  # orders of as many rows as there were
        self.heldout = [prompt for prompt in self.heldout if prompt.id not in ids]

    def solution(self, prompt: Prompt) -> str | None:
        return self._mapper.solution(prompt.columns, prompt.answer)

    def _prompt(self, table: Table, mapper: Mapper, number: int, name: str) -> Prompt:
        mapped, row = mapper(number), table.rows[number]
        source = row.get("data_source")
        messages = ({"role": "user", "content": mapped.content},) if isinstance(mapped.content, str) else mapped.content
        return self._writer.conversation(
            messages,
            id=name,
            answer=mapped.answer,
            source=source if isinstance(source, str) and source and not self._settings.name else self.name,
            columns=row,
        )

    def _keys(self, table: Table, mapper: Mapper, notes: list[str]) -> dict[int, bytes]:
        """A hash of the prompt of every row that is short enough; raises or counts where one is not."""
        keys, too_long = {}, 0
        for number in range(len(table.rows)):
            prompt = self._prompt(table, mapper, number, "")
            if self._writer.fits(prompt):
                text = "\0".join(message["content"].strip() for message in prompt.messages)
                keys[number] = blake2b(text.encode(), digest_size=16).digest()
            elif self._settings.overlong == "drop":
                too_long += 1
            else:
                what = f"{table.key}={table.where!r}, row {number + 1}: the prompt"
                raise ValueError(self._writer.too_long(what, len(prompt.token_ids)))
        if too_long:
            limit = self._settings.max_prompt_length
            notes.append(f"{too_long} of {len(table.rows)} rows of {table.where} dropped: more than {limit} tokens")
        return keys


def _split_off(keys: Mapping[int, bytes], settings: DataConfig, table: Table) -> list[int]:
    """The first rows of the `data.heldout` problems whose hashes are the smallest."""
    first: dict[bytes, int] = {}
    for number, key in keys.items():
        first.setdefault(key, number)
    if settings.heldout >= max(1, len(first)):
        raise ValueError(
            f"data.heldout={settings.heldout} leaves nothing to train on of the {len(first)} problems in {table.where!r}; "
            "lower it, or name a held-out set in data.eval_path"
        )
    return sorted(first[key] for key in sorted(first)[: settings.heldout])


def _order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _short_name(source: str) -> str:
    return Path(source).stem if is_file(source) else source.rstrip("/").rsplit("/", 1)[-1]


__all__ = ["Mapper", "TableSource", "check_rows"]
