"""The nouns of the loop: `Group`, a prompt's G graded completions; `Batch`, the flat tokens that a
learner trains on; `Progress`, how far a run has come.

Shape legend: G completions of a group, T tokens of a batch, S sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rewards.verdict import Verdict
from ..rollout.samples import Completion, Prompt
from .algorithm.advantages import all_equal

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """A prompt, its G completions, their verdicts and, once computed, their advantages."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]
    advantages: Floats | None = None
    """[G]; 0 for a completion without a verdict."""

    def __post_init__(self) -> None:
        assert len(self.completions) == len(self.verdicts), (
            f"{len(self.completions)} completions, {len(self.verdicts)} verdicts"
        )

    @property
    def scores(self) -> NDArray[np.float64]:
        """Scores [G], NaN for a completion without a verdict."""
        return np.array(
            [np.nan if v.score is None else v.score for v in self.verdicts], dtype=np.float64
        )

    @property
    def has_signal(self) -> bool:
        """Whether any two scores differ by more than rounding: without that every group-relative
        advantage is 0."""
        return not all_equal(self.scores)

    def with_advantages(self, advantages: Floats) -> Group:
        return replace(self, advantages=advantages)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Flat aligned arrays over the T tokens of S sequences, prompt tokens included.

    Position t holds what concerns token t *as a target*: `behaviour_logp_T[t]` is the log-prob with
    which token t was sampled, and `loss_mask_T[t]` says whether it trains. The learner predicts it
    from the hidden state at t - 1.
    """

    token_ids_T: Ints
    positions_T: Ints
    """0, 1, 2, ... within each sequence."""
    sequence_ids_T: Ints
    """0..S-1, ascending."""
    loss_mask_T: Bools
    behaviour_logp_T: Floats
    advantages_T: Floats
    weights_T: Floats
    """The share of each loss token in the batch's loss: masks, denominators and the aggregation in
    one number, computed over the *whole* step before it is split over ranks and micro-batches, so
    that partial losses simply add up."""
    num_loss_tokens: int
    """Loss tokens of the whole step, over all ranks and micro-batches."""
    share: float = 1.0
    """Share of the tokens or sequences counted in the weights' denominators that this batch has:
    below 1 if sequences without a gradient were left out of the passes."""
    correct_T: Bools | None = None
    """Whether the token's completion was graded as correct."""
    worker_ids_T: Ints | None = None
    """Number of the rollout worker that decoded the token's sequence; None: there is only one."""
    old_logp_T: Floats | None = None
    """Log-probs under the policy before the step's first update; None: not recomputed yet."""
    reference_logp_T: Floats | None = None
    """Log-probs under the frozen reference policy; None without one."""
    teacher_ids_T: Ints | None = None
    """With distillation: index of the sequence's teacher, -1 for none."""
    teacher_logp_T: Floats | None = None
    """Log-probs under that teacher, if it scores sampled tokens; 0 where there is none."""
    values_T: Floats | None = None
    """The critic's estimate before each loss token; None without a critic."""
    returns_T: Floats | None = None
    """The critic's targets; without a critic the return to go, with rewards per token."""
    rewards_T: Floats | None = None
    """The reward of each token, KL penalty included; None without rewards per token."""
    kl_T: Floats | None = None
    """Estimates of KL(policy || reference) that, times kl.coef, were subtracted from the tokens'
    rewards."""

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self._arrays()}
        assert len(set(lengths.values())) == 1, f"arrays of a batch must be aligned, got {lengths}"

    def _arrays(self) -> list[tuple[str, Any]]:
        named = ((name, getattr(self, name)) for name in self.__slots__ if name.endswith("_T"))
        return [(name, array) for name, array in named if array is not None]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """[S]"""
        return np.bincount(self.sequence_ids_T) if self.num_tokens else np.zeros(0, np.int64)

    def select(self, sequences: Sequence[int]) -> Batch:
        """The batch of these sequences in this order, renumbered from 0; weights stay those of the
        whole step."""
        starts = np.concatenate(([0], np.cumsum(self.sequence_lengths)))
        rows = [np.arange(starts[s], starts[s + 1]) for s in sequences]
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        arrays = {name: array[index] for name, array in self._arrays()}
        arrays["sequence_ids_T"] = np.repeat(
            np.arange(len(rows), dtype=np.int32), [len(r) for r in rows]
        )
        return replace(self, **arrays)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The driver's state; together with the learner's it determines the rest of the run."""

    stage: int = 0
    """Index into `stages`; equal to their number when the run is done."""
    step: int = 0
    """Steps done of this stage."""
    version: int = 0
    """Version of the weights."""
    position: int = 0
    """Problems taken from the source so far."""
    pending: tuple[tuple[int, int], ...] = ()
    """(position, RL step of admission) of the problems among these whose groups have not trained
    yet. A resumed run samples them again, before any new ones."""
    tokens: int = 0
    """Completion tokens sampled for training."""
    train_seconds: float = 0.0
    """Wall time of the RL steps that gave these tokens."""
    seconds: float = 0.0
    """Wall time of the whole run, set-up included, over all its attempts."""
    evaluating: int | None = None
    """The step whose evaluation is running, with the checkpoint's weights; a resumed run begins
    with it."""
    accuracy_start: float | None = None
    accuracy_end: float | None = None
    probe_noise_logp: float | None = None
    """Difference of log-probs between engines and learners by rounding alone, as `Level.logp`; None
    if not measured."""
    probe_noise_p: float | None = None
    """The same of probabilities, `Level.p`."""
    updates: int = 0
    """Optimizer steps of the policy in RL."""
    entropy_start: float | None = None
    """Entropy in nats per token of the first RL step that trained, the baseline of `Alarms`."""
    curriculum: Mapping[str, Any] | None = None
    """State of the order of problems (`data.mixture`, `data.curriculum`) after the first RL
    step."""
    warnings: tuple[str, ...] = ()
    """Warnings about a run that does not learn."""

    def advance(self, **changes: Any) -> Progress:
        return replace(self, **changes)
