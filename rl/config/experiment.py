"""The keys of one experiment. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .algorithm import AdvantageConfig, FilterConfig, KLConfig, LossConfig, OffPolicyConfig
from .base import Settings
from .data import DataConfig
from .distill import DistillConfig
from .reward import RewardConfig
from .sampling import EvalConfig, RolloutConfig
from .settings import (
    CheckpointConfig,
    ClusterConfig,
    CriticConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    ScheduleConfig,
    SyncConfig,
    TrackingConfig,
)
from .supervised import RejectConfig, SFTConfig


class Experiment(Settings):
    """All keys with their defaults; `load.Config` checks how they fit together."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^/\x00-\x1f.\s][^/\x00-\x1f]*$")
    """Names the run's directory, and the run in W&B."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Fixes every draw: the data's order, sampled tokens, the weights of what is made here."""
    run_dir: str = ""
    """Where everything is written; empty: `runs/<name>`."""
    stages: tuple[Literal["sft", "rl", "reject"], ...] = ("rl",)
    """What is done, in this order: a cold start on worked solutions (`sft`), reinforcement learning
    (`rl`); or alone, sampling of answers that the verifier accepts (`reject`). A list of sections
    with a `name` and a `kind` makes the file a recipe."""
    algorithm: str = "grpo"
    """A preset for `advantage`, `loss`, `kl`, `offpolicy`, `filter`, `critic` and `schedule`; what
    those groups set themselves wins, and is said at the start (`cautions.changes`)."""
    model: ModelConfig
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    reject: RejectConfig = RejectConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    kl: KLConfig = KLConfig()
    offpolicy: OffPolicyConfig = OffPolicyConfig()
    filter: FilterConfig = FilterConfig()
    distill: DistillConfig = DistillConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sync: SyncConfig = SyncConfig()
    optim: OptimConfig = OptimConfig()
    critic: CriticConfig = CriticConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def output(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def updates(self) -> int:
        """Optimizer steps of the RL stage, if every part of every step has a signal."""
        return self.schedule.steps * self.schedule.minibatches * self.schedule.epochs

    @property
    def sft_optim(self) -> OptimConfig:
        """The optimizer of the supervised stage."""
        sft = self.sft
        names = ("lr", "warmup_steps", "schedule", "min_lr_ratio")
        return self.optim.model_copy(update={name: getattr(sft, name) for name in names})

    @property
    def grades(self) -> bool:
        """Whether any answer will be marked."""
        return self.stages != ("sft",) or (self.sft.accuracy and self.eval.active)

    @property
    def max_model_length(self) -> int:
        """Tokens of the longest prompt and the longest answer together, in training or
        evaluation."""
        longest = self.rollout.max_response_length
        sets = [each.beside(self.data) for each in self.eval.sets.values()]
        return max(
            self.data.max_prompt_length + longest,
            *(s.max_prompt_length + (s.max_response_length or longest) for s in sets),
            0,
        )
