"""Recognition of a data set's layout: from the table of known layouts, else from the names and the
contents of its columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import column_names as columns
from .layouts import (
    LAYOUTS,
    STARTER,
    Layout,
    Row,
    given,
    likeliest,
    lookup,
    most,
    normal,
    opened,
    settled,
    some,
)

_FRAMES = ("openrlhf", "trl", "sharegpt")


def recognise(head: Sequence[Row]) -> Layout | None:
    """The first known layout that fits the rows, else one guessed from the columns' names; None if
    no column is a prompt."""
    guess = _guess(head)
    more = guess is not None and bool(guess.tests or guess.options)
    for layout in LAYOUTS:
        if more and layout.name in _FRAMES:
            continue  # a frame has no place for tests or choices, the guess has
        if all(some(head, path) for path in layout.has) and all(
            any(re.search(pattern, str(lookup(row, path))) for row in head[:3])
            for path, pattern in layout.where
        ):
            recognised = settled(layout, head)
            if (
                guess
                and guess.answer
                and all(normal(p) in columns.WORKED for p in recognised.answer)
            ):
                recognised = replace(recognised, answer=guess.answer)
            if recognised.answer or recognised.tests:
                return recognised
    return guess


def _guess(head: Sequence[Row]) -> Layout | None:
    names = _named(head)
    talks = _conversations(head)
    tests = _tests(names, head)
    prompt = _prompt(names, head, talks)
    if prompt is None:
        return None
    name = normal(prompt)
    tests = () if prompt in tests else tests
    options = _choices(names, head)
    answer = _answer(names, head, {prompt, *options.split("|")})
    replied = [path for path in talks if _is_reply(lookup(head[0], path)[-1])]
    if answer is None and not tests and replied:
        prompt = answer = replied[0]
    options = _options(names, head, options, answer)
    turns = name in ("conversations", "conversation", "messages", "chat", "dialogue")
    if answer is None and not tests and (turns or prompt in talks):
        answer = prompt
    before = [names[key] for key in columns.BEFORE if key in names]
    after = [names[key] for key in columns.AFTER.get(name, ()) if key in names]
    return Layout(
        name="auto",
        prompt=prompt,
        answer=() if answer is None or tests else (answer,),
        tests=tests,
        before=tuple(p for p in before if p not in (prompt, answer) and some(head, p)),
        after=tuple(p for p in after if p != answer and some(head, p)),
        options=options,
        first=_first_number(head, options, answer),
        starter=tuple(path for path in STARTER if some(head, path))[:1],
        system=next((names[key] for key in ("system", "system_prompt") if key in names), ""),
    )


def _conversations(head: Sequence[Row]) -> list[str]:
    """Columns that hold lists of messages."""
    return [
        column
        for column, value in head[0].items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping)
        if "from" in value[0] or "role" in value[0]
    ]


def _prompt(names: Mapping[str, str], head: Sequence[Row], talks: list[str]) -> str | None:
    """The path of the prompt: the likeliest by name that is no number and is not the same in every
    row; None if there is none."""
    known = [names[name] for name in columns.PROMPTS if name in names]
    loose = _loosely(names, columns.PROMPT_WORDS)
    prompts = [path for path in known if some(head, path)] or loose or known or talks
    spoken = [path for path in prompts if not _is_number(head, path)]
    parts = {path: (path, *_around(names, path)) for path in spoken}
    varied = [path for path in spoken if any(_varies(head, part) for part in parts[path])]
    if not varied:
        varied = [p for p in loose if _varies(head, p) and " " in str(lookup(head[0], p))]
    # the same `task` in every row is the task's name, no prompt
    spoken = varied or [path for path in spoken if len(head) == 1 or normal(path) != "task"]
    nested = [path for path in spoken if any(other.startswith(f"{path}.") for other in spoken)]
    return likeliest(head, [path for path in spoken if path not in nested] or spoken)


def _answer(names: Mapping[str, str], head: Sequence[Row], taken: set[str]) -> str | None:
    """The path of the reference answer, none of `taken`; columns of booleans come last."""
    answers = [path for path in _answers(names) if path not in taken]
    answers.sort(key=lambda path: all(isinstance(lookup(row, path), bool) for row in head))
    if not any(some(head, path) for path in answers):
        loose = [path for path in _loosely(names, columns.ANSWER_WORDS) if path not in taken]
        answers = [path for path in loose if some(head, path)] or answers
    return likeliest(head, answers)


def _options(
    names: Mapping[str, str], head: Sequence[Row], options: str, answer: str | None
) -> str:
    """The path or paths of the choices, given those by name and the answer: also a list of answers
    that the answer is an index into, or the answer with columns of wrong ones."""
    listed = names.get("answers", "")
    if answer == listed and isinstance(lookup(head[0], f"{listed}.0"), Mapping):
        options = listed
    if not options and answer not in (None, listed) and _is_number(head, str(answer)):
        options = listed if isinstance(lookup(head[0], listed), list) else ""
    wrong = [
        names[key] for key in names if columns.DISTRACTOR.fullmatch(key) and some(head, names[key])
    ]
    if wrong and not options and answer is not None:
        options = "|".join((answer, *wrong))
    return options


def _choices(names: Mapping[str, str], head: Sequence[Row]) -> str:
    """The path or paths of a question's choices, by name: one column, a column for each choice, or
    a list in a column whose name has a word for choices; "" if there are none."""
    for key in columns.OPTIONS:
        if key in names and some(head, names[key]):
            return names[key]
    groups: dict[str, dict[str, str]] = {}
    for key, path in names.items():
        if (one := columns.ONE_OPTION.fullmatch(key)) and "." not in path:
            groups.setdefault(one[1], {})[one[2]] = path
    for stem, group in groups.items():
        lettered = {"a", "b"} <= set(group)
        if lettered or (stem and {"1", "2"} <= set(group)):
            return "|".join(group[key] for key in sorted(group))
    listed = [
        path for path in _loosely(names, ("option", "choice", *columns.OPTIONS)) if some(head, path)
    ]
    return next((p for p in listed if isinstance(lookup(head[0], p), list)), "")


def _first_number(head: Sequence[Row], options: str, answer: str | None) -> int:
    """The number of the first choice: 1 if answers include the count of choices and not 0."""
    if "|" not in options or answer is None:
        return 0
    said = {str(lookup(row, answer)) for row in head}
    return 1 if str(options.count("|") + 1) in said and "0" not in said else 0


def _named(head: Sequence[Row]) -> dict[str, str]:
    """Paths by their normal names: the columns, then the keys one level below them."""
    by_name: dict[str, str] = {}
    for row in head[:20]:
        for column in row:
            by_name.setdefault(normal(column), column)
    for column in sorted(by_name.values(), key=lambda c: (_order(c), c)):
        for row in head[:20]:
            value = lookup(row, column)
            value = opened(value)
            if isinstance(value, Mapping):
                for key in value:
                    by_name.setdefault(normal(str(key)), f"{column}.{key}")
    return by_name


def _order(column: str) -> int:
    return (
        columns.NESTED_FIRST.index(column)
        if column in columns.NESTED_FIRST
        else len(columns.NESTED_FIRST)
    )


def _answers(names: Mapping[str, str]) -> list[str]:
    """Paths of answers, the likeliest first: columns before nested paths, except for those in
    `reward_model` and `verification_info`, which are made for references."""
    known = [names[name] for name in columns.ANSWERS if name in names]
    known = [
        path
        for path in known
        if normal(path.split(".")[0]) not in columns.BEFORE or "." not in path
    ]
    made = [path for path in known if path.split(".")[0] in ("reward_model", "verification_info")]
    flat = [path for path in known if "." not in path]
    worked = next((at for at, path in enumerate(flat) if normal(path) in columns.WORKED), len(flat))
    flat[worked:worked] = [
        p for n, p in names.items() if "." not in p and columns.STATED.fullmatch(n)
    ]
    info = [
        f"{turns}.{at}.info.reference_answer"
        for turns in ("messages", "conversations")
        for at in (0, -1)
    ]
    return [*made, *flat, *info, *known]


def _tests(names: Mapping[str, str], head: Sequence[Row]) -> tuple[str, ...]:
    columns_of_tests = [
        names[name] for name in columns.TESTS if name in names and some(head, names[name])
    ]
    flat = [path for path in columns_of_tests if "." not in path]
    columns_of_tests = (
        flat
        or columns_of_tests
        or [path for path in _loosely(names, columns.TEST_WORDS) if "." not in path]
    )
    chosen = [
        path
        for path in columns_of_tests
        if any(_tests_something(lookup(row, path)) for row in head)
    ]
    if not any(most(head, path) for path in chosen):
        chosen = []
    if pair := _paired(names, head, chosen):
        return (pair,)
    info = [
        path
        for path in ("messages.0.info.test_case", "messages.-1.info.test_case")
        if some(head, path)
    ]
    return tuple(chosen or info[:1])


def _paired(names: Mapping[str, str], head: Sequence[Row], chosen: Sequence[str]) -> str:
    """`inputs|outputs`, the paths of two lists in columns such as `test_input` and `test_output`;
    hidden tests before examples. "" if there are none, or if other columns have tests."""
    pairs = {
        path: names[other]
        for name, path in names.items()
        if "input" in name and (other := name.replace("input", "output")) in names
        if all(isinstance(opened(lookup(head[0], p)), list) for p in (path, names[other]))
    }
    if not pairs or not {*pairs, *pairs.values()}.issuperset(chosen):
        return ""
    shown = ("example", "sample", "public")
    best = min(pairs, key=lambda path: any(word in path.lower() for word in shown))
    return f"{best}|{pairs[best]}"


def _loosely(names: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """Paths whose names contain one of these words; Chinese puts no space between words."""
    return [
        names[name]
        for word in words
        for name in names
        if word in name.split("_") or (not word.isascii() and word in name)
    ]


def _tests_something(value: Any) -> bool:
    """Whether a value is tests rather than, say, a score or the name of a split."""
    if isinstance(value, str):
        return len(value) > 20 and (
            "assert" in value or value.lstrip()[:1] in ("[", "{") or len(value) > 200
        )
    return isinstance(value, Mapping | Sequence) and given(value)


def _is_reply(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _around(names: Mapping[str, str], path: str) -> list[str]:
    """The columns that may stand before or behind a prompt."""
    return [
        names[key]
        for key in (*columns.BEFORE, *columns.AFTER.get(normal(path), ()))
        if key in names
    ]


def _varies(head: Sequence[Row], path: str) -> bool:
    return len({str(lookup(row, path)) for row in head}) > 1


def _is_number(head: Sequence[Row], path: str) -> bool:
    return all(isinstance(lookup(row, path), int | float | None) for row in head)
