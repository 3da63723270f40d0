"""Shaping rewards against numbers worked out by hand."""

from __future__ import annotations

import threading
import time

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.shaping import FormatReward, LanguageReward, OverlongReward, RepetitionReward
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status


def score(reward, completion: str, **fields) -> float:
    return reward([RewardInput(completion=completion, **fields)])[0].score


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        ("think", "<think>a\nb</think> 5", 1),
        ("think", "<think>a</think>", 0),
        ("think", "a</think> 5", 0),
        ("think", "<think>a<think>b</think> 5", 0),
        ("think", "x <think>a</think> 5", 0),
        ("think_answer", "<think>a</think>\n<answer>5</answer>", 1),
        ("think_answer", "<think>a</think> so <answer>5</answer>", 0),
        ("think_answer", "<think>a</think><answer>5</answer><answer>6</answer>", 0),
        ("boxed", "it is \\boxed{5}.", 1),
        (r"\d+", "123", 1),
        (r"\d+", "123!", 0),
    ],
)
def test_format(pattern: str, completion: str, expected: float) -> None:
    assert score(FormatReward(pattern), completion) == expected


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(r"(a|aa)+b", "a" * 60), (r"(?:\s*\w+\s*)+!", "word " * 12), (r"(.*?,){12}P", "1," * 40)],
)
def test_a_pattern_that_explodes_costs_its_own_answer_and_holds_up_nobody(
    pattern: str, text: str
) -> None:
    suite = build_suite(
        {
            "form": {
                "use": "format",
                "timeout": 0.5,
                "deadline": 60.0,
                "options": {"pattern": pattern},
            }
        }
    )
    ticks: list[int] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.05):
            ticks.append(1)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.process_time()
    found = suite.grade([RewardInput(completion=t) for t in (text, "no", *[text] * 3)])
    seconds = time.process_time() - start
    done.set()
    ticker.join()
    assert found[1].status is Status.WRONG
    assert all(v.status in (Status.OVER_LIMIT, Status.WRONG) and v.score == 0 for v in found)
    assert seconds < 5, "four times the limit, which is of processor time"
    late = found[0].status is Status.OVER_LIMIT
    assert not late or len(ticks) > 10, "Python's lock is let go meanwhile"


def test_a_thought_that_the_prompt_opened_counts() -> None:
    assert score(FormatReward(), "a</think> 5", prompt="<|assistant|><think>\n") == 1


def test_language_is_the_share_of_words() -> None:
    assert score(LanguageReward("en"), "one two three 四") == 0.75
    assert score(LanguageReward("zh"), "one two three 四") == 0.25
    # formulas and tags do not count
    assert score(LanguageReward("zh"), "答案 $\\frac{x}{abc}$ <think>") == 1.0
    assert score(LanguageReward("en"), "1 + 1 = 2") == 1.0
    with pytest.raises(ValueError, match="language is 'xx'"):
        LanguageReward("xx")


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (150, -1)]
)
def test_overlong_is_linear_in_the_buffer(tokens: int, expected: float) -> None:
    verdict = OverlongReward(buffer=20, max_tokens=100)(
        [RewardInput(completion="", token_ids=(1,) * tokens)]
    )[0]
    assert verdict.score == pytest.approx(expected)
    assert verdict.status is (
        Status.CORRECT if expected == 0 else Status.WRONG if expected == -1 else Status.PARTIAL
    )


def test_overlong_takes_the_limit_of_the_sampling() -> None:
    assert score(OverlongReward(buffer=20), "", token_ids=(1,) * 45, max_tokens=50) == -0.75
    with pytest.raises(ValueError, match="needs max_tokens"):
        score(OverlongReward(buffer=20), "")
    with pytest.raises(ValueError, match="buffer is 0"):
        OverlongReward(buffer=0)


def test_repetition_counts_repeated_ngrams() -> None:
    # 2-grams of "a b a b a": ab ba ab ba -> 2 of 4 distinct
    assert score(RepetitionReward(ngram=2, penalty=1.0), "a b a b a") == -0.5
    assert score(RepetitionReward(ngram=2, penalty=0.5), "a b a b a") == -0.25
    assert score(RepetitionReward(ngram=2), "a b c") == 0
    assert score(RepetitionReward(ngram=2), "a") == 0
    # without spaces each character is a word
    assert score(RepetitionReward(ngram=2), "天天天") == -0.5
