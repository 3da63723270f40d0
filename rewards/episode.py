"""The reward of an environment as a part of the reward suite: `{use: environment}`."""

from __future__ import annotations

from collections.abc import Sequence

from .inputs import Reward, RewardInput
from .verdict import Status, Verdict, verifier_error

EPISODE = "episode"
"""The column with `{"reward", "turns", "status"}` of an episode."""


class EnvironmentReward(Reward):
    """The sum of an episode's rewards over its turns, from the column `EPISODE`: 1 or more is
    correct, 0 or less is wrong.

    An episode that ran out of tokens or turns before it had a reward scores 0.
    """

    inline = True

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return [_verdict(row.columns.get(EPISODE)) for row in batch]


def _verdict(episode: object) -> Verdict:
    if not isinstance(episode, dict):
        return verifier_error("there is no episode: set rollout.environment, or use another reward")
    reward, status = episode["reward"], Status.PARTIAL
    if reward is None:
        if episode["status"] == "done":
            return verifier_error("the environment ended the episode without any reward")
        return Verdict(status=Status.OVER_LIMIT, score=0.0, message=f"ended by {episode['status']}")
    if reward >= 1 or reward <= 0:
        status = Status.CORRECT if reward >= 1 else Status.WRONG
    return Verdict(status=status, score=float(reward))
