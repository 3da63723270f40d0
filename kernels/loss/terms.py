"""The interface between a head (hidden states to log-probs) and a loss: the kernels know no
algorithm.

Shape legend: n tokens of one chunk, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStats:
    """A head's statistics of n tokens; float32, or float64 where the hidden states are."""

    logp: Tensor
    """[n] log-prob of the target, never above 0."""
    one_minus_p: Tensor
    """[n] 1 - exp(logp), computed without cancellation."""
    entropy: Tensor | None = None
    """[n] entropy of the distribution in nats, where it was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTerms:
    """A loss of n tokens with its derivatives. The total loss is the plain sum over all tokens of
    `loss`: every mask, weight and denominator is already multiplied in, so that micro-batches and
    ranks simply add up."""

    loss: Tensor
    """[n]"""
    dlogp: Tensor
    """[n] derivative of the *total* loss by this token's log-prob; for a sequence-coupled loss not
    d loss[t]."""
    dentropy: Tensor | None = None
    """[n] derivative of the total loss by this token's entropy."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [n] per-token values to be averaged over loss tokens, e.g.
    `{"pg_clipfrac": clipped.float()}`."""


class TokenLoss(Protocol):
    """A loss as the kernels see it: a pure function of the tokens' statistics, called once per
    chunk."""

    @property
    def whole_sequences(self) -> bool:
        """True if tokens of one sequence are coupled (GSPO): a chunk must then hold whole
        sequences."""

    @property
    def needs_entropy(self) -> bool:
        """Whether `__call__` reads `stats.entropy`."""

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        """`index` [n] int64 says which of the batch's T tokens these are."""
        ...
