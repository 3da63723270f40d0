"""The reward that an environment gave, as a part of the reward suite: `{use: environment}`."""

from __future__ import annotations

from collections.abc import Sequence

from .inputs import RewardInput
from .verdict import Status, Verdict, verifier_error


class EnvironmentReward:
    """The sum of the rewards of an episode's turns, from the column `episode`: 1 or more is
    correct, 0 or less is wrong."""

    inline = True

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return [_verdict(row.columns.get("episode")) for row in batch]


def _verdict(episode: object) -> Verdict:
    reward = episode.get("reward") if isinstance(episode, dict) else None
    if not isinstance(reward, (int, float)):
        return verifier_error("the environment gave no reward: return one from its step")
    status = Status.CORRECT if reward >= 1 else Status.WRONG if reward <= 0 else Status.PARTIAL
    return Verdict(status=status, score=float(reward))
