"""A ragged example with hand-computed results, and ragged batches from a seed, with garbage where
the mask is false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.loss.terms import TokenStats, TokenTerms
from emberl.rl.algorithm.losses import Objective, token_loss
from emberl.rl.batch import token_weights
from emberl.rl.config.algorithm import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.groups import Batch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """A batch of T tokens with what three policies say of them."""

    batch: Batch
    logp: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    entropy: np.ndarray

    def terms(
        self,
        objective: Objective,
        index: np.ndarray | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> TokenTerms:
        """What the assembled loss says of the tokens `index`; by default of all loss tokens."""
        index = np.flatnonzero(self.batch.loss_mask_T) if index is None else index
        loss = token_loss(
            objective, self.batch, CPU, old_logp=self.old, reference_logp=self.reference
        )
        return loss(self.stats(index, dtype), torch.from_numpy(index))

    def stats(self, index: np.ndarray, dtype: torch.dtype = torch.float64) -> TokenStats:
        logp = torch.from_numpy(self.logp[index]).to(dtype)
        entropy = torch.from_numpy(self.entropy[index]).to(dtype)
        return TokenStats(logp=logp, one_minus_p=-torch.expm1(logp), entropy=entropy)

    def sequences(self) -> list[np.ndarray]:
        """The places of each sequence's loss tokens among T."""
        mask, ids = self.batch.loss_mask_T, self.batch.sequence_ids_T
        return [np.flatnonzero(mask & (ids == s)) for s in range(int(ids.max()) + 1)]


def make_step(
    sequence_ids: np.ndarray,
    mask: np.ndarray,
    aggregation: str = "token-mean",
    *,
    garbage: float = np.nan,
    norm_const: float = 7.0,
    **columns: np.ndarray,
) -> Step:
    """A step of these columns; `logp`, `old`, `behaviour`, `reference`, `advantages`, `entropy`,
    each [T]."""
    there = {name: np.where(mask, column, garbage) for name, column in columns.items()}
    batch = Batch(
        token_ids_T=np.zeros(len(mask), np.int32),
        positions_T=np.zeros(len(mask), np.int32),
        sequence_ids_T=sequence_ids.astype(np.int32),
        loss_mask_T=mask,
        behaviour_logp_T=there["behaviour"],
        advantages_T=there["advantages"],
        weights_T=token_weights(mask, sequence_ids, aggregation, norm_const=norm_const),
        num_loss_tokens=int(mask.sum()),
    )
    return Step(batch, there["logp"], there["old"], there["reference"], there["entropy"])


def random_step(seed: int, aggregation: str = "token-mean", **options: Any) -> Step:
    """One to six sequences of one to seven tokens, a third of them masked, at least one loss token
    in each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, rng.integers(1, 7))
    ids = np.repeat(np.arange(len(lengths)), lengths)
    mask = rng.random(len(ids)) < 0.67
    mask[np.cumsum(lengths) - 1] = True
    logp = -rng.gamma(1.0, 1.0, len(ids)) - 0.01
    spread = rng.choice([0.05, 0.5, 1.5])
    columns = {
        name: logp - spread * rng.standard_normal(len(ids))
        for name in ("old", "behaviour", "reference")
    }
    advantages = np.repeat(rng.standard_normal(len(lengths)), lengths)
    entropy = rng.random(len(ids))
    return make_step(
        ids,
        mask,
        aggregation,
        logp=logp,
        advantages=advantages,
        entropy=entropy,
        **columns,
        **options,
    )


def hand_step(aggregation: str = "token-mean") -> Step:
    """Four sequences of 5, 2, 3 and 4 tokens with scores 1, 0, 1, 0.5 in two groups of two, and
    given log-ratios."""
    log_ratio = np.array(
        [0.1, -0.3, 0.4, 0, -0.05, 0.3, -0.5, -0.2, 0.25, 0.6, 0.05, -0.1, 0.9, -0.9]
    )
    old = np.array([-1, -0.5, -2, -0.1, -0.7, -0.3, -1.2, -0.9, -0.4, -1.5, -0.2, -0.6, -0.8, -1.1])
    ids = np.repeat(np.arange(4), [5, 2, 3, 4])
    advantages = np.array([0.5, -0.5, 0.25, -0.25])[ids]
    columns = {
        "logp": old + log_ratio,
        "old": old,
        "behaviour": old,
        "reference": old,
        "entropy": np.ones(14),
    }
    return make_step(
        ids, np.ones(14, bool), aggregation, norm_const=5.0, advantages=advantages, **columns
    )


def make_objective(
    kl: dict[str, Any] | None = None, offpolicy: dict[str, Any] | None = None, **loss: Any
) -> Objective:
    policy = OffPolicyConfig(**(offpolicy or {"old_logp": "recompute"}))
    return Objective.of(LossConfig(**loss), KLConfig(**(kl or {})), policy)


@pytest.fixture
def hand() -> Callable[..., Step]:
    return hand_step


@pytest.fixture
def ragged() -> Callable[..., Step]:
    return random_step


@pytest.fixture
def columns() -> Callable[..., Step]:
    return make_step


@pytest.fixture
def objective() -> Callable[..., Objective]:
    return make_objective
