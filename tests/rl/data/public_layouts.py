"""Rows in the layouts of public data sets: five of each, written here, with a right and a wrong
answer to every one."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set: its layout, the reward that grades it, and row, right and wrong answer by
    number."""

    layout: str
    row: Callable[[int], Any]
    right: Callable[[int], str]
    wrong: Callable[[int], str]
    reward: str = "math"
    shown: str = ""
    """What the prompt must have in it."""
    suffix: str = ".jsonl"


def boxed(answer: Any) -> str:
    return f"<think>Let me see.</think>So the answer is $\\boxed{{{answer}}}$."


def number(offset: int = 0, start: int = 7) -> Callable[[int], str]:
    return lambda i: boxed(start + i + offset)


def code(text: str) -> str:
    return f"<think>Easy.</think>\n```python\n{text}\n```"


def verl(source: str, truth: Any, ability: str = "math", **more: Any) -> Row:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "What is asked?"}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": "7a"},
        **more,
    }


def distinct(row: Row, i: int) -> Row:
    """The same with a prompt of its own: rows that say the same count once."""
    text = json.dumps(row)
    for asked in ("What is asked?", "Add two numbers."):
        text = text.replace(asked, f"{asked} (no. {i})")
    return json.loads(text)  # type: ignore[no-any-return]


KNAVES = ("Zoey", "Liam", "Mia", "Noah", "Ava")
ADD_STDIN = "a, b = map(int, input().split())\nprint(a + b)"
WRONG_STDIN = "a, b = map(int, input().split())\nprint(a - b)"
ADD = "def add(a, b):\n    return a + b"
WRONG_ADD = "def add(a, b):\n    return a - b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
WRONG_METHOD = "class Solution:\n    def add(self, a, b):\n        return a * b"
STDIN_CASES = {"inputs": ["2 3\n", "10 4\n"], "outputs": ["5\n", "14\n"]}
CALL_CASES = {"fn_name": "add", "inputs": [[2, 3], [10, 4]], "outputs": [[5], [14]]}


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(value)))).decode()


def programs(
    layout: str, row: Row, right: str = ADD_STDIN, wrong: str = WRONG_STDIN, shown: str = ""
) -> Case:
    return Case(
        layout=layout,
        reward="code",
        row=lambda i: distinct(row, i),
        shown=shown,
        right=lambda _: code(right),
        wrong=lambda _: code(wrong),
    )


def sums(i: int) -> tuple[list[int], int]:
    return [i + 2, 3, 5], i + 2 + 15


CASES: Mapping[str, Case] = {
    "gsm8k": Case(
        layout="gsm8k",
        shown="Tom has",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "question": f"Tom has {i} pens and gets 7.",
            "answer": f"{i}+7=<<{i}+7={i + 7}>>\n#### {i + 7}",
        },
    ),
    "math": Case(
        layout="math",
        right=lambda i: boxed(f"\\dfrac{{{i + 1}}}{{7}}"),
        wrong=lambda i: boxed(f"\\frac{{{i + 2}}}{{7}}"),
        row=lambda i: {
            "problem": f"Find {i + 1}/7.",
            "level": "Level 1",
            "type": "Algebra",
            "solution": f"It is $\\boxed{{\\frac{{{i + 1}}}{{7}}}}$.",
        },
    ),
    "math500": Case(
        layout="math",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "problem": f"Find {i}+7.",
            "solution": "Add: \\boxed{0}, no.",
            "answer": str(i + 7),
            "subject": "Algebra",
            "level": 2,
            "unique_id": f"test/{i}.json",
        },
    ),
    "dapo": Case(
        layout="dapo",
        row=lambda i: distinct(verl("math_dapo", str(7 + i), "MATH"), i),
        right=number(),
        wrong=number(1),
    ),
    "deepscaler": Case(
        layout="deepscaler",
        right=number(),
        wrong=number(1),
        suffix=".json",
        row=lambda i: {"problem": f"Find {i}+7.", "answer": str(i + 7), "solution": "By addition."},
    ),
    "numina": Case(
        layout="numina",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "problem": f"Find {i}+7.",
            "solution": "Add.",
            "answer": str(i + 7),
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
            "synthetic": False,
        },
    ),
    "numina-cot": Case(
        layout="numina",
        right=number(),
        wrong=number(1),
        shown="Find",
        row=lambda i: {
            "source": "cn_k12",
            "problem": f"Find {i}+7.",
            "solution": f"Thus $\\boxed{{{i + 7}}}$.",
            "messages": [
                {"content": f"Find {i}+7.", "role": "user"},
                {"content": "Thus.", "role": "assistant"},
            ],
        },
    ),
    "openr1": Case(
        layout="openr1",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "problem": f"Find {i}+7.",
            "solution": "Add.",
            "answer": str(i + 7),
            "problem_type": "Algebra",
            "source": "aops",
            "uuid": str(i),
            "generations": ["<think>x</think>"],
            "correctness_math_verify": [True],
            "messages": [{"content": "Find", "role": "user"}],
        },
    ),
    "big_math": Case(
        layout="big_math",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "problem": f"Find {i}+7.",
            "answer": str(i + 7),
            "source": "harp",
            "domain": ["Algebra"],
            "llama8b_solve_rate": 0.25,
        },
    ),
    "orz": Case(
        layout="orz",
        right=number(),
        wrong=number(1),
        suffix=".json",
        row=lambda i: [
            {"from": "human", "value": f"Find {i}+7."},
            {"from": "assistant", "ground_truth": {"value": str(i + 7)}},
        ],
    ),
    "simplerl-zoo": Case(
        layout="simplerl",
        right=number(),
        wrong=number(1),
        row=lambda i: distinct(
            verl("simplelr_math", str(7 + i), gt_answer=str(7 + i), question="?", answer="Add."), i
        ),
    ),
    "simplerl": Case(
        layout="simplerl",
        right=number(),
        wrong=number(1),
        shown="Find",
        row=lambda i: {
            "input": "<|im_start|>user\nFind",
            "answer": f"Add: \\boxed{{{i + 7}}}",
            "gt_answer": str(i + 7),
            "subject": "Algebra",
            "level": 3,
            "question": f"Find {i}+7.",
            "ratio": 0.5,
        },
    ),
    "logic_rl-raw": Case(
        layout="logic_rl",
        right=lambda i: boxed(f"{KNAVES[i]} is a knave, and Oliver is a knight."),
        wrong=lambda i: boxed(f"{KNAVES[i]} is a knight, and Oliver is a knight."),
        row=lambda i: {
            "quiz": f"{KNAVES[i]} says that Oliver lies. Who is who?",
            "names": [KNAVES[i], "Oliver"],
            "solution": [False, True],
            "solution_text": f"{KNAVES[i]} is a knave, and Oliver is a knight.",
            "solution_text_format": f"(1) {KNAVES[i]} is a knave\n(2) Oliver is a knight",
            "index": i,
        },
    ),
    "logic_rl": Case(
        layout="logic_rl",
        reward="plugin:knights",
        right=lambda i: (
            f"<think>Hm.</think><answer>(1) {KNAVES[i]} is a knave\n(2) Oliver is a knight</answer>"
        ),
        wrong=lambda i: (
            f"<think>Hm.</think><answer>(1) {KNAVES[i]} is a knight\n(2) Oliver is a knight</answer>"
        ),
        row=lambda i: distinct(
            verl(
                "kk_logic",
                {"solution_text_format": f"(1) {KNAVES[i]} is a knave\n(2) Oliver is a knight"},
            ),
            i,
        ),
    ),
    "countdown-raw": Case(
        layout="countdown",
        reward="gym",
        shown="equals",
        row=lambda i: {"target": sums(i)[1], "nums": sums(i)[0]},
        right=lambda i: f"<answer>{i + 2} + 3 * 5</answer>",
        wrong=lambda i: f"<answer>{sums(i)[1]}</answer>",
    ),
    "countdown": Case(
        layout="countdown",
        reward="gym",
        row=lambda i: distinct(verl("countdown", {"target": sums(i)[1], "numbers": sums(i)[0]}), i),
        right=lambda i: f"<answer>{i + 2} + 3 * 5</answer>",
        wrong=lambda i: f"<answer>{i + 2} + 3 + 5</answer>",
    ),
    "eurus-math": Case(
        layout="eurus",
        row=lambda i: distinct(verl("numina_olympiads", str(7 + i)), i),
        right=number(),
        wrong=number(1),
    ),
    "eurus-code": programs("eurus", verl("taco", json.dumps(STDIN_CASES), "code")),
    "eurus-function": programs(
        "eurus", verl("apps", json.dumps(CALL_CASES), "code"), ADD, WRONG_ADD
    ),
    "taco": programs(
        "taco",
        {
            "question": "Add two numbers.",
            "solutions": json.dumps([ADD_STDIN]),
            "starter_code": "",
            "input_output": json.dumps(STDIN_CASES),
            "difficulty": "EASY",
            "skill_types": "[]",
            "source": "codeforces",
        },
    ),
    "apps": programs(
        "apps",
        {
            "problem_id": 1,
            "question": "Add two numbers.",
            "solutions": json.dumps([ADD]),
            "difficulty": "interview",
            "input_output": json.dumps(CALL_CASES),
            "url": "",
            "starter_code": "def add(a, b):\n\t",
        },
        ADD,
        WRONG_ADD,
        "def add(a, b):",
    ),
    "livecodebench": programs(
        "livecodebench",
        {
            "question_title": "Sum",
            "question_content": "Add two numbers.",
            "platform": "leetcode",
            "question_id": "1",
            "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
            "public_test_cases": json.dumps(
                [{"input": "2\n3", "output": "5", "testtype": "functional"}]
            ),
            "private_test_cases": packed(
                [{"input": "10\n4", "output": "14", "testtype": "functional"}]
            ),
            "metadata": '{"func_name": "add"}',
        },
        METHOD,
        WRONG_METHOD,
        "class Solution",
    ),
    "deepcoder": programs(
        "deepcoder",
        {
            "problem": "Add two numbers.",
            "solutions": [ADD_STDIN],
            "tests": json.dumps(
                [{"type": "stdin_stdout", "input": "2 3\n", "output": "5\n", "fn_name": None}]
            ),
        },
    ),
    "deepcoder-lcb": programs(
        "deepcoder",
        {
            "problem": "Add two numbers.",
            "starter_code": "class Solution:\n    def add(self, a, b):\n        ",
            "tests": json.dumps(
                [
                    {
                        "input": "2\n3",
                        "output": "5",
                        "testtype": "functional",
                        "metadata": {"func_name": "add"},
                    }
                ]
            ),
            "metadata": {"func_name": "add"},
        },
        METHOD,
        WRONG_METHOD,
        "class Solution",
    ),
    "kodcode": programs(
        "kodcode",
        {
            "style": "instruct",
            "question_id": "A_1_I",
            "subset": "Algorithm",
            "question": "Add two numbers.",
            "solution": ADD,
            "test": "from solution import add\n\ndef test_add():\n    assert add(2, 3) == 5\n    assert add(1, 1) == 2\n",
            "test_info": [{"function_declaration": "def add(a, b):", "function_name": "add"}],
        },
        ADD,
        WRONG_ADD,
        "def add(a, b):",
    ),
    "acecode": programs(
        "acecode",
        {
            "id": "oss_1",
            "source": "oss",
            "question": "Add two numbers. Write add(a, b).",
            "test_cases": ["assert add(2, 3) == 5", "assert add(0, 1) == 1"],
            "inferences": [{"completion": ADD, "pass_rate": 1.0}],
            "context_messages": [],
        },
        ADD,
        WRONG_ADD,
    ),
    "leetcode": programs(
        "leetcode",
        {
            "task_id": "add",
            "question_id": 1,
            "difficulty": "Easy",
            "problem_description": "Sum.",
            "starter_code": "",
            "prompt": "import math\n",
            "completion": METHOD,
            "entry_point": "Solution().add",
            "test": "def check(candidate):\n    assert candidate(a = 2, b = 3) == 5\n    assert candidate(a = 4, b = 4) == 8\n",
            "input_output": [{"input": "a = 2, b = 3", "output": "5"}],
            "query": "Add two numbers.",
            "response": "See.",
        },
        METHOD,
        WRONG_METHOD,
    ),
    "verl": Case(
        layout="verl",
        row=lambda i: distinct(verl("openai/gsm8k", str(7 + i)), i),
        right=number(),
        wrong=number(1),
    ),
    "openrlhf": Case(
        layout="openrlhf",
        right=number(),
        wrong=number(1),
        row=lambda i: {"input": f"Find {i}+7.", "label": str(i + 7)},
    ),
    "trl": Case(
        layout="trl",
        right=number(),
        wrong=number(1),
        row=lambda i: {
            "prompt": [{"role": "user", "content": f"Find {i}+7."}],
            "solution": f"\\boxed{{{i + 7}}}",
        },
    ),
    "sharegpt": Case(
        layout="sharegpt",
        right=number(),
        wrong=number(1),
        shown="Be brief.",
        row=lambda i: {
            "conversations": [
                {"from": "human", "value": f"Find {i}+7."},
                {"from": "gpt", "value": f"Sure. It is \\boxed{{{i + 7}}}."},
            ],
            "system": "Be brief.",
        },
    ),
}
