"""Rows with answers as examples for supervised learning: token ids and a mask of those learnt.

A sequence is what the model would have read and said: the template's prompt for a turn, the turn's
text, the token that ends it. Where the template shows earlier turns to a later one as they were
said, all of them are learnt in one sequence; where it does not (Qwen3 takes out the thinking of
earlier turns), each such turn is learnt in a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.data import DataConfig
from .layouts import given, lookup
from .mapping import BadRow, Mapper
from .messages import Message, read_messages
from .rows import Table, piece_rows, train_tables
from .table import order_of
from .templates import ASSISTANTS, PromptWriter, Tokenizer, end_token, supervised_ids

CONVERSATIONS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "output", "solution", "generation", "answer")
"""Columns of an answer where `solution_column` names none; the first that a row has."""
_TRIED = 64
"""Rows that go through the template before a run starts."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """A sequence of T tokens, and the mask of those that are learnt."""

    token_ids: tuple[int, ...]
    learnt: NDArray[np.bool_]
    """[T]"""


def examples_of(
    messages: Sequence[Message], writer: PromptWriter, tokenizer: Tokenizer, end: int
) -> list[Example]:
    """The assistant's answers in a conversation, each learnt once, in as few sequences as the
    template allows; the longest first. end: the token that ends an answer. Raises BadRow if there
    is no answer."""
    examples: list[Example] = []
    stop = len(messages)
    while stop:
        start = stop
        while start and messages[start - 1]["role"] in ASSISTANTS:
            start -= 1
        answer = "\n".join(message["content"] for message in messages[start:stop])
        if start and answer.strip():
            prompt = writer.conversation(messages[:start], id="", answer="", source="", columns={})
            ids = supervised_ids(prompt, answer, tokenizer, end)
            holder = next((each for each in examples if each.token_ids[: len(ids)] == ids), None)
            if holder is None:
                holder = Example(token_ids=ids, learnt=np.zeros(len(ids), bool))
                examples.append(holder)
            holder.learnt[len(prompt.token_ids) : len(ids)] = True
        stop = start if start < stop else stop - 1
    if not examples:
        raise BadRow("there is no answer of the assistant in it")
    return examples


class RowReader:
    """Converts the rows of one table to messages. Raises ValueError if no column is known to hold
    the prompt or the answer."""

    def __init__(self, settings: DataConfig, table: Table) -> None:
        head = table.head()
        self._settings = settings
        self._mapper = None
        self._talk = next((name for name in CONVERSATIONS if _answered(head[0].get(name))), None)
        if self._talk is None or settings.prompt_column is not None:
            self._talk = None
            # supervised learning grades nothing, so a table without references is fine
            free = {} if settings.answer_column else {"answer_column": ""}
            self._mapper = Mapper(settings.model_copy(update=free), head, table.key, table.where)
            columns = (settings.solution_column,) if settings.solution_column else ANSWERS
            self._answer = next(
                (name for name in columns if any(given(lookup(row, name)) for row in head)), None
            )
            if self._answer is None:
                raise ValueError(
                    f"{table.where!r} has neither messages of an assistant nor one of the columns"
                    f" {', '.join(columns)}, only {', '.join(head[0])}; set solution_column"
                )

    def __call__(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        """The row's messages, the answer last. Raises BadRow if it has none."""
        if self._mapper is None:
            try:
                talk = read_messages(row.get(self._talk or ""))
            except ValueError as error:
                raise BadRow(f"the column {self._talk!r} {error}") from None
            if isinstance(talk, str):
                raise BadRow(f"the column {self._talk!r} holds no messages")
            return talk
        mapped = self._mapper(row)
        asked = _messages(mapped.content, "user")
        value = lookup(row, self._answer or "")
        if not given(value):
            raise BadRow(f"no answer in the column {self._answer!r}")
        if self._settings.solution_column is not None:
            return (
                *asked,
                *_messages(self._mapper.solution(row, mapped.answer) or "", "assistant"),
            )
        return (*asked, *_messages(read_messages(value), "assistant"))


def check_rows(settings: DataConfig, table: Table) -> None:
    """Raises ValueError if most of a table's first rows cannot be learnt from."""
    reader, wrong = RowReader(settings, table), []
    rows = table.head(_TRIED)
    for row in rows:
        try:
            reader(row)
        except BadRow as error:
            wrong.append(error)
    if 2 * len(wrong) > len(rows):
        raise ValueError(
            f"{len(wrong)} of the first {len(rows)} rows of {table.where!r} cannot be learnt from:"
            f" {wrong[0]}"
        )


def _messages(said: str | Sequence[Message], role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": said},) if isinstance(said, str) else tuple(said)


def _answered(value: Any) -> bool:
    """Whether it is a conversation in which an assistant says something."""
    try:
        talk = read_messages(value)
    except ValueError:
        return False
    return not isinstance(talk, str) and any(turn["role"] in ASSISTANTS for turn in talk[1:])


class Demonstrations:
    """The rows of `sft.data`. Position i is row `order[i % size]` of epoch `i // size`, each epoch
    in an order of its own.

    limit: sequences of more tokens are left out. heldout: rows that are not trained on, chosen by a
    hash of their text and so the same for every seed.
    """

    def __init__(
        self, settings: DataConfig, tokenizer: Tokenizer, seed: int, *, limit: int, heldout: int
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._writer = PromptWriter(settings, tokenizer)
        self._end = end_token(tokenizer)
        rows: list[tuple[Message, ...]] = []
        read = 0
        example = ""
        for table in train_tables(settings):
            reader = RowReader(settings, table)
            for where, piece in table.pieces():
                for row in piece_rows(piece):
                    read += 1
                    try:
                        rows.append(reader(row))
                    except BadRow as error:
                        example = example or f"{where}, row {read}: {error}"
                        if settings.drop == "none":
                            raise ValueError(f"{example}; mend or remove the row") from None
        bad = read - len(rows)
        if 2 * bad > read:
            raise ValueError(f"{bad} of {read} rows cannot be learnt from: {example}")
        self.notes: list[str] = [f"{bad} of {read} rows left out: {example}"] if bad else []
        self._try(rows[:_TRIED])
        if heldout >= len(rows):
            raise ValueError(
                f"sft.heldout={heldout} leaves nothing to learn of the {len(rows)} rows; lower it"
            )
        rows.sort(key=_key)  # by hash: the same rows are held out whatever order they stand in
        self.heldout = [each for messages in rows[:heldout] for each in self._examples(messages)]
        if heldout and not self.heldout:
            raise ValueError(
                f"sft.heldout={heldout}: all of these rows have more than {self._limit} tokens, the"
                " longest prompt and answer; raise rollout.max_response_length"
            )
        self._rows = rows[heldout:]
        self._order = lru_cache(maxsize=2)(lambda epoch: order_of(len(self._rows), seed, epoch))

    def _try(self, rows: Sequence[Sequence[Message]]) -> None:
        """Raises ValueError if the template refuses the first rows, or none of them is short
        enough; adds a note if some are too long."""
        too_long = sum(not self._examples(messages) for messages in rows)
        said = (
            f"{too_long} of the first {len(rows)} rows have more than {self._limit} tokens, the"
            " longest prompt and answer"
        )
        if too_long == len(rows):
            raise ValueError(f"{said}; raise rollout.max_response_length")
        if too_long:
            self.notes.append(
                f"{said}: such rows teach nothing; rollout.max_response_length would have to be"
                " larger for them"
            )

    @property
    def size(self) -> int:
        return len(self._rows)

    def examples(self, position: int) -> list[Example]:
        """The sequences of the row at a position of the run; none if all are too long."""
        epoch, at = divmod(position, self.size)
        return self._examples(self._rows[int(self._order(epoch)[at])])

    def _examples(self, messages: Sequence[Message]) -> list[Example]:
        examples = examples_of(messages, self._writer, self._tokenizer, self._end)
        return [each for each in examples if len(each.token_ids) <= self._limit]


def _key(messages: Sequence[Message]) -> bytes:
    said = "\0".join(f"{message['role']}\0{message['content']}" for message in messages)
    return blake2b(said.encode(errors="surrogatepass"), digest_size=16).digest()
