"""Which answers are one answer, and what a majority of them is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.evaluate import summarise
from emberl.rl.evaluation.votes import Pair, by_reward, final_answer
from emberl.rl.groups import Group
from emberl.rollout.samples import Completion, Prompt, Span


def group(source: str, *right: bool | None, kind: str | None = None) -> Group:
    verdicts = tuple(
        (
            verifier_error("killed")
            if r is None
            else Verdict(status=Status.CORRECT if r else Status.WRONG, score=float(r))
        )
        for r in right
    )
    completions = tuple(
        Completion(
            prompt_id=source,
            sample=i,
            token_ids=np.array([5, 1], np.int32),
            logprobs=np.zeros(2, np.float32),
            spans=(Span(0, 0, 2),),
            finish_reason="stop",
        )
        for i in range(len(right))
    )
    columns = {"kind": kind} if kind else {}
    return Group(
        prompt=Prompt(id=source, token_ids=(3,), answer="1", source=source, columns=columns),
        completions=completions,
        verdicts=verdicts,
    )


def test_summary_by_source_and_kind() -> None:
    groups = [
        group("a", True, False, kind="chain"),
        group("a", True, True, kind="solve"),
        group("b", False, None),
    ]
    texts = [["x</think>1", "x</think>2"], ["</think>1", "</think>1"], ["</think>3", "</think>4"]]
    found = summarise(groups, texts)
    # an answer without a verdict is not correct, and is counted:
    assert found.accuracy == pytest.approx(3 / 6)
    assert found.metrics["val-aux/verifier_errors"] == 1
    assert found.metrics["val-core/a/acc/mean@2"] == pytest.approx(0.75)
    assert found.metrics["val-core/a/acc/pass@2"] == 1.0
    assert found.metrics["val-core/a/acc/best@2/mean"] == pytest.approx((0.75 + 1) / 2)
    # a tie of right and wrong counts half
    assert found.metrics["val-core/a/acc/maj@2"] == pytest.approx(0.75)
    assert found.metrics["val-core/b/acc/mean@2"] == 0.0
    assert found.metrics["val-aux/b/reward/mean@2"] == 0.0
    assert found.reward == pytest.approx(3 / 5), "over the answers that have a score"
    assert found.metrics["val-aux/chain/accuracy"] == pytest.approx(0.5)
    assert found.metrics["val-aux/solve/accuracy"] == 1.0


SIX = ["First 40, then 42: ", "Hence ", "It is ", "So x = ", "I get ", "Thus "]


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ([f"{w}\\boxed{{42}}" for w in SIX], ["same words \\boxed{7}"] * 2, 1.0),
        ([f"{w}\\boxed{{42}}" for w in SIX[:5]], [f"{w}\\boxed{{7}}" for w in SIX[:3]], 1.0),
        ([f"{w}\\boxed{{42}}" for w in SIX[:3]], [f"{w}\\boxed{{7}}" for w in SIX[:5]], 0.0),
        (
            [f"{w}\\boxed{{42}}" for w in SIX[:2]],
            [f"{w}\\boxed{{{i}}}" for i, w in enumerate(SIX)],
            1.0,
        ),
        (
            ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}"],
            ["\\boxed{2}", "the answer is 2.", "\\boxed{3}"],
            0.5,
        ),
    ],
)
def test_a_majority_is_of_answers_not_of_wordings(
    right: list[str], wrong: list[str], expected: float
) -> None:
    problem = group("math", *[True] * len(right), *[False] * len(wrong))
    n = len(right) + len(wrong)
    assert (
        summarise([problem], [[*right, *wrong]]).metrics[f"val-core/math/acc/maj@{n}"] == expected
    )


def test_wrong_answers_are_one_where_the_reward_says_so() -> None:
    """Two right against three wrong ones that read apart; the reward is asked because it matters,
    and only then."""
    asked: list[tuple[str, str]] = []

    def same(pairs: Sequence[Pair]) -> list[bool]:
        asked.extend((a, b) for _, a, b in pairs)
        return [{a, b} <= {"1/2", "0.5", "50\\%"} for _, a, b in pairs]

    texts = ["\\boxed{7}", "\\boxed{7}", "\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{50\\%}"]
    problem = group("m", True, True, False, False, False)
    assert summarise([problem], [texts]).metrics["val-core/m/acc/maj@5"] == 1.0
    assert summarise([problem], [texts], same).metrics["val-core/m/acc/maj@5"] == 0.0
    assert len(asked) == 3
    asked.clear()
    summarise(
        [group("m", *[True] * 3, False, False), group("m", *[False] * 5)], [texts, texts], same
    )
    assert asked == []


RIGHT = [
    "We get \\boxed{42}.",
    "so the total is $42$",
    "<think>40, no</think>It is \\boxed{42.0}",
    "\\boxed{\\frac{84}{2}}",
    "#### 42",
    "The answer is **42**.",
]
WRONG = ["The same words: \\boxed{7}", "The same words: \\boxed{7}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "reference", "expected"),
    [
        ([*RIGHT, *WRONG], "42", 1.0),
        (
            [*RIGHT[:2], "\\boxed{1/2}", "\\boxed{0.5}", "so it is 50\\%: \\boxed{\\frac12}"],
            "42",
            0.0,
        ),
        ([*RIGHT[:3], "\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{\\frac12}"], "42", 0.5),
        ([*RIGHT[:1], "I do not know", "no idea at all", "nobody can tell"], "42", 0.25),
        (
            [
                "\\boxed{x^2+2x+1}",
                "\\boxed{(x+1)^2}",
                "\\boxed{1+2x+x^2}",
                "\\boxed{x^2}",
                "\\boxed{x^2}",
            ],
            "(x+1)^2",
            1.0,
        ),
        (
            ["\\boxed{x^2+2x+1}", "\\boxed{x(x+1)}", "\\boxed{x^2+x}", "\\boxed{x+x^2}"],
            "(x+1)^2",
            0.0,
        ),
    ],
    ids=[
        "six wordings",
        "wrong ones unite",
        "a tie",
        "prose does not unite",
        "forms of a polynomial",
        "wrong forms unite",
    ],
)
def test_a_majority_by_the_math_reward(answers: list[str], reference: str, expected: float) -> None:
    """Verdicts and likenesses are the reward's own, as in an evaluation of a run."""
    suite = build_suite({"answer": {"use": "math"}})
    try:
        verdicts = suite.grade([RewardInput(completion=text, answer=reference) for text in answers])
        problem = replace(group("m", *[True] * len(answers)), verdicts=tuple(verdicts))
        found = summarise([problem], [answers], by_reward(suite)).metrics
    finally:
        suite.close()
    assert found[f"val-core/m/acc/maj@{len(answers)}"] == expected


def test_what_has_no_answer_does_not_vote() -> None:
    verdicts = (
        Verdict(status=Status.CORRECT, score=1.0),
        *[Verdict(status=Status.UNPARSEABLE, score=0.0)] * 2,
        Verdict(status=Status.OVER_LIMIT, score=0.0),
        verifier_error("killed"),
    )
    problem = replace(group("m", *[True] * 5), verdicts=verdicts)
    assert (
        summarise([problem], [["\\boxed{1}", "?", "?", "?", "?"]]).metrics["val-core/m/acc/maj@5"]
        == 1.0
    )
    nobody = replace(problem, verdicts=(verdicts[1],) * 5)
    assert summarise([nobody], [["?"] * 5]).metrics["val-core/m/acc/maj@5"] == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3 or 4</think>12", "12"),
        ("so \\boxed{\\frac{1}{2}} and not \\boxed{3", "\\frac{1}{2}"),
        ("work\n#### 1,250", "1250"),
        ("The answer is 7.", "7"),
        ("It costs 1,250 dollars, I think.", "1250dollars"),
        ("The answer is 2 apples, not 3.", "2apples"),
        ("<think>7 and on and on", ""),
        ("no idea at all", "noideaatall"),
        ("$x^2$", "x^2"),
        ("", ""),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer
