"""A table of the layouts of public data sets: the paths of prompt, answer and tests in their rows.

A path such as `reward_model.ground_truth` or `conversations.-1.value` goes into mappings, lists and
JSON texts of them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = Mapping[str, Any]
TRUTH = "reward_model.ground_truth"
_LONGEST_LITERAL = 100_000  # characters; Python reads a literal slowly


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The paths of a row's parts. Of alternatives, the first that the rows have is taken."""

    name: str
    has: tuple[str, ...] = ()
    """Paths that every row has; the layout is recognised by them."""
    where: tuple[tuple[str, str], ...] = ()
    """Paths and the regular expression that the first row's values there match."""
    prompt: str = ""
    template: str = ""
    """Makes the prompt if no column holds it: `{name}` stands for a path."""
    answer: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    """Paths of tests: a row with one of them asks for a program."""
    before: tuple[str, ...] = ()
    """Columns put before a text prompt: a passage, a story."""
    after: tuple[str, ...] = ()
    """Columns put behind it: an instruction's input, a contest problem's formats."""
    options: str = ""
    """The choices of a multiple-choice question: a path, or several with `|` between; the answer
    becomes a letter. If the answer is one of several paths, a hash shuffles the choices."""
    first: int = 0
    """The number of the first choice, if answers are numbers of choices."""
    starter: tuple[str, ...] = ()
    """The signature that a program is to have."""
    system: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    """Keys that the `gym` reward needs in the column `metadata`, and the paths that they come
    from."""


STARTER = ("starter_code", "test_info.0.function_declaration")
_PUZZLE = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic"
    " arithmetic operations (+, -, *, /) and each number exactly once. Return the final equation in"
    " <answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."
)

# The first that fits is recognised, so special ones stand before general ones: dapo before verl.
LAYOUTS: tuple[Layout, ...] = (
    # verl's frame with contents of their own
    Layout(
        name="countdown",
        has=("prompt", f"{TRUTH}.target", f"{TRUTH}.numbers"),
        prompt="prompt",
        answer=(f"{TRUTH}.target",),
        metadata=(("target", f"{TRUTH}.target"), ("numbers", f"{TRUTH}.numbers")),
    ),
    Layout(
        name="logic_rl",
        has=("prompt", f"{TRUTH}.solution_text_format"),
        prompt="prompt",
        answer=(TRUTH,),
    ),
    Layout(
        name="dapo",
        has=("prompt", TRUTH),
        where=(("data_source", "math_dapo"),),
        prompt="prompt",
        answer=(TRUTH,),
    ),
    Layout(
        name="eurus",
        has=("prompt", "ability", TRUTH),
        prompt="prompt",
        answer=(TRUTH,),
        where=(("data_source", r"numina|taco|apps|code_?contests|codeforces"),),
    ),
    Layout(name="simplerl", has=("prompt", TRUTH, "gt_answer"), prompt="prompt", answer=(TRUTH,)),
    Layout(
        name="simplerl", has=("question", "gt_answer"), prompt="question", answer=("gt_answer",)
    ),
    Layout(name="verl", has=("prompt", TRUTH), prompt="prompt", answer=(TRUTH,)),
    # puzzles
    Layout(
        name="logic_rl", has=("quiz", "solution_text"), prompt="quiz", answer=("solution_text",)
    ),
    Layout(
        name="countdown",
        has=("nums", "target"),
        template=_PUZZLE,
        answer=("target",),
        metadata=(("target", "target"), ("numbers", "nums")),
    ),
    # programs
    Layout(
        name="livecodebench",
        has=("question_content", "public_test_cases"),
        prompt="question_content",
        tests=("private_test_cases", "public_test_cases"),
        starter=STARTER,
    ),
    Layout(name="leetcode", has=("query", "entry_point", "test"), prompt="query", tests=("test",)),
    Layout(
        name="kodcode",
        has=("question", "test", "test_info"),
        prompt="question",
        tests=("test",),
        starter=STARTER,
    ),
    Layout(
        name="acecode",
        has=("question", "test_cases", "inferences"),
        prompt="question",
        tests=("test_cases",),
    ),
    Layout(
        name="taco",
        has=("question", "input_output", "skill_types"),
        prompt="question",
        tests=("input_output",),
        starter=STARTER,
    ),
    Layout(
        name="apps",
        has=("question", "input_output", "solutions"),
        prompt="question",
        tests=("input_output",),
        starter=STARTER,
    ),
    Layout(
        name="deepcoder",
        has=("problem", "tests"),
        prompt="problem",
        tests=("tests",),
        starter=STARTER,
    ),
    # mathematics
    Layout(
        name="orz",
        has=("conversations.0.value", "conversations.-1.ground_truth.value"),
        prompt="conversations",
        answer=("conversations.-1.ground_truth.value",),
    ),
    Layout(
        name="openr1",
        has=("problem", "answer", "generations"),
        prompt="problem",
        answer=("answer",),
    ),
    Layout(
        name="big_math",
        has=("problem", "answer", "llama8b_solve_rate"),
        prompt="problem",
        answer=("answer",),
    ),
    Layout(
        name="big_math",
        has=("problem", "answer", "domain", "source"),
        prompt="problem",
        answer=("answer",),
    ),
    Layout(
        name="numina",
        has=("problem", "solution", "problem_type"),
        prompt="problem",
        answer=("answer",),
    ),
    Layout(
        name="numina",
        has=("problem", "solution", "messages"),
        prompt="problem",
        answer=("solution",),
    ),
    Layout(
        name="math",
        has=("problem", "solution", "level"),
        prompt="problem",
        answer=("answer", "solution"),
    ),
    Layout(
        name="deepscaler",
        has=("problem", "answer", "solution"),
        prompt="problem",
        answer=("answer",),
    ),
    Layout(
        name="gsm8k",
        has=("question", "answer"),
        where=(("answer", r"####"),),
        prompt="question",
        answer=("answer",),
    ),
    # frames
    Layout(name="openrlhf", has=("input", "label"), prompt="input", answer=("label",)),
    Layout(
        name="openrlhf",
        has=("context_messages", "label"),
        prompt="context_messages",
        answer=("label",),
    ),
    Layout(
        name="openrlhf",
        has=("context_messages", "answer"),
        prompt="context_messages",
        answer=("answer",),
    ),
    Layout(
        name="trl",
        has=("prompt",),
        prompt="prompt",
        answer=("ground_truth", "answer", "solution", "label", "target", "completion"),
    ),
    Layout(
        name="sharegpt",
        has=("conversations.0.from", "conversations.0.value"),
        prompt="conversations",
        answer=("ground_truth", "answer", "label", "solution", "conversations"),
        system="system",
    ),
)
NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))


def lookup(row: Any, path: str) -> Any:
    """The value at a path; None if there is none."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        value = opened(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and re.fullmatch(r"-?\d+", part)
        ):
            at = int(part)
            if not -len(value) <= at < len(value):
                return None
            value = value[at]
        else:
            return None
    return value


def spelled(text: str) -> Any:
    """The list or mapping that a text spells as JSON or as Python prints it; else the text."""
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip()) if len(text) < _LONGEST_LITERAL else text
        # the last two are what literal_eval raises for deep nesting
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text


def given(value: Any) -> bool:
    """Whether a value holds anything: no null, NaN, blank text, or container of such."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(given(each) for each in value.values())
    return (
        value is not None
        and not (isinstance(value, Sequence) and len(value) == 0)
        and value == value
    )


def by_name(name: str, head: Sequence[Row]) -> Layout:
    """The layout of that name whose columns the rows have. Raises ValueError, with the columns that
    it needs, if there is none."""
    layouts = [layout for layout in LAYOUTS if layout.name == name]
    for layout in layouts:
        if all(some(head, path) for path in layout.has):
            return settled(layout, head)
    wanted = " or ".join(", ".join(layout.has) for layout in layouts)
    raise ValueError(
        f"data.layout={name} needs the columns {wanted}, and there is only {columns_text(head)}"
    )


def settled(layout: Layout, head: Sequence[Row]) -> Layout:
    """The layout with only those alternatives that the rows have."""
    answer = likeliest(head, layout.answer)
    starter = next((path for path in layout.starter if some(head, path)), None)
    return replace(
        layout,
        answer=() if answer is None else (answer,),
        tests=tuple(path for path in layout.tests if some(head, path)),
        starter=() if starter is None else (starter,),
        system=layout.system if layout.system and some(head, layout.system) else "",
    )


def opened(value: Any) -> Any:
    return spelled(value) if isinstance(value, str) else value


def likeliest(head: Sequence[Row], paths: Sequence[str]) -> str | None:
    """The first path that has a value in most rows, else the first that has one in any row, else
    the first that is a column; None if none is."""
    for fits in (most, some, lambda head, path: any(path in row for row in head)):
        if (fitting := next((path for path in paths if fits(head, path)), None)) is not None:
            return fitting
    return None


def most(head: Sequence[Row], path: str) -> bool:
    return 2 * sum(given(lookup(row, path)) for row in head) > len(head)


def some(head: Sequence[Row], path: str) -> bool:
    return any(given(lookup(row, path)) for row in head)


def normal(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rsplit(".", 1)[-1])  # answerKey
    return re.sub(r"\W+", "_", words.lower()).strip("_")


def columns_text(head: Sequence[Row]) -> str:
    """The names of the columns, with the keys of nested ones, for an error."""
    columns: dict[str, None] = {}
    for row in head[:20]:
        for column, value in row.items():
            inner = list(value) if isinstance(value, Mapping) else []
            columns[f"{column} ({', '.join(map(str, inner))})" if inner else str(column)] = None
    return ", ".join(columns) or "none at all"
