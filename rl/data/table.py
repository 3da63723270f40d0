"""Data sets as a source of prompts: tables read and folded, held-out problems kept apart, an order
for each epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .mapping import Mapper
from .prepared import Prepared, prepare
from .rows import HEAD, Table, eval_tables, train_tables
from .templates import PromptWriter, Tokenizer

_SLACK = 8
"""Tokens that a template may add beyond what it adds to the shortest prompt."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """One table with its problems; `kept` are the indices of those that fit."""

    table: Table
    mapper: Mapper
    problems: Prepared
    kept: NDArray[np.int64]
    name: str
    prefix: str
    """The beginning of ids: the name, with a number if an earlier table has the same."""


class TableSource:
    """The problems of data sets. Position i is problem `order[i % size]` of epoch `i // size`, each
    epoch in an order of its own."""

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._settings = settings
        self._writer = PromptWriter(settings, tokenizer)
        self._frame = _frame(self._writer)
        self._notes: list[str] = []
        self._names: Counter[str] = Counter()
        parts = [self._part(table) for table in train_tables(settings)]
        tables = eval_tables(settings)
        held = None if tables is None else [self._part(table) for table in tables]
        self.name = settings.name or "+".join(dict.fromkeys(part.name for part in parts))
        self._parts = parts
        if held is None:
            self._held_parts = parts
            held_keys = _chosen(parts, settings)
            held_rows = _first_with(parts, held_keys)
        else:
            self._held_parts = held
            held_keys = {key for part in held for key in _keys(part)}
            held_rows = [(at, int(index)) for at, part in enumerate(held) for index in part.kept]
        self._rows = [
            (at, int(index))
            for at, part in enumerate(parts)
            for index, key in zip(part.kept, _keys(part), strict=True)
            if key not in held_keys
        ]
        kept = sum(len(part.kept) for part in parts)
        leaked = kept - len(self._rows) - (len(held_rows) if held is None else 0)
        if leaked:
            where = parts[0].table.where if len(parts) == 1 else "the data"
            self._notes.append(
                f"{leaked} rows of {where} left out of training: they are held-out problems too"
            )
        if not self._rows:
            raise ValueError(
                f"data.source={settings.source!r}: every row is held out or too long; none is left"
                " to train on"
            )
        if held is None and 3 * settings.heldout > kept:
            self._notes.append(heldout_note(settings, kept))
        self.heldout: Sequence[Prompt] = [
            self._prompt(self._held_parts, row, heldout=True) for row in held_rows
        ]
        self._order = lru_cache(maxsize=2)(lambda epoch: order_of(len(self._rows), seed, epoch))
        self.notes: Sequence[str] = tuple(self._notes)

    @property
    def size(self) -> int:
        return len(self._rows)

    def train(self, i: int) -> Prompt:
        epoch, at = divmod(i, self.size)
        # one step can hold the end of an epoch and the beginning of the next, and ids must differ
        return self._prompt(
            self._parts,
            self._rows[int(self._order(epoch)[at])],
            suffix=f"@{epoch}" if epoch else "",
        )

    def column(self, name: str) -> list[Any]:
        """The values of a column, in the order of the first epoch; None where a row has no such
        column."""
        places = (self._rows[int(at)] for at in self._order(0))
        return [self._parts[part].problems.rows[index].get(name) for part, index in places]

    def examples(self) -> Iterator[Prompt]:
        """Every problem once, those of training first, in the order of the data and without token
        ids."""
        wanted: dict[int, set[int]] = {}
        for at, index in self._rows:
            wanted.setdefault(at, set()).add(index)
        for at, part in enumerate(self._parts):
            for index, row in enumerate(part.problems.rows if at in wanted else ()):
                if index in wanted[at]:
                    yield self._bare(part, index, row, self._id(part, index))
        yield from self.heldout

    def leave_out(self, ids: Set[str]) -> None:
        """Drops problems by their ids (of training problems, the ids of the first epoch). Call it
        before the first problem is used."""
        self._rows = [row for row in self._rows if self._id(self._parts[row[0]], row[1]) not in ids]
        self._order.cache_clear()  # they were permutations of the old number of rows
        self.heldout = [prompt for prompt in self.heldout if prompt.id not in ids]

    def solution(self, prompt: Prompt) -> str | None:
        return self._parts[0].mapper.solution(prompt.columns, prompt.answer)

    def _part(self, table: Table) -> _Part:
        """Reads a table. Prompts that are too long raise ValueError, or are dropped and counted, by
        `data.overlong`."""
        settings, notes = self._settings, self._notes
        mapper = Mapper(settings, table.head(), table.key, table.where)
        problems = prepare(table, mapper, settings)
        counts = problems.counts
        notes.append(mapper.describe())
        if counts.bad:
            notes.append(
                f"{counts.bad} of {counts.read} rows of {table.where} left out: {counts.example}"
            )
        if counts.folded:
            notes.append(
                f"{counts.read - counts.bad} rows of {table.where} hold {len(problems.rows)}"
                " problems; each counts once"
            )
        name = settings.name or table.name
        self._names[name] += 1
        prefix = name if self._names[name] == 1 else f"{name}-{self._names[name]}"
        part = _Part(
            table=table,
            mapper=mapper,
            problems=problems,
            kept=np.arange(len(problems.rows)),
            name=name,
            prefix=prefix,
        )
        # a token has a byte or more: a prompt of few bytes fits and need not be tokenised
        surely = (problems.turns <= 2) & (
            problems.sizes + self._frame <= settings.max_prompt_length
        )
        kept = []
        for index in part.kept:
            prompt = None if surely[index] else self._prompt([part], (0, int(index)))
            if prompt is None or self._writer.fits(prompt):
                kept.append(index)
            elif settings.overlong == "error":
                what = f"{table.key}={table.where!r}, row {problems.numbers[index] + 1}: the prompt"
                raise ValueError(self._writer.too_long(what, len(prompt.token_ids)))
        if dropped := len(part.kept) - len(kept):
            limit = settings.max_prompt_length
            notes.append(
                f"{dropped} of {len(part.kept)} rows of {table.where} dropped: more than {limit}"
                " tokens"
            )
        return replace(part, kept=np.array(kept, np.int64))

    def _id(self, part: _Part, index: int, heldout: bool = False) -> str:
        return f"{part.prefix}{'/heldout' if heldout else ''}/{part.problems.numbers[index]}"

    def _prompt(
        self,
        parts: Sequence[_Part],
        row: tuple[int, int],
        *,
        heldout: bool = False,
        suffix: str = "",
    ) -> Prompt:
        part, index = parts[row[0]], row[1]
        bare = self._bare(
            part, index, part.problems.rows[index], self._id(part, index, heldout) + suffix
        )
        return self._writer.conversation(
            bare.messages, id=bare.id, answer=bare.answer, source=bare.source, columns=bare.columns
        )

    def _bare(self, part: _Part, index: int, row: Mapping[str, Any], name: str) -> Prompt:
        return bare_prompt(part.mapper, row, name, self._settings.name, part.name)


def bare_prompt(
    mapper: Mapper, row: Mapping[str, Any], id: str, own_name: str | None, table_name: str
) -> Prompt:
    """A row as a prompt that is not yet tokenised."""
    mapped, columns = mapper(row), mapper.columns(row)
    source = row.get("data_source")
    content = mapped.content
    return Prompt(
        id=id,
        token_ids=(),
        messages=({"role": "user", "content": content},) if isinstance(content, str) else content,
        answer=mapped.answer,
        source=source if isinstance(source, str) and source and not own_name else table_name,
        columns=columns,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """A table with its first rows as problems."""

    table: Table
    mapper: Mapper
    problems: Prepared
    whole: bool
    """Whether these are all of its rows."""

    def prompts(self, name: str | None = None) -> Iterator[Prompt]:
        """The problems as prompts without token ids."""
        for number, row in zip(self.problems.numbers, self.problems.rows, strict=True):
            yield bare_prompt(
                self.mapper, row, f"{self.table.name}/{number}", name, self.table.name
            )


def read_head(settings: DataConfig, table: Table) -> Head:
    """The first rows of a table as problems. Raises ValueError as for a whole table."""
    rows = table.head()
    mapper = Mapper(settings, rows, table.key, table.where)
    named = str(table.files[0]) if table.files else table.where
    first = replace(table, files=(), pieces=lambda: iter([(named, rows)]))
    whole = len(rows) < HEAD or table.rows == len(rows)
    return Head(table=table, mapper=mapper, problems=prepare(first, mapper, settings), whole=whole)


def heldout_note(settings: DataConfig, problems: int) -> str:
    share = 100 * settings.heldout // problems
    return (
        f"data.heldout={settings.heldout} takes {share} % of {problems} problems out of training;"
        " lower it, or name a held-out set in data.eval_path"
    )


def _frame(writer: PromptWriter) -> int:
    """The most tokens that template and system prompt add to a prompt of one or two messages."""
    longest = 0
    for messages in (
        ({"role": "user", "content": "x"},),
        ({"role": "system", "content": "x"}, {"role": "user", "content": "x"}),
    ):
        try:
            prompt = writer.conversation(messages, id="", answer="", source="", columns={})
        except ValueError:  # a template without a system role: rows that have one say so themselves
            continue
        longest = max(longest, len(prompt.token_ids) + _SLACK)
    return longest


def _keys(part: _Part) -> list[bytes]:
    return [part.problems.keys[index].tobytes() for index in part.kept]


def _chosen(parts: Sequence[_Part], settings: DataConfig) -> set[bytes]:
    """The keys of the `data.heldout` problems whose hashes are the smallest."""
    keys = {key for part in parts for key in _keys(part)}
    if settings.heldout >= max(1, len(keys)):
        where = parts[0].table.where if len(parts) == 1 else "the data"
        raise ValueError(
            f"data.heldout={settings.heldout} leaves nothing to train on of the {len(keys)}"
            f" problems in {where!r}; lower it, or name a held-out set in data.eval_path"
        )
    return set(sorted(keys)[: settings.heldout])


def _first_with(parts: Sequence[_Part], keys: Set[bytes]) -> list[tuple[int, int]]:
    """(part, index) of the first row of each of these problems."""
    places: list[tuple[int, int]] = []
    left = set(keys)
    for at, part in enumerate(parts):
        for index, key in zip(part.kept, _keys(part), strict=True):
            if key in left:
                left.remove(key)
                places.append((at, int(index)))
    return places


def order_of(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[size] int64, the order of the rows in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)
