"""reasoning-gym's scorers in the sandbox: right, wrong, hedged, forged."""

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.sandbox.pool import SandboxUnavailable
from emberl.rewards.verdict import Status

reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym (the extra `gym`) is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gym():
    from emberl.rewards.gym import GymReward

    try:
        reward = GymReward(timeout=10.0)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    yield reward
    reward.close()


def row(completion: str, answer: str, task: str, **metadata) -> RewardInput:
    return RewardInput(completion=completion, answer=answer, columns={"metadata": {"source_dataset": task, **metadata}})


def test_scores_are_binary(gym) -> None:
    rows = [
        row("<answer>-4</answer>", "-4", "chain_sum"),
        row(
            "<think>-4</think><answer>-41</answer>", "-4", "chain_sum"
        ),  # the base scorer would give a part of 1 for this
        row("<answer>-4 or 5</answer>", "-4", "chain_sum"),
        row("<answer>cba</answer>", "cba", "spell_backward", word="abc"),
        row("<answer>7 or 7</answer>", "7", "prime_factorization", factors=[7]),
        row("<think>-4", "-4", "chain_sum"),
    ]
    assert [v.score for v in gym(rows)] == [1, 0, 0, 1, 0, 0]


def test_an_answer_that_the_scorer_would_run_must_be_arithmetic(gym) -> None:
    numbers = {"numbers": [2, 3], "target": 6, "expression": "2*3"}
    forged = "__import__('sys').stdout.write('1.0') or __import__('os')._exit(0)"
    verdicts = gym([row(f"<answer>{a}</answer>", "2*3", "countdown", **numbers) for a in ("2*3", "2+3", forged)])
    assert [v.score for v in verdicts] == [1, 0, 0]
    assert verdicts[2].status is Status.WRONG


def test_only_allowed_tasks(gym) -> None:
    odd = row("<answer>x</answer>", "x", "game_of_life_halting")
    assert gym([odd])[0].status is Status.VERIFIER_ERROR
    assert "options.tasks" in gym.check_reference(odd)
    assert gym.check_reference(row("", "1", "gcd")) is None
