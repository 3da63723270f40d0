"""The settings of supervised stages and of rejection sampling. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from .base import MOST_ANSWERS, MOST_STEPS, Settings
from .data import DataConfig


class SFTDataConfig(DataConfig):
    """Rows to imitate, with the keys of `data`: `source` alone may stand for all of it. A row has
    `messages` (or `conversations`), of which every turn of the assistant is learnt, or a prompt and
    its answer in `completion`, `response`, `output`, `solution` or `answer`, or where
    `prompt_column` and `solution_column` say. The template, the system prompt and the longest
    prompt are those of `data` unless set here."""

    ordered = False
    heldout: int = Field(default=0, ge=0, le=0)
    """0: `sft.heldout` says how many are held out."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping) else {"source": value}


class SFTConfig(Settings):
    """Supervised learning: of the source's worked solutions, or of any rows with answers. The loss
    is the answers' mean negative log-likelihood, of all answers of a step together."""

    data: SFTDataConfig | None = None
    """What is imitated: files, a Hub data set, or in a recipe `stage:NAME` of a `reject` stage;
    empty: the worked solutions of `data`."""
    epochs: float | None = Field(default=None, gt=0, le=1_000_000)
    """Passes over the rows, from which `steps` follows, whatever it says here (TRL's
    num_train_epochs, verl's total_epochs); empty: `steps` counts."""
    steps: int = Field(default=200, ge=1, le=MOST_STEPS)
    """Optimizer steps."""
    direct: float = Field(default=0.0, ge=0, le=1)
    """Share of the solutions shown without their work, as an empty `<think></think>` and the answer
    (Qwen3's way of not thinking): the model learns both ways, and RL finds out which of them
    pays."""
    batch_size: int = Field(default=256, ge=1, le=MOST_ANSWERS)
    """Problems, or rows of `sft.data`, per step."""
    lr: float = Field(default=2e-3, gt=0, le=1)
    """The largest learning rate."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps over which the rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after that: not at all, to 0 in a line, or along a cosine."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Where the cosine ends, as a share of `lr` (DeepSeek-R1: 0.1)."""
    heldout: int = Field(default=0, ge=0, le=MOST_ANSWERS)
    """Rows never trained on, whose loss is shown (`sft/heldout_loss`): of `sft.data` chosen by a
    hash of their text, of worked solutions those of the first held-out problems; 0: none."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between held-out losses; 0: only before the first step and after the last."""
    accuracy: bool = False
    """Whether held-out problems are also answered, as `eval` says, whenever the held-out loss is
    taken. In a recipe true unless set."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""

    @model_validator(mode="after")
    def _fits(self) -> SFTConfig:
        if self.direct and self.data is not None:
            raise ValueError(
                f"sft.direct={self.direct:g} takes the work out of worked solutions, but sft.data"
                " names rows that are learnt as they are; leave one of them out"
            )
        if self.min_lr_ratio and self.schedule != "cosine":
            raise ValueError(
                f"sft.min_lr_ratio={self.min_lr_ratio:g} is the end of a cosine; set"
                " sft.schedule=cosine"
            )
        return self


class RejectConfig(Settings):
    """Rejection sampling: answers to the problems of `data`, sampled as `rollout` says,
    `schedule.prompts_per_step` problems at a time. Those that the verifier marks correct and that
    were not cut become the rows of `samples.jsonl` in the run's directory."""

    problems: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """The first so many of the run's problems; empty: each of a data set once."""
    samples: int = Field(default=4, ge=1, le=65_536)
    """Answers to each problem."""
    keep: int = Field(default=1, ge=1, le=65_536)
    """Accepted answers that are kept of each problem, the first that differ."""

    @model_validator(mode="after")
    def _keeps(self) -> RejectConfig:
        if self.keep > self.samples:
            raise ValueError(
                f"reject.keep={self.keep} is more than reject.samples={self.samples}; raise samples"
            )
        return self
