"""The math reward as a whole: verdicts, hacks, bombs, references, and the bars on recorded data."""

import asyncio
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from emberl.rewards.audit.hacks import HACKS
from emberl.rewards.inputs import RewardInput
from emberl.rewards.math_answers.reward import MathReward
from emberl.rewards.verdict import Status

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the recorded data is not at ../shared/data"
)
LABEL_ERRORS = {
    "qm72_7": "10000 is 10{,}000",
    "hv52_tn_output": "the same five numbers in another order",
}
EQUAL_BOMBS = {"expand_pow": "s^199 s is s^200"}


@pytest.fixture(scope="module")
def math():
    reward = MathReward(timeout=5.0, concurrency=2)
    yield reward
    reward.close()


def grade(reward: MathReward, completion: str, answer: str, **fields):
    return reward([RewardInput(completion=completion, answer=answer, **fields)])[0]


def pairs(*sources: str) -> list[dict]:
    with gzip.open(DATA / "graded_pairs" / "graded_pairs.jsonl.gz", "rt") as file:
        return [row for row in map(json.loads, file) if row["source"] in sources]


def test_verdicts(math) -> None:
    assert grade(math, "<think>7+5=12,12-3=9</think>9", "9").status is Status.CORRECT
    assert grade(math, "<think>7+5=12,12-3=8</think>8", "9").status is Status.WRONG
    assert grade(math, "<think>\\boxed{9}", "9").status is Status.UNPARSEABLE
    assert grade(math, "\\boxed{9}", "9", prompt="<think>\n").status is Status.UNPARSEABLE
    bomb = grade(math, "\\boxed{9^{9^{9}}}", "\\sqrt{9+x}")
    assert (bomb.status, bomb.score) == (Status.OVER_LIMIT, 0.0)
    assert grade(math, "\\boxed{2} and \\boxed{3}", "2, 3").status is Status.CORRECT
    assert grade(math, "x", "GSM8K style solution\n#### 1,000").status is Status.WRONG
    assert grade(math, "1000", "GSM8K style solution\n#### 1,000").status is Status.CORRECT


def test_what_is_decided_exactly_starts_no_process() -> None:
    reward = MathReward()
    for hack in HACKS[:16]:
        reward([hack.input])
    assert reward._pool.started == 0


def test_importing_and_grading_stays_light() -> None:
    code = (
        "import sys; from emberl.rewards.suite import build_suite; from emberl.rewards.inputs"
        " import RewardInput;suite = build_suite({'answer': {'use': 'math'}, 'form': {'use':"
        " 'format', 'weight': 0.1}});assert"
        " suite.grade([RewardInput(completion='<think>a</think>9', answer='9')])[0].score =="
        " 1.1;import emberl.rewards.audit.audit;print([m for m in ('torch', 'ray', 'transformers',"
        " 'sympy', 'math_verify', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("hack", HACKS, ids=lambda hack: hack.name)
def test_hacks_earn_nothing(math, hack) -> None:
    assert math([hack.input])[0].score == 0.0


@pytest.mark.slow
def test_the_symbolic_back_end_decides_what_is_left(math) -> None:
    assert grade(math, "\\boxed{\\sum_{k=1}^{n} k}", "$\\sum_{j=1}^{n} j$").status is Status.CORRECT
    assert grade(math, "\\boxed{\\frac{n(n+1)}{2}}", "$\\sum_{j=1}^{n} j$").status is Status.CORRECT
    assert grade(math, "\\boxed{\\frac{n(n-1)}{2}}", "$\\sum_{j=1}^{n} j$").status is Status.WRONG
    assert (
        grade(math, "\\boxed{\\lim_{n\\to0} a_n}", "\\lim_{n\\to\\infty} a_n").status
        is Status.UNKNOWN
    )
    assert math._pool.started >= 1


@pytest.mark.slow
def test_references_are_checked(math) -> None:
    assert math.check_reference(RewardInput(completion="", answer="\\int_0^1 x dx")) is None
    assert (
        math.check_reference(RewardInput(completion="", answer="x, where x is what was asked for"))
        is None
    )
    assert "empty" in math.check_reference(RewardInput(completion="", answer=""))
    assert "no answer" in math.check_reference(RewardInput(completion="", answer="proof"))
    assert math.check_reference(RewardInput(completion="", answer="{{{((")) is not None


def test_one_answer_costs_no_other(math) -> None:
    rows = [RewardInput(completion="\\boxed{500}", answer="500")] * 7
    for bad in (
        "+".join("1" * 500),
        "(" * 300 + "1" + ")" * 300,
        "\\boxed{" * 2000,
        "1" + "!" * 900,
        "x" * 10**6,
        "\ud800+x",
    ):
        verdicts = math([*rows, RewardInput(completion=f"\\boxed{{{bad}}}", answer="500")])
        assert [v.status for v in verdicts[:7]] == [Status.CORRECT] * 7
        assert verdicts[7].score == 0.0


@pytest.mark.slow
def test_killing_grading_processes_loses_no_sample() -> None:
    reward, stop = MathReward(timeout=10.0, concurrency=2), threading.Event()

    def killer() -> None:
        while not stop.wait(0.7):
            for pid in _workers():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                break

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        rows = [
            RewardInput(
                completion=f"\\boxed{{\\sum_{{k=1}}^{{n}} {i}k}}",
                answer=f"$\\sum_{{j=1}}^{{n}} {i}j$",
            )
            for i in range(2, 60)
        ]
        verdicts = reward(rows)
    finally:
        stop.set()
        thread.join()
        reward.close()
    assert [v.status for v in verdicts] == [Status.CORRECT] * len(rows)


def _workers() -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{os.getpid()}/task"):
        with open(f"/proc/{os.getpid()}/task/{task}/children") as file:
            found += [int(pid) for pid in file.read().split()]
    return found


@needs_data
@pytest.mark.slow
def test_natural_responses_agree(math) -> None:
    rows = pairs("qwen_math_responses", "gsm8k_openai_solutions")
    verdicts = math([RewardInput(completion=r["pred"], answer=r["gold"]) for r in rows])
    differ = [r["id"] for r, v in zip(rows, verdicts, strict=True) if (v.score == 1) != r["label"]]
    differ = [name for name in differ if name not in LABEL_ERRORS]
    assert len(differ) <= 0.001 * len(rows), differ
    assert all(v.score is not None for v in verdicts)


@needs_data
@pytest.mark.slow
def test_the_last_sentence_of_a_solution_is_read(math) -> None:
    """Solutions whose line `A: x` is taken away; a few of the wrong ones get their last sentence
    right."""
    rows = pairs("gsm8k_openai_solutions")
    bare = [re.sub(r"<<[^>]*>>", "", row["pred"]) for row in rows]
    texts = [re.sub(r"(?:\n?A:|####)[^\n]*\Z", "", text.strip()).strip() for text in bare]
    verdicts = math(
        [RewardInput(completion=t, answer=r["gold"]) for t, r in zip(texts, rows, strict=True)]
    )
    accepted = {
        label: [v.score for r, v in zip(rows, verdicts, strict=True) if r["label"] is label]
        for label in (True, False)
    }
    assert sum(accepted[True]) >= 0.98 * len(accepted[True])
    assert sum(accepted[False]) <= 0.005 * len(accepted[False])


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["{}", "\\boxed{{{}}}", "<think>hm</think>So it is \\boxed{{{}}}."]
)
def test_hard_pairs(math, form: str) -> None:
    rows = pairs("hardverify")
    verdicts = math(
        [RewardInput(completion=form.format(r["pred"]), answer=r["gold"]) for r in rows]
    )
    accepted = {
        label: [v.score for r, v in zip(rows, verdicts, strict=True) if r["label"] is label]
        for label in (True, False)
    }
    assert sum(accepted[True]) / len(accepted[True]) >= 0.80
    assert sum(accepted[False]) / len(accepted[False]) <= 0.005


@needs_data
def test_every_reference_of_math500_verifies_itself(math) -> None:
    answers = [
        json.loads(line)["answer"] for line in (DATA / "math500_answers" / "answers.jsonl").open()
    ]
    verdicts = math([RewardInput(completion=f"\\boxed{{{a}}}", answer=a) for a in answers])
    assert [a for a, v in zip(answers, verdicts, strict=True) if v.score != 1] == []
    assert [a for a in answers if math.check_reference(RewardInput(completion="", answer=a))] == []


@needs_data
def test_answers_of_a_small_model(math) -> None:
    rows = [json.loads(line) for line in (DATA / "real_answers" / "answers.jsonl").open()]
    verdicts = math(
        [
            RewardInput(prompt=r["prompt"], completion=r["completion"], answer=r["answer"])
            for r in rows
        ]
    )
    assert [r for r, v in zip(rows, verdicts, strict=True) if (v.score == 1) != r["right"]] == []


def bombs() -> list[dict]:
    return [json.loads(line) for line in (DATA / "math_bombs" / "bombs.jsonl").open()]


def check_bomb(reward: MathReward, bomb: dict) -> float:
    start = time.perf_counter()
    verdict = grade(reward, bomb["pred"], bomb["gold"])
    assert verdict.score == float(bomb["id"] in EQUAL_BOMBS), bomb["id"]
    return time.perf_counter() - start


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("way", ["serial", "threads", "asyncio"])
def test_bombs_are_answered_in_time(way: str) -> None:
    reward = MathReward(timeout=3.0, concurrency=4)
    try:
        if way == "serial":
            seconds = [check_bomb(reward, bomb) for bomb in bombs()]
        elif way == "asyncio":

            async def together() -> list[float]:
                return await asyncio.gather(
                    *[asyncio.to_thread(check_bomb, reward, bomb) for bomb in bombs()]
                )

            seconds = asyncio.run(together())
        else:
            seconds = []
            threads = [
                threading.Thread(target=lambda b=b: seconds.append(check_bomb(reward, b)))
                for b in bombs()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert len(seconds) == len(threads)
    finally:
        reward.close()
    assert max(seconds) <= 3.5
    assert not [name for name in os.listdir("/tmp") if name.startswith("PWNED")]


@pytest.mark.slow
def test_fuzz() -> None:
    """`EMBERL_FUZZ=1000000 pytest tests/rewards/math_answers -k fuzz` is the long form."""
    count = int(os.environ.get("EMBERL_FUZZ", "500"))
    rng = random.Random(count)
    pieces = [
        "\\frac",
        "\\sqrt",
        "\\boxed",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "!",
        "+",
        "-",
        "\\cdot",
        "/",
        "=",
        "<",
        ",",
        "x",
        "n",
        "e",
        "i",
        "\\pi",
        "0",
        "1",
        "2",
        "9",
        "99",
        ".",
        "\\text{or}",
        " ",
        "\\le",
        "\\int",
        "\\sum",
        "|",
        "\\infty",
        "%",
        "\x00",
        "é",
        "$",
    ]
    reward = MathReward(timeout=1.0)
    golds = [
        "5",
        "\\frac{1}{2}",
        "x^2+1",
        "(1, 2]",
        "\\{1, 2\\}",
        "x = 3",
        "\\sum_{k} k",
        "\\text{odd}",
    ]
    try:
        for _ in range(0, count, 500):
            rows = [
                RewardInput(
                    completion="".join(rng.choices(pieces, k=rng.randint(1, 30)))
                    if rng.random() < 0.3
                    else "\\boxed{" + "".join(rng.choices(pieces, k=rng.randint(1, 20))) + "}",
                    answer=rng.choice(golds),
                )
                for _ in range(500)
            ]
            lost = [
                (r.completion, v)
                for r, v in zip(rows, reward(rows), strict=True)
                if v.score is None
            ]
            assert lost == []
    finally:
        reward.close()
