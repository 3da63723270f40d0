"""Rewards: a completion in, a verdict out. Imports nothing of the rest of emberl."""

from .inputs import Reward, RewardInput, reward
from .verdict import Status, Verdict

__all__ = ["Reward", "RewardInput", "Status", "Verdict", "reward"]
