"""Where public data sets keep prompt, answer and tests, as a table, and how the columns of any
other one are recognised.

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
    """Where the parts of a row lie. Of alternatives the first that the rows have is meant."""

    name: str
    has: tuple[str, ...] = ()
    """Paths that every row has; the layout is recognised by them."""
    where: tuple[tuple[str, str], ...] = ()
    """Paths and the regular expression that the first row's values there match."""
    prompt: str = ""
    template: str = ""
    """Makes the prompt where no column holds it: `{name}` stands for a path."""
    answer: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    """Paths of tests: a row with one of them asks for a program."""
    before: tuple[str, ...] = ()
    """Columns that stand before a text prompt: a passage, a story."""
    after: tuple[str, ...] = ()
    """Columns that stand behind it: an instruction's input, a contest problem's formats."""
    options: str = ""
    """The choices of a multiple-choice question: a path, or several with `|` between; the answer
    becomes a letter. Where the answer is one of several, their order is made from the row."""
    first: int = 0
    """The number that the first choice has where the answer is a number."""
    starter: tuple[str, ...] = ()
    """The signature that a program is to have."""
    system: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    """What the `gym` reward wants in the column `metadata`, and the path that it comes from."""


_STARTER = ("starter_code", "test_info.0.function_declaration")
_PUZZLE = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic"
    " arithmetic operations (+, -, *, /) and each number exactly once. Return the final equation in"
    " <answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."
)

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
        starter=_STARTER,
    ),
    Layout(name="leetcode", has=("query", "entry_point", "test"), prompt="query", tests=("test",)),
    Layout(
        name="kodcode",
        has=("question", "test", "test_info"),
        prompt="question",
        tests=("test",),
        starter=_STARTER,
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
        starter=_STARTER,
    ),
    Layout(
        name="apps",
        has=("question", "input_output", "solutions"),
        prompt="question",
        tests=("input_output",),
        starter=_STARTER,
    ),
    Layout(
        name="deepcoder",
        has=("problem", "tests"),
        prompt="problem",
        tests=("tests",),
        starter=_STARTER,
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
_FRAMES = ("openrlhf", "trl", "sharegpt")
NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))

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


def lookup(row: Any, path: str) -> Any:
    """The value at a path, None where there is none."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        value = _opened(value)
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
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text


def given(value: Any) -> bool:
    """Whether a row says anything there."""
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
    """The layout of that name whose columns the rows have. ValueError says which columns it
    needs."""
    layouts = [layout for layout in LAYOUTS if layout.name == name]
    for layout in layouts:
        if all(_some(head, path) for path in layout.has):
            return settled(layout, head)
    wanted = " or ".join(", ".join(layout.has) for layout in layouts)
    raise ValueError(
        f"data.layout={name} needs the columns {wanted}, and there is only {columns_text(head)}"
    )


def recognise(head: Sequence[Row]) -> Layout | None:
    """The first layout of the table that fits rows, else one made of names that say what they are;
    None without a prompt."""
    guess = _guess(head)
    more = guess is not None and bool(guess.tests or guess.options)
    for layout in LAYOUTS:
        if more and layout.name in _FRAMES:
            continue  # which says nothing of tests or choices
        if all(_some(head, path) for path in layout.has) and all(
            any(re.search(pattern, str(lookup(row, path))) for row in head[:3])
            for path, pattern in layout.where
        ):
            found = settled(layout, head)
            if guess and guess.answer and all(_normal(p) in _WORKED for p in found.answer):
                found = replace(found, answer=guess.answer)
            if found.answer or found.tests:
                return found
    return guess


def settled(layout: Layout, head: Sequence[Row]) -> Layout:
    """With only those alternatives that the rows have."""
    answer = _likeliest(head, layout.answer)
    starter = next((path for path in layout.starter if _some(head, path)), None)
    return replace(
        layout,
        answer=() if answer is None else (answer,),
        tests=tuple(path for path in layout.tests if _some(head, path)),
        starter=() if starter is None else (starter,),
        system=layout.system if layout.system and _some(head, layout.system) else "",
    )


def _guess(head: Sequence[Row]) -> Layout | None:
    names = _named(head)
    tests = _tests(names, head)
    prompts = [names[name] for name in _PROMPTS if name in names]
    prompts = (
        [path for path in prompts if _some(head, path)] or _loosely(names, _PROMPT_WORDS) or prompts
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
    spoken = varied or [path for path in spoken if len(head) == 1 or _normal(path) != "task"]
    nested = [path for path in spoken if any(other.startswith(f"{path}.") for other in spoken)]
    prompt = _likeliest(head, [path for path in spoken if path not in nested] or spoken)
    if prompt is None:
        return None
    name = _normal(prompt)
    tests = () if prompt in tests else tests
    options = _choices(names, head)
    taken = {prompt, *options.split("|")}
    answers = [path for path in _answers(names) if path not in taken]
    answers.sort(key=lambda path: all(isinstance(lookup(row, path), bool) for row in head))
    if not any(_some(head, path) for path in answers):
        loose = [path for path in _loosely(names, _ANSWER_WORDS) if path not in taken]
        answers = [path for path in loose if _some(head, path)] or answers
    answer = _likeliest(head, answers)
    replied = [p for p in talks if _is_reply(lookup(head[0], p)[-1])]
    if answer is None and not tests and replied:
        prompt = answer = replied[0]
    listed = names.get("answers", "")
    if answer == listed and isinstance(lookup(head[0], f"{listed}.0"), Mapping):
        options = listed
    if not options and answer not in (None, listed) and _is_number(head, str(answer)):
        options = listed if isinstance(lookup(head[0], listed), list) else ""
    wrong = [names[key] for key in names if _DISTRACTOR.fullmatch(key) and _some(head, names[key])]
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
        before=tuple(path for path in before if _some(head, path)),
        after=tuple(path for path in after if _some(head, path)),
        options=options,
        first=_first_number(head, options, answer),
        starter=tuple(path for path in _STARTER if _some(head, path))[:1],
        system=next((names[key] for key in ("system", "system_prompt") if key in names), ""),
    )


def _choices(names: Mapping[str, str], head: Sequence[Row]) -> str:
    """Where a question's choices are: a column of that name, a column for each, or a list in a
    column whose name has a word for them."""
    for key in _OPTIONS:
        if key in names and _some(head, names[key]):
            return names[key]
    groups: dict[str, dict[str, str]] = {}
    for key, path in names.items():
        if (one := _ONE_OPTION.fullmatch(key)) and "." not in path:
            groups.setdefault(one[1], {})[one[2]] = path
    for stem, group in groups.items():
        lettered = {"a", "b"} <= set(group)
        if lettered or (stem and {"1", "2"} <= set(group)):
            return "|".join(group[key] for key in sorted(group))
    listed = [
        path for path in _loosely(names, ("option", "choice", *_OPTIONS)) if _some(head, path)
    ]
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
            found.setdefault(_normal(column), column)
    for column in sorted(found.values(), key=lambda c: (_order(c), c)):
        for row in head[:20]:
            value = lookup(row, column)
            value = _opened(value)
            if isinstance(value, Mapping):
                for key in value:
                    found.setdefault(_normal(str(key)), f"{column}.{key}")
    return found


def _order(column: str) -> int:
    return _NESTED_FIRST.index(column) if column in _NESTED_FIRST else len(_NESTED_FIRST)


def _answers(names: Mapping[str, str]) -> list[str]:
    """Paths of answers, the likeliest first: a column before what is nested, except in a place made
    for it."""
    known = [names[name] for name in _ANSWERS if name in names]
    known = [
        path for path in known if _normal(path.split(".")[0]) not in _BEFORE or "." not in path
    ]
    made = [path for path in known if path.split(".")[0] in ("reward_model", "verification_info")]
    flat = [path for path in known if "." not in path]
    worked = next((at for at, path in enumerate(flat) if _normal(path) in _WORKED), len(flat))
    flat[worked:worked] = [p for n, p in names.items() if "." not in p and _STATED.fullmatch(n)]
    info = [
        f"{turns}.{at}.info.reference_answer"
        for turns in ("messages", "conversations")
        for at in (0, -1)
    ]
    return [*made, *flat, *info, *known]


def _tests(names: Mapping[str, str], head: Sequence[Row]) -> tuple[str, ...]:
    found = [names[name] for name in _TESTS if name in names and _some(head, names[name])]
    flat = [path for path in found if "." not in path]
    found = flat or found or [path for path in _loosely(names, _TEST_WORDS) if "." not in path]
    chosen = [path for path in found if any(_tests_something(lookup(row, path)) for row in head)]
    if not any(_most(head, path) for path in chosen):
        chosen = []
    if pair := _paired(names, head, chosen):
        return (pair,)
    info = [
        path
        for path in ("messages.0.info.test_case", "messages.-1.info.test_case")
        if _some(head, path)
    ]
    return tuple(chosen or info[:1])


def _paired(names: Mapping[str, str], head: Sequence[Row], chosen: Sequence[str]) -> str:
    """Two lists, of inputs and of outputs, in columns `inputs` and `outputs` or `test_input` and
    `test_output`; those of hidden tests before examples. Empty where other columns have tests."""
    pairs = {
        path: names[other]
        for name, path in names.items()
        if "input" in name and (other := name.replace("input", "output")) in names
        if all(isinstance(_opened(lookup(head[0], p)), list) for p in (path, names[other]))
    }
    if not pairs or not {*pairs, *pairs.values()}.issuperset(chosen):
        return ""
    shown = ("example", "sample", "public")
    best = min(pairs, key=lambda path: any(word in path.lower() for word in shown))
    return f"{best}|{pairs[best]}"


def _opened(value: Any) -> Any:
    return spelled(value) if isinstance(value, str) else value


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
    return [names[key] for key in (*_BEFORE, *_AFTER.get(_normal(path), ())) if key in names]


def _varies(head: Sequence[Row], path: str) -> bool:
    return len({str(lookup(row, path)) for row in head}) > 1


def _is_number(head: Sequence[Row], path: str) -> bool:
    return all(isinstance(lookup(row, path), int | float | None) for row in head)


def _likeliest(head: Sequence[Row], paths: Sequence[str]) -> str | None:
    """The first path at which most rows say something, else the first at which one does, else the
    first column."""
    for fits in (_most, _some, lambda head, path: any(path in row for row in head)):
        if (found := next((path for path in paths if fits(head, path)), None)) is not None:
            return found
    return None


def _most(head: Sequence[Row], path: str) -> bool:
    return 2 * sum(given(lookup(row, path)) for row in head) > len(head)


def _some(head: Sequence[Row], path: str) -> bool:
    return any(given(lookup(row, path)) for row in head)


def _normal(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rsplit(".", 1)[-1])  # answerKey
    return re.sub(r"\W+", "_", words.lower()).strip("_")


def columns_text(head: Sequence[Row]) -> str:
    """The columns for an error, with what is in nested ones."""
    found: dict[str, None] = {}
    for row in head[:20]:
        for column, value in row.items():
            inner = list(value) if isinstance(value, Mapping) else []
            found[f"{column} ({', '.join(map(str, inner))})" if inner else str(column)] = None
    return ", ".join(found) or "none at all"


__all__ = [
    "LAYOUTS",
    "NAMES",
    "TRUTH",
    "Layout",
    "by_name",
    "columns_text",
    "given",
    "lookup",
    "recognise",
    "spelled",
]
