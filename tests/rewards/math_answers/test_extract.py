"""Finding the final answer: what is taken, what is not, and that it takes linear time."""

import json
import time
from pathlib import Path

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.math_answers.extract import RULES, boxes, extract
from emberl.rewards.math_answers.reward import MathReward
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("completion", "candidates", "how"),
    [
        ("<think>7+5=12,12-3=9</think>9", ("9",), "last_line"),
        (r"so \boxed{\frac{1}{2}}.", (r"\frac{1}{2}",), "box"),
        (r"\fbox{3}", ("3",), "box"),
        (r"first \boxed{1}, then \boxed{1}", ("1",), "box"),
        (r"\boxed{1} or \boxed{2}", ("1", "2"), "box"),
        (r"fill the \boxed{\phantom{7}} in: \boxed{4}", ("4",), "box"),
        (r"\boxed{\boxed{5}}", (r"\boxed{5}",), "box"),
        (r"\boxed{1} and an open \boxed{2", ("1",), "box"),
        (r"<think>\boxed{3}</think> \boxed{4}", ("4",), "box"),
        ("<answer> 12 </answer>", ("12",), "answer_tag"),
        (r"<answer>4</answer> \boxed{5}", ("5", "4"), "box"),
        (r"<answer>so \boxed{5}</answer>", ("5",), "box"),
        ("She has 3 left.\n#### 1,200", ("1,200",), "last_line"),
        ("4 apples\nA: 26", ("26",), "last_line"),
        ("The final answer is $x=3$. I hope it is correct.", ("x=3",), "marker"),
        ("Final Answer: The largest $n$ is 34.", ("34",), "marker"),
        ("**Answer:** 7", ("7",), "marker"),
        ("Answer: 5 or 6 or 7", ("5 or 6 or 7",), "marker"),
        ("Therefore we find that $x \\geq 5$ in the end.", (r"x \geq 5",), "sentence"),
        (
            "In total there are exactly nine and then forty more, hence 49 of them",
            ("49",),
            "sentence",
        ),
        (
            "It must be that there are 4 or 5 of them in the whole of the box",
            ("4 or 5",),
            "sentence",
        ),
        ("circumcircle", ("circumcircle",), "whole"),
        (r"f(x) = \frac{1}{x}", (r"f(x) = \frac{1}{x}",), "whole"),
    ],
)
def test_where_the_answer_is_found(completion: str, candidates: tuple[str, ...], how: str) -> None:
    found = extract(completion)
    assert found.candidates == candidates
    assert found.how == how


@pytest.fixture(scope="module")
def math():
    reward = MathReward()
    yield reward
    reward.close()


@pytest.mark.parametrize(
    "line", (Path(__file__).parent / "completions.jsonl").read_text().splitlines()
)
def test_what_a_reader_takes_from_a_text(math: MathReward, line: str) -> None:
    row = json.loads(line)
    verdict = math([RewardInput(completion=row["completion"], answer=row["answer"])])[0]
    assert (verdict.score == 1) == row["right"], extract(row["completion"])


def test_every_rule_names_who_writes_so() -> None:
    assert all(rule.source and rule.name for rule in RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    "completion", ["", "   ", r"<think>\boxed{5}", "<think>\\boxed{5}</think>", "</think>\n "]
)
def test_no_answer(completion: str) -> None:
    assert extract(completion).candidates == ()


def test_a_thought_that_the_prompt_opened_must_be_closed() -> None:
    assert extract(r"\boxed{5}", opened=True).candidates == ()
    assert extract(r"hm</think>\boxed{5}", opened=True).candidates == ("5",)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "\\boxed{1}" * 50_000,
        "{" * 300_000 + "\\boxed{1}",
        "<answer>" * 50_000,
        "<answer>" + "x" * 400_000,
        "answer is " * 40_000,
        "$" * 200_001,
        "\\(" * 150_000,
        " \n" * 200_000 + "A",
        "1 or " * 80_000,
        "</think>" * 50_000,
        "".join(f"\\boxed{{{i}}}" for i in range(100_000)),
        "5" + " " * 1_000_000,
        "```\n" * 100_000,
        "1 + " * 100_000,
        "is " * 100_000 + "5",
        "\\begin{align}" * 30_000,
        "答案是" * 100_000,
        "当" * 800 + "时" * 800 + "1" * 800 + "当" * 800 + "时" * 799,
        "1" * 1300 + " if " + "1" * 2600,
        "1+" * 1500 + "1=" + "1 " * 400 + "is",
        "it is less than 5" + "=" * 3900,
        "after a " * 30_000 + "5",
        "because 5, so " * 20_000,
        "Option A " * 30_000,
        "5 or if " * 30_000,
        "1" + " a" * 1990 + " is",
        "5,\t" + " \t" * 1990 + "x",
        "one hundred and " * 20_000,
        ", which is more " * 2_000 + "5",
        "5, and since a, " * 2_000,
        '"answer": "' * 5_000,
        "x=1+a" * 1_000 + ".",
        "paid 5 for " * 20_000,
        "一" * 100_000,
        "\\boxed{5} however " * 20_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_long_degenerate_texts_take_linear_time(text: str) -> None:
    start = time.process_time()
    extract(text)
    assert time.process_time() - start < 2.0  # about 0.1 s; quadratic behaviour would take minutes


@given(st.text(alphabet="\\{}boxed1 ", max_size=200))
def test_boxes_are_balanced_and_outermost(text: str) -> None:
    for box in boxes(text):
        assert text.count("{" + box + "}") >= 1
        depth = 0
        for character in box:
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0
