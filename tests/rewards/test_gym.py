"""reasoning-gym's tasks: right, wrong, hedged, forged; and generic answers over every task that may
be graded."""

import json
import subprocess
import sys

import pytest
from emberl.rewards.gym import TASKS, GymReward
from emberl.rewards.gym_answers import EXACT, REFUSED, is_right
from emberl.rewards.inputs import RewardInput
from emberl.rewards.sandbox.pool import SandboxUnavailable
from emberl.rewards.verdict import Status

slow = pytest.mark.slow


def row(completion: str, answer: str, task: str, **metadata) -> RewardInput:
    return RewardInput(
        completion=completion,
        answer=answer,
        columns={"metadata": {"source_dataset": task, **metadata}},
    )


@pytest.fixture
def gym():
    reward = GymReward()
    yield reward
    reward.close()


def test_exact_tasks_need_neither_the_package_nor_a_sandbox(gym) -> None:
    rows = [
        row("<answer>-4</answer>", "-4", "chain_sum"),
        # the package would give a part of 1 for this
        row("<think>-4</think><answer>-41</answer>", "-4", "chain_sum"),
        row("<answer>-4 or 5</answer>", "-4", "chain_sum"),
        row("<answer>cba</answer>", "cba", "spell_backward", word="abc"),
        row("<answer>7 or 7</answer>", "7", "prime_factorization", factors=[7]),
        row("\\boxed{nan}", "1.0 + 2.0i", "complex_arithmetic", result=[1, 2]),
        row("<answer>2*3</answer>", "2*3", "countdown", numbers=[2, 3], target=6),
    ]
    assert [v.score for v in gym(rows)] == [1, 0, 0, 1, 0, 0, 1]
    assert gym([row("<think>-4", "-4", "chain_sum")])[0].score == 0


def test_only_tasks_that_can_be_graded(gym) -> None:
    odd = row("<answer>x</answer>", "x", "sokoban")
    assert gym([odd])[0].status is Status.VERIFIER_ERROR
    assert "options.tasks" in gym.check_reference(odd)
    assert gym.check_reference(row("", "1", "gcd")) is None
    assert "no answer to a problem" in gym.check_reference(row("", "nan", "complex_arithmetic"))
    for task in REFUSED:
        assert "cannot be graded" in gym.check_reference(row("", "1", task))
        with pytest.raises(ValueError, match="cannot be graded"):
            GymReward(tasks=[task])
    assert not TASKS & set(REFUSED)


@slow
def test_a_task_of_the_package_runs_its_scorer_in_the_sandbox() -> None:
    gym_package = pytest.importorskip(
        "reasoning_gym", reason="reasoning-gym (the extra `gym`) is not installed"
    )
    item = gym_package.create_dataset("letter_jumble", size=1, seed=1)[0]
    try:
        reward = GymReward(tasks=["letter_jumble"], timeout=20.0)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    try:
        verdicts = reward(
            [
                row(f"<answer>{a}</answer>", item["answer"], **_named(item))
                for a in (item["answer"], "x")
            ]
        )
    finally:
        reward.close()
    assert [v.score for v in verdicts] == [1, 0]


def _named(item: dict) -> dict:
    metadata = dict(item["metadata"])
    return {"task": metadata.pop("source_dataset"), **metadata}


GENERIC = [
    "", "0", "1", "-1", "2", "24", "yes", "no", "Yes", "No", "True", "False", "None", "null",
    "[]", "{}", "()", "[[]]", "nan", "NaN", "inf", "-inf", "infinity", "nanj", "0.0", "1.0",
    "0 0", "a", "?", "x", " ", "-", "...", "impossible", "8+8+4+4", "6*4*1*1",
    "[NaN, NaN, NaN]", "0x0", "1/1", "Monday", "00:00", "0 days", "0 days, 00:00",
    "True, False", "1 1 1", "*", "lambda: 1", "object()", "type",
]  # fmt: skip
SWEEP = """
import json, signal, sys
import reasoning_gym
from reasoning_gym.factory import DATASETS
generic, skipped = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))

def late(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, late)
found = {}
for task in sorted(set(DATASETS) - skipped):
    signal.alarm(20)
    try:
        items = [dict(item) for item in reasoning_gym.create_dataset(task, size=4, seed=5)]
        paid = {}
        if len(sys.argv) > 3:
            scorer = reasoning_gym.get_score_answer_fn(task)
            for item in items:
                answer = str(item["answer"])
                nans = "[" + ", ".join(["NaN"] * (answer.count(",") + 1)) + "]"
                for each in [*generic, item["question"], item["question"].split("\\n")[-1], nans]:
                    try:
                        score = float(scorer(answer=each, entry=item))
                    except Exception:
                        score = 0.0
                    if score >= 0.999 and each.strip().casefold() != answer.strip().casefold():
                        paid.setdefault(each, []).append(answer)
        found[task] = [items if len(sys.argv) == 3 else [], paid]
    except KeyboardInterrupt:
        pass  # a generator or scorer that takes too long under this load: nothing is said of it
    except ImportError:
        pass  # an optional dependency of one task
    finally:
        signal.alarm(0)
print("FOUND" + json.dumps(found, default=str))
"""


def _swept(skipped: set[str], *more: str) -> dict:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym (the extra `gym`) is not installed")
    command = [sys.executable, "-c", SWEEP, json.dumps(GENERIC), json.dumps(sorted(skipped)), *more]
    done = subprocess.run(command, capture_output=True, timeout=600, text=True, check=False)
    assert "FOUND" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND")[2])


@slow
def test_generic_answers_to_every_allowed_task() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym (the extra `gym`) is not installed")
    swept = _swept(set(_all_tasks()) - set(EXACT))
    assert set(swept) == set(EXACT)
    for task, (items, _) in swept.items():
        for item in items:
            answer, question = str(item["answer"]), item["question"]
            assert is_right(task, answer, item), (task, answer)
            nans = "[" + ", ".join(["NaN"] * (answer.count(",") + 1)) + "]"
            wrong = [
                *GENERIC,
                question,
                question.splitlines()[-1],
                nans,
                f"{answer} or 1",
                f"{answer} {answer}",
            ]
            paid = [
                each
                for each in wrong
                if is_right(task, each, item) and not _same(each, answer, task)
            ]
            assert paid == [], (task, answer)


def _same(given: str, answer: str, task: str) -> bool:
    """Equal after all: the same words, the same number, or another way to the same target."""
    if given.strip().casefold() == answer.casefold() or task in ("countdown", "puzzle24"):
        return True
    try:
        return float(given) == float(answer) or int(given, 0) == float(answer)
    except ValueError:
        return given.startswith("0x") and float(answer) == 0


def _all_tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return list(DATASETS)


@slow
def test_generic_answers_to_every_task_that_may_be_allowed_by_name() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym (the extra `gym`) is not installed")
    swept = _swept(set(EXACT) | set(REFUSED), "score")
    constant = {
        task: paid
        for task, (_, paid) in swept.items()
        if any(len(answers) == 4 for answers in paid.values())
    }
    assert constant == {}
    assert len(swept) > 40
