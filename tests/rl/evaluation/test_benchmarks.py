"""Every ready set against rows in the form of its data set: they are read, asked and marked."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status
from emberl.rl.answers import reward_input
from emberl.rl.config.sampling import EvalSetConfig
from emberl.rl.data.rows import train_tables
from emberl.rl.data.table import read_head
from emberl.rl.evaluation.benchmarks import READY, named_set

DATA = Path(__file__).parents[4] / "shared" / "data"

ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "q?", "answer": "so\n#### 7"},
    "math500": {"problem": "q?", "solution": "s", "answer": "\\frac{1}{2}", "level": 1},
    "aime24": {"id": 1, "problem": "q?", "solution": "s", "answer": "073", "year": "2024"},
    "aime25": {"problem": "q?", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "q?", "answer": 27.0, "url": "u"},
    "minerva": {"question": "q?", "answer": "4.5e33"},
    "olympiadbench": {"question": "q?", "solution": ["s"], "final_answer": ["2"], "context": None},
}
"""A row of each data set as its page on the Hub describes it."""


@pytest.mark.parametrize("name", ROWS)
def test_a_ready_set_reads_rows_of_its_data_set(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    check(name, file)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gsm8k", "gsm8k/test.jsonl"),
        ("humaneval", "humaneval/HumanEval.jsonl.gz"),
        ("mbpp", "mbpp/mbpp.jsonl"),
        ("mbpp", "mbpp/sanitized-mbpp.json"),
    ],
)
def test_a_ready_set_reads_the_real_file(name: str, file: str) -> None:
    if not (DATA / file).is_file():
        pytest.skip(f"there is no {DATA / file}")
    check(name, DATA / file)


def check(name: str, file: Path) -> None:
    found, keys = named_set(f"{name}={file}")
    assert found == name
    settings = EvalSetConfig(**keys)
    assert settings.verifier is not None
    [table] = train_tables(settings)
    head = read_head(settings, table)
    assert head.problems.counts.bad == 0
    suite = build_suite({"answer": settings.verifier.model_dump()})
    rows = [reward_input(prompt, None, "") for prompt in head.prompts(name)][:16]
    try:
        assert [suite.parts[0].reward.check_reference(row) for row in rows] == [None] * len(rows)
    finally:
        suite.close()
    if "{prompt}" in str(settings.prompt_template) or settings.verifier.use == "math":
        content = rows[0].messages[-1]["content"]
        assert ("\\boxed{}" in content) == (settings.verifier.use == "math")


def test_every_ready_set_is_a_valid_set() -> None:
    for name in READY:
        found, keys = named_set(name)
        assert (found, EvalSetConfig(**keys).name) == (name, name)
    assert {*ROWS, *PROGRAMS, "humaneval", "mbpp"} == set(READY)


ASSERTION = """\
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match, f"out: {out}, exp: {exp}"
"""
"""What evalplus writes before the tests of its sets, which need numpy
(tools/humaneval/to_original_fmt.py, tools/mbpp/to_original_fmt.py)."""


def packed(tests: Sequence[dict[str, str]]) -> str:
    """As LiveCodeBench keeps its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def contest(
    code: str, public: dict[str, str], private: dict[str, str], name: str
) -> dict[str, str]:
    return {
        "question_title": "t",
        "question_content": "Print YES for abc.",
        "platform": "codeforces" if not code else "leetcode",
        "question_id": "1873_A",
        "contest_id": "1873",
        "contest_date": "2023-08-21T00:00:00",
        "starter_code": code,
        "difficulty": "easy",
        "public_test_cases": json.dumps([public]),
        "private_test_cases": packed([private]),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def stdin(text: str, expected: str) -> dict[str, str]:
    return {"input": text, "output": expected, "testtype": "stdin"}


PROGRAMS: dict[str, list[tuple[dict[str, Any], str, list[str], str]]] = {
    "humaneval+": [
        (
            {
                "task_id": "HumanEval/2",
                "prompt": "def truncate_number(number: float) -> float:\n"
                '    """ The decimal part. """\n',
                "canonical_solution": "    return number % 1.0\n",
                "entry_point": "truncate_number",
                "test": f"\n\n{ASSERTION}\n\ndef check(candidate):\n    inputs = [[3.5], [1.33]]\n"
                "    results = [0.5, 0.33]\n"
                "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
                "        assertion(candidate(*inp), exp, 0)\n",
            },
            "def truncate_number(number):\n    return number % 1.0",
            ["def truncate_number(number):\n    return 0.5"],
            "```python\ndef truncate_number(number: float)",
        )
    ],
    # its `test` has more cases than `test_list`, and its text does not name the function
    "mbpp+": [
        (
            {
                "task_id": 2,
                "code": "def shared(a, b):\n    return tuple(set(a) & set(b))\n",
                "prompt": "Write a function to find the shared elements from the given two lists.",
                "source_file": "Benchmark Questions Verification V2.ipynb",
                "test_imports": [],
                "test_list": ["assert set(shared((3, 4), (4, 10))) == set((4,))"],
                "test": f"{ASSERTION}\ninputs = [[(3, 4), (4, 10)], [(1,), (1,)]]\n"
                "results = [(4,), (1,)]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n"
                "    assertion(shared(*inp), exp, 0)\n",
            },
            "def shared(a, b):\n    return tuple(set(a) & set(b))",
            ["def shared(a, b):\n    return (4,)"],
            "pass this test:\nassert set(shared((3, 4), (4, 10)))",
        )
    ],
    "livecodebench": [
        (
            contest("", stdin("abc\n", "YES\n"), stdin("cab\n", "NO\n"), ""),
            "print('YES' if input() == 'abc' else 'NO')",
            ["print('YES')", "print('NO')"],
            "Print YES for abc.",
        ),
        (
            contest(
                "class Solution:\n    def total(self, nums: List[int], k: int) -> int:\n        ",
                {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"},
                {"input": "[]\n0", "output": "0", "testtype": "functional"},
                "total",
            ),
            "class Solution:\n    def total(self, nums, k):\n        return sum(nums) + k",
            [
                "class Solution:\n    def total(self, nums, k):\n        return 6",
                "class Solution:\n    def total(self, nums, k):\n        return 0",
            ],
            "def total(self, nums: List[int], k: int) -> int:",
        ),
    ],
}
"""By ready set: rows in the form of the Hub's, a right program, wrong ones each of which passes one
of the tests, and what the question must say."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_marked_by_all_tests_of_a_row(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, *_ in PROGRAMS[name]))
    settings = EvalSetConfig(**named_set(f"{name}={file}")[1])
    [table] = train_tables(settings)
    prompts = read_head(settings, table).prompts(name)
    assert settings.verifier is not None
    suite = build_suite({"answer": settings.verifier.model_dump()})
    try:
        for prompt, (_, right, wrong, said) in zip(prompts, PROGRAMS[name], strict=True):
            asked = reward_input(prompt, None, "")
            assert said in asked.messages[-1]["content"]
            answers = [f"Here it is:\n```python\n{code}\n```" for code in (right, *wrong)]
            found = suite.grade([replace(asked, completion=answer) for answer in answers])
            expected = [Status.CORRECT] + [Status.WRONG] * len(wrong)
            assert [verdict.status for verdict in found] == expected
    finally:
        suite.close()
