"""Rows as problems: prompt, reference answer and columns, by the layout and the settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...rewards.math_answers.references import accepted
from ..config.data import DataConfig
from .columns import column, fields, fill
from .layouts import columns_text, given, lookup, spelled
from .messages import Message, read_messages, split_off_reply
from .reference_texts import (
    KEYS,
    final_answer,
    holds_tests,
    is_program,
    letter_of,
    options_of,
    plain,
    shows,
)
from .table_layout import require_column, table_layout

_ALTERNATIVES = frozenset(
    ("answers", "aliases", "spans", "text", "target", "targets", "truths")
)  # words in names: one of them will do
_SEEN = 64  # rows by which the layout is recognised


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """The content of a row: a question or messages, and a reference answer."""

    content: str | tuple[Message, ...]
    answer: str

    @property
    def text(self) -> str:
        """The text of all messages, for telling problems apart."""
        return (
            self.content
            if isinstance(self.content, str)
            else "\0".join(m["content"] for m in self.content)
        )


class BadRow(ValueError):
    """A row that cannot become a problem; the message gives the reason."""


class Mapper:
    """Finds prompt, answer and tests in the rows of one table. Raises ValueError, with the setting
    that is wrong, if their columns are not known.

    head: the first rows, by whose columns the layout is recognised. key, where: the setting that
    named the table and its name, for messages.
    """

    def __init__(
        self, settings: DataConfig, head: Sequence[Mapping[str, Any]], key: str, where: str
    ) -> None:
        self._settings = settings
        self._head = head[:_SEEN]
        self._where = where
        for name in fields(settings.prompt_template or ""):
            require_column("prompt_template", name, self._head, where)
        named = ("prompt_column", "answer_column", "tests_column", "solution_column")
        for option in named:
            if path := getattr(settings, option):
                require_column(option, path, self._head, where)
        self.layout = table_layout(settings, self._head, f"{key}={where!r}")
        explicit = settings.prompt_column is not None or settings.prompt_template is not None
        self._composed = not explicit and not self.layout.template
        self._stated = settings.answer_column is not None
        for name in fields(settings.prompt_template or ""):
            if self.layout.answer == (name,):
                raise ValueError(
                    f"data.prompt_template shows the model {{{name}}}, the reference answer; take"
                    f" it out, or write {{{{{name}}}}} if the braces are meant"
                )
        self._options = self._find_options()
        column = self.layout.answer[0] if self.layout.answer and not self.layout.options else ""
        if column in ("label", "labels") and not self._stated and self._zero_and_one(column):
            raise ValueError(
                f"{key}={where!r}: the column {column!r} holds 0 and 1, and nothing says what they"
                f" stand for, there is only {columns_text(self._head)}; set data.answer_column to a"
                f" column of words, or data.answer_column={column} if the numbers are the answers"
            )
        if not self._stated and self.task == "math" and self._all_answers(is_program):
            raise ValueError(
                f"{key}={where!r}: the column {self.layout.answer[0]!r} holds programs, and no"
                f" column is known to hold tests, there is only {columns_text(self._head)}; set"
                f" data.tests_column, or data.answer_column={self.layout.answer[0]} for a reward"
                " that compares programs"
            )

    def _zero_and_one(self, path: str) -> bool:
        return {str(lookup(row, path)) for row in self._head} == {"0", "1"}

    def _all_answers(self, kind: Callable[[Any], bool]) -> bool:
        """Whether the first rows have answers, and `kind` holds for all of them."""
        paths = [path for path in self.layout.answer if path != self.layout.prompt]
        values = [lookup(row, path) for path in paths for row in self._head]
        return any(given(value) for value in values) and all(
            kind(value) for value in values if given(value)
        )

    def _find_options(self) -> str:
        """The path of the choices to be added to prompts; "" if the prompts show them already."""
        path = self.layout.options if self._composed else ""
        if not path:
            return ""
        shown = [
            shows(lookup(row, self.layout.prompt), options_of(row, self.layout)[1])
            for row in self._head
        ]
        return "" if all(shown) else path

    @property
    def task(self) -> str:
        """The reward that fits: `code` for rows with tests, `gym` for those that only
        reasoning-gym's rule can grade, else `math`."""
        if self.layout.tests or self._all_answers(holds_tests):
            return "code"
        return "gym" if self.layout.metadata else "math"

    def describe(self) -> str:
        """A line on the layout, for the start of a run."""
        layout, settings = self.layout, self._settings
        prompt = (
            "data.prompt_template" if settings.prompt_template else layout.prompt or "a template"
        )
        parts = [
            "prompt"
            f" {'+'.join((*layout.before, prompt, *layout.after)) if self._composed else prompt}"
        ]
        if self._options:
            parts.append(f"choices {self._options}")
        if layout.tests:
            parts.append(f"tests {'+'.join(layout.tests)}")
        else:
            parts.append(f"answer {'+'.join(layout.answer) or 'none'}")
        if layout.system:
            parts.append(f"system {layout.system}")
        if settings.final_answer == "cut" and any(
            _replied(lookup(row, layout.prompt)) for row in self._head
        ):
            parts.append("the assistant's last words left out: data.final_answer")
        return f"{self._where}: layout {layout.name} ({', '.join(parts)})"

    @property
    def needed(self) -> set[str]:
        """The columns that a prompt and an answer are made of."""
        layout = self.layout
        paths = [
            *layout.answer,
            *layout.before,
            *layout.after,
            *layout.starter,
            layout.prompt,
            layout.system,
        ]
        paths += [
            *layout.options.split("|"),
            *fields(layout.template),
            *fields(self._settings.prompt_template or ""),
        ]
        paths += [
            path for tests in layout.tests for path in tests.split("|") if len(layout.tests) == 1
        ]
        columns = {column for row in self._head for column in row}
        return {path if path in columns else path.split(".")[0] for path in paths if path}

    def __call__(self, row: Mapping[str, Any]) -> Mapped:
        """The row's prompt and answer. Raises BadRow if it lacks one."""
        content = self._content(row)
        answer = self._answer(row)
        if isinstance(content, str):
            if not content.strip():
                raise BadRow(f"the column {self.layout.prompt!r} (data.prompt_column) is empty")
        else:
            asked, reply = split_off_reply(content)
            if not any(
                message["content"].strip() for message in asked if message["role"] != "system"
            ):
                raise BadRow(
                    f"the column {self.layout.prompt!r} (data.prompt_column) has no question"
                )
            replies = self.layout.answer == (self.layout.prompt,)
            if replies or self._settings.final_answer == "cut":
                content = asked
            if replies:
                answer = final_answer(reply.strip())
                if not answer:
                    raise BadRow(
                        f"no answer in the column {self.layout.prompt!r}: no reply ends it"
                    )
        system = lookup(row, self.layout.system) if self.layout.system else None
        if isinstance(system, str) and system.strip():
            turns = ({"role": "user", "content": content},) if isinstance(content, str) else content
            content = (
                turns
                if turns[0]["role"] == "system"
                else ({"role": "system", "content": system}, *turns)
            )
        return Mapped(content=content, answer=answer)

    def columns(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row's columns, with tests and metadata also where the rewards look for them."""
        layout = self.layout
        more: dict[str, Any] = {}
        if len(layout.tests) == 1 and "|" in layout.tests[0]:
            names = dict(zip(("inputs", "outputs"), layout.tests[0].split("|"), strict=True))
            more["tests"] = {key: _list_of(lookup(row, path)) for key, path in names.items()}
            if name := row.get("fn_name") or row.get("func_name"):
                more["tests"]["fn_name"] = name
        elif layout.tests:
            tests = _list_of(lookup(row, layout.tests[0]))
            asserts = isinstance(tests, Sequence) and not isinstance(tests, str)
            if asserts and tests and all("assert" in str(test) for test in tests):
                more["test_list"] = tests
            elif layout.tests[0] not in _KNOWN_TESTS:
                more["tests"] = tests
        elif layout.answer and (test := lookup(row, f"{layout.answer[0]}.functional")):  # code-r1
            more["tests"] = test
        elif layout.answer and (test := lookup(row, f"{layout.answer[0]}.test_code")):  # Skywork
            prefix, entry = (
                str(lookup(row, f"{layout.answer[0]}.{key}") or "")
                for key in ("import_prefix", "entry_point")
            )
            more |= {"test": f"{prefix}\n{test}", "entry_point": entry}
        if layout.metadata:
            more["metadata"] = {
                "source_dataset": "countdown",
                **{key: lookup(row, path) for key, path in layout.metadata},
            }
        return {**row, **more} if more else row

    def solution(self, row: Mapping[str, Any], answer: str) -> str | None:
        if self._settings.solution_column is None:
            return None
        value = lookup(row, self._settings.solution_column)
        return (
            None
            if not value
            else fill(self._settings.solution_template, {"solution": value, "answer": answer})
        )

    def _content(self, row: Mapping[str, Any]) -> str | tuple[Message, ...]:
        try:
            if template := self._settings.prompt_template or self.layout.template:
                return self._filled(template, row)
        except KeyError as error:
            raise BadRow(error.args[0]) from None
        value = lookup(row, self.layout.prompt)
        if value is None:
            raise BadRow(f"the column {self.layout.prompt!r} (data.prompt_column) is empty")
        try:
            content = read_messages(value)
        except ValueError as error:
            raise BadRow(
                f"the column {self.layout.prompt!r} (data.prompt_column) {error}"
            ) from None
        return (
            self._compose(content, row) if isinstance(content, str) and self._composed else content
        )

    def _filled(self, template: str, row: Mapping[str, Any]) -> str:
        """The template filled with the row. Raises BadRow if all its columns are empty, or one
        holds a mapping."""
        values = {name: column(row, name) for name in fields(template)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                raise BadRow(
                    f"the column {name!r} of the template holds a mapping of"
                    f" {', '.join(map(str, value))}; name one of these, as {name}.KEY"
                )
        if values and not any(map(given, values.values())):
            raise BadRow(f"the columns {', '.join(values)} of the template are empty")
        return fill(template, row)

    def _compose(self, prompt: str, row: Mapping[str, Any]) -> str:
        """The prompt with its passage, input, choices, signature and first assertion."""
        layout = self.layout
        parts = [plain(lookup(row, path)) for path in layout.before]
        parts = [part for part in parts if part and part not in prompt] + [prompt]
        for path in layout.after:
            if text := plain(lookup(row, path)):
                parts.append(
                    text
                    if path in ("input", "输入")
                    else f"{path.replace('_', ' ').capitalize()}:\n{text}"
                )
        if self._options:
            labels, texts = options_of(row, layout)
            parts.append(
                "\n".join(f"{a}. {b}" if a else b for a, b in zip(labels, texts, strict=True))
            )
        elif layout.answer and isinstance(lookup(row, layout.answer[0]), bool):
            parts.append("Answer yes or no.")
        for path in layout.starter:
            if (text := plain(lookup(row, path))) and text.strip() not in prompt:
                parts.append(f"Use this signature:\n```python\n{text.strip()}\n```")
        if layout.tests and (shown := _first_assertion(lookup(row, layout.tests[0]), prompt)):
            parts.append(f"Your code should pass this test:\n{shown}")
        return "\n\n".join(parts)

    def _answer(self, row: Mapping[str, Any]) -> str:
        if not self.layout.answer:
            return ""
        path = self.layout.answer[0]
        value = lookup(row, path)
        if not given(value):
            raise BadRow(f"no answer in the column {path!r} (data.answer_column)")
        if self.layout.options:
            return letter_of(value, *options_of(row, self.layout), self.layout.first)
        text = self._text(value, path)
        pattern = self._settings.answer_pattern
        if pattern is None:
            return text if self._stated else final_answer(text)
        matches = list(re.finditer(pattern, text))
        if not matches or not matches[-1].group(1):
            raise BadRow(
                f"data.answer_pattern={pattern!r} finds nothing in the column {path!r}:"
                f" {text[-80:]!r}"
            )
        return str(matches[-1].group(1)).strip()

    def _text(self, value: Any, path: str) -> str:
        """An answer as text: text as it is, the one item of a list, the answer within a mapping,
        else JSON."""
        several = bool(_ALTERNATIVES & set(path.rsplit(".", 1)[-1].lower().split("_")))
        if several and not self._stated:
            value = _list_of(value)
        unwrapped = spelled(value) if isinstance(value, str) and not self._stated else value
        if isinstance(unwrapped, Mapping) and set(unwrapped) & {*KEYS}:
            value = unwrapped
        if isinstance(value, str):
            return value.strip()
        if isinstance(value, bool) and not self._stated:
            return "yes" if value else "no"
        if isinstance(value, Mapping) and "inputs" not in value:
            inner = [key for key in KEYS if given(value.get(key))]
            if inner:
                return self._text(value[inner[0]], inner[0])
        if isinstance(value, Sequence) and value and (len(value) == 1 or several):
            listed = json.dumps(value, ensure_ascii=False, default=str)
            return listed if len(accepted(listed)) > 1 else self._text(value[0], path)
        return json.dumps(value, ensure_ascii=False, default=str)


_KNOWN_TESTS = frozenset(
    (
        "tests",
        "test",
        "test_list",
        "test_cases",
        "input_output",
        "verification_info",
        "public_test_cases",
        "private_test_cases",
        "official_tests",
        "public_tests",
        "private_tests",
        "generated_tests",
    )
)
"""Columns in which the code reward looks for tests by itself."""


def _first_assertion(tests: Any, prompt: str) -> str:
    """The first of a list of assertions, if the prompt does not name the function that it calls;
    else ""."""
    if (
        not isinstance(tests, Sequence)
        or isinstance(tests, str)
        or not tests
        or not isinstance(tests[0], str)
    ):
        return ""
    names = re.findall(r"\b([A-Za-z_]\w*)\s*\(", tests[0].partition("assert")[2])
    return "" if not names or any(name in prompt for name in names) else tests[0]


def _replied(prompt: Any) -> bool:
    """Whether a prompt is a conversation that ends with a message of the assistant."""
    try:
        turns = read_messages(prompt)
    except ValueError:
        return False
    return not isinstance(turns, str) and turns[-1]["role"] == "assistant"


def _list_of(value: Any) -> Any:
    """The list that a text spells; any other value unchanged."""
    return spelled(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
