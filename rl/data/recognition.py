"""How the columns of a data set are recognised that is on no list: by their names, and by what they
hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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

# Names of columns in any other data set, in lower case with `_` for what separates words; the first
# that rows have is meant.
_PROMPTS = (
    "prompt",
    "problem",
    "question",
    "problem_text",
    "question_content",
    "question_text",
    "problem_statement",
    "problem_description",
    "question_stem",
    "query",
    "instruction",
    "quiz",
    "puzzle",
    "prompts",
    "questions",
    "task",
    "input",
    "inputs",
    "description",
    "statement",
    "stem",
    "exercise",
    "sentence",
    "original_question",
    "user",
    "user_prompt",
    "content",
    "conversations",
    "conversation",
    "messages",
    "context_messages",
    "chat",
    "dialogue",
    "text",
    "body",
    "ctx",
    "goal",
    "hypothesis",
    "conclusion",
    "instruct_prompt",
    "complete_prompt",
    "informal_statement",
    "claim",
    "q_text",
    "human",
    "q",
    "问题",
    "题目",
    "题干",
    "指令",
    "turns",
)
_ANSWERS = (
    "ground_truth",
    "final_answer",
    "expected_answer",
    "reference_answer",
    "gold_answer",
    "gt_answer",
    "true_answer",
    "correct_answer",
    "verified_answer",
    "short_answer",
    "answer_number",
    "numerical_answer",
    "answer_value",
    "golden_answers",
    "correct_option",
    "correct_answer_id",
    "correct_answer_index",
    "correct_index",
    "answer_id",
    "answer_key",
    "answer_idx",
    "answer_index",
    "cop",
    "correct",
    "answer",
    "gold",
    "gt",
    "label",
    "labels",
    "target",
    "targets",
    "final_ans",
    "ans",
    "answers",
    "result",
    "ref_answer",
    "reference",
    "references",
    "expected",
    "expected_output",
    "correct_answers",
    "final_decision",
    "答案",
    "参考答案",
    "标准答案",
    "输出",
    "solution",
    "solutions",
    "response",
    "output",
    "completion",
    "rationale",
    "explanation",
    "generated_solution",
    "chosen",
    "assistant",
    "a",
)
_TESTS = (
    "tests",
    "test",
    "test_cases",
    "test_list",
    "input_output",
    "official_tests",
    "private_test_cases",
    "public_test_cases",
    "private_tests",
    "public_tests",
    "generated_tests",
    "unit_tests",
    "unit_test",
    "testcases",
    "test_case",
    "testcase",
    "test_code",
    "hidden_tests",
    "assertions",
    "asserts",
    "check",
    "examples_tests",
)
_BEFORE = (
    "passage",
    "context",
    "article",
    "story",
    "body",
    "background",
    "premise",
    "premises",
    "puzzle",
    "dialogue",
)
_AFTER = {
    "instruction": ("input",),
    "指令": ("输入",),
    "description": (
        "input_format",
        "output_format",
        "input_specification",
        "output_specification",
        "constraints",
    ),
}
_OPTIONS = (
    "choices",
    "options",
    "endings",
    "candidates",
    "answer_choices",
    "multiple_choice_options",
    "option",
    "选项",
)
_ONE_OPTION = re.compile(r"(|(?:q_)?op|opt|option|choice|answer|ans|ending|sol|选项)_?([a-j]|\d)")
_DISTRACTOR = re.compile(r"(?:incorrect|wrong|false)_(?:answer|option)s?_?\d*|distractors?_?\d*")
_STATED = re.compile(
    r"(?!.*(?:predict|model|long|wrong|false|incorrect|original|student|generated))"
    r".*(?:answer|truth)"
)
"""Names that are in no list, of what is rather an answer than a worked solution."""
_WORKED = ("solution", "solutions", "response", "output", "completion", "rationale", "explanation",
           "generated_solution", "chosen", "assistant")  # fmt: skip
"""Names of whole solutions, whose answers must be looked for."""
# Of names that are in no list: words in them, the likeliest first.
_PROMPT_WORDS = (
    "prompt",
    "problem",
    "question",
    "query",
    "instruction",
    "puzzle",
    "task",
    "text",
    "题",
)
_ANSWER_WORDS = (
    "truth",
    "truths",
    "answer",
    "answers",
    "gold",
    "golden",
    "target",
    "label",
    "expected",
    "solution",
    "solutions",
    "result",
    "output",
    "response",
    "ans",
    "答案",
)
_TEST_WORDS = ("tests", "test", "testcases", "asserts", "assertions", "cases")
_NESTED_FIRST = (
    "reward_model",
    "verification_info",
    "reward",
    "extra_info",
    "metadata",
    "meta",
    "info",
)


def recognise(head: Sequence[Row]) -> Layout | None:
    """The first layout of the table that fits rows, else one made of names that say what they are;
    None without a prompt."""
    guess = _guess(head)
    more = guess is not None and bool(guess.tests or guess.options)
    for layout in LAYOUTS:
        if more and layout.name in _FRAMES:
            continue  # which says nothing of tests or choices
        if all(some(head, path) for path in layout.has) and all(
            any(re.search(pattern, str(lookup(row, path))) for row in head[:3])
            for path, pattern in layout.where
        ):
            found = settled(layout, head)
            if guess and guess.answer and all(normal(p) in _WORKED for p in found.answer):
                found = replace(found, answer=guess.answer)
            if found.answer or found.tests:
                return found
    return guess


def _guess(head: Sequence[Row]) -> Layout | None:
    names = _named(head)
    tests = _tests(names, head)
    prompts = [names[name] for name in _PROMPTS if name in names]
    prompts = (
        [path for path in prompts if some(head, path)] or _loosely(names, _PROMPT_WORDS) or prompts
    )
    talks = [
        column
        for column, value in head[0].items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping)
        if "from" in value[0] or "role" in value[0]
    ]
    prompts = prompts or talks
    spoken = [path for path in prompts if not _is_number(head, path)]
    parts = {path: (path, *_around(names, path)) for path in spoken}
    varied = [path for path in spoken if any(_varies(head, part) for part in parts[path])]
    if not varied:
        loose = [p for p in _loosely(names, _PROMPT_WORDS) if _varies(head, p)]
        varied = [path for path in loose if " " in str(lookup(head[0], path))]
    # the name of a task is no prompt
    spoken = varied or [path for path in spoken if len(head) == 1 or normal(path) != "task"]
    nested = [path for path in spoken if any(other.startswith(f"{path}.") for other in spoken)]
    prompt = likeliest(head, [path for path in spoken if path not in nested] or spoken)
    if prompt is None:
        return None
    name = normal(prompt)
    tests = () if prompt in tests else tests
    options = _choices(names, head)
    taken = {prompt, *options.split("|")}
    answers = [path for path in _answers(names) if path not in taken]
    answers.sort(key=lambda path: all(isinstance(lookup(row, path), bool) for row in head))
    if not any(some(head, path) for path in answers):
        loose = [path for path in _loosely(names, _ANSWER_WORDS) if path not in taken]
        answers = [path for path in loose if some(head, path)] or answers
    answer = likeliest(head, answers)
    replied = [p for p in talks if _is_reply(lookup(head[0], p)[-1])]
    if answer is None and not tests and replied:
        prompt = answer = replied[0]
    listed = names.get("answers", "")
    if answer == listed and isinstance(lookup(head[0], f"{listed}.0"), Mapping):
        options = listed
    if not options and answer not in (None, listed) and _is_number(head, str(answer)):
        options = listed if isinstance(lookup(head[0], listed), list) else ""
    wrong = [names[key] for key in names if _DISTRACTOR.fullmatch(key) and some(head, names[key])]
    if wrong and not options and answer is not None:
        options = "|".join((answer, *wrong))
    turns = name in ("conversations", "conversation", "messages", "chat", "dialogue")
    if answer is None and not tests and (turns or prompt in talks):
        answer = prompt
    before = tuple(
        names[key] for key in _BEFORE if key in names and names[key] not in (prompt, answer)
    )
    after = tuple(
        names[key] for key in _AFTER.get(name, ()) if key in names and names[key] != answer
    )
    return Layout(
        name="auto",
        prompt=prompt,
        answer=() if answer is None or tests else (answer,),
        tests=tests,
        before=tuple(path for path in before if some(head, path)),
        after=tuple(path for path in after if some(head, path)),
        options=options,
        first=_first_number(head, options, answer),
        starter=tuple(path for path in STARTER if some(head, path))[:1],
        system=next((names[key] for key in ("system", "system_prompt") if key in names), ""),
    )


def _choices(names: Mapping[str, str], head: Sequence[Row]) -> str:
    """Where a question's choices are: a column of that name, a column for each, or a list in a
    column whose name has a word for them."""
    for key in _OPTIONS:
        if key in names and some(head, names[key]):
            return names[key]
    groups: dict[str, dict[str, str]] = {}
    for key, path in names.items():
        if (one := _ONE_OPTION.fullmatch(key)) and "." not in path:
            groups.setdefault(one[1], {})[one[2]] = path
    for stem, group in groups.items():
        lettered = {"a", "b"} <= set(group)
        if lettered or (stem and {"1", "2"} <= set(group)):
            return "|".join(group[key] for key in sorted(group))
    listed = [path for path in _loosely(names, ("option", "choice", *_OPTIONS)) if some(head, path)]
    return next((p for p in listed if isinstance(lookup(head[0], p), list)), "")


def _first_number(head: Sequence[Row], options: str, answer: str | None) -> int:
    """1 if numbers of choices are counted from there: the last one's is as many as there are."""
    if "|" not in options or answer is None:
        return 0
    said = {str(lookup(row, answer)) for row in head}
    return 1 if str(options.count("|") + 1) in said and "0" not in said else 0


def _named(head: Sequence[Row]) -> dict[str, str]:
    """Paths by their normal names: the columns, and behind them what one level of nesting holds."""
    found: dict[str, str] = {}
    for row in head[:20]:
        for column in row:
            found.setdefault(normal(column), column)
    for column in sorted(found.values(), key=lambda c: (_order(c), c)):
        for row in head[:20]:
            value = lookup(row, column)
            value = opened(value)
            if isinstance(value, Mapping):
                for key in value:
                    found.setdefault(normal(str(key)), f"{column}.{key}")
    return found


def _order(column: str) -> int:
    return _NESTED_FIRST.index(column) if column in _NESTED_FIRST else len(_NESTED_FIRST)


def _answers(names: Mapping[str, str]) -> list[str]:
    """Paths of answers, the likeliest first: a column before what is nested, except in a place made
    for it."""
    known = [names[name] for name in _ANSWERS if name in names]
    known = [path for path in known if normal(path.split(".")[0]) not in _BEFORE or "." not in path]
    made = [path for path in known if path.split(".")[0] in ("reward_model", "verification_info")]
    flat = [path for path in known if "." not in path]
    worked = next((at for at, path in enumerate(flat) if normal(path) in _WORKED), len(flat))
    flat[worked:worked] = [p for n, p in names.items() if "." not in p and _STATED.fullmatch(n)]
    info = [
        f"{turns}.{at}.info.reference_answer"
        for turns in ("messages", "conversations")
        for at in (0, -1)
    ]
    return [*made, *flat, *info, *known]


def _tests(names: Mapping[str, str], head: Sequence[Row]) -> tuple[str, ...]:
    found = [names[name] for name in _TESTS if name in names and some(head, names[name])]
    flat = [path for path in found if "." not in path]
    found = flat or found or [path for path in _loosely(names, _TEST_WORDS) if "." not in path]
    chosen = [path for path in found if any(_tests_something(lookup(row, path)) for row in head)]
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
    """Two lists, of inputs and of outputs, in columns `inputs` and `outputs` or `test_input` and
    `test_output`; those of hidden tests before examples. Empty where other columns have tests."""
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
    """Paths whose names have one of these words in them; Chinese has no space between words."""
    return [
        names[name]
        for word in words
        for name in names
        if word in name.split("_") or (not word.isascii() and word in name)
    ]


def _tests_something(value: Any) -> bool:
    """Whether a column of that name holds tests and not, say, a score or a split's name."""
    if isinstance(value, str):
        return len(value) > 20 and (
            "assert" in value or value.lstrip()[:1] in ("[", "{") or len(value) > 200
        )
    return isinstance(value, Mapping | Sequence) and given(value)


def _is_reply(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _around(names: Mapping[str, str], path: str) -> list[str]:
    """The columns that may stand before or behind a prompt."""
    return [names[key] for key in (*_BEFORE, *_AFTER.get(normal(path), ())) if key in names]


def _varies(head: Sequence[Row], path: str) -> bool:
    return len({str(lookup(row, path)) for row in head}) > 1


def _is_number(head: Sequence[Row], path: str) -> bool:
    return all(isinstance(lookup(row, path), int | float | None) for row in head)


__all__ = ["recognise"]
