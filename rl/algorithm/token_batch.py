"""A loss's view of a chunk of tokens, and sums over the sequences in it.

Shape legend: n tokens of a chunk, S sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...kernels import platform


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBatch:
    """Aligned [n] tensors of loss tokens, all finite, in the dtype of the log-probs."""

    old_logp: Tensor
    """Log-prob under the ratio's old policy: the rollout's, or recomputed
    (`offpolicy.old_logp`)."""
    behaviour_logp: Tensor
    """Log-prob with which the engine sampled the token."""
    advantages: Tensor
    sequence: Tensor
    """Index of the token's sequence in the whole batch, int64."""
    length: Tensor
    """Number of loss tokens of the token's whole sequence."""
    reference_logp: Tensor | None = None
    entropy: Tensor | None = None

    def select(self, index: Sequence[int]) -> TokenBatch:
        """The batch of these tokens only."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: v[list(index)] for name, v in values.items() if v is not None}
        )

    def sums(self, values: Tensor) -> Tensor:
        """The sum [n] of `values` over this chunk's tokens of each token's sequence, added up in
        float64: in float32, one after the other, the gradient of an answer of 100,000 tokens would
        have a relative error of 1e-4."""
        if not len(values):
            return values
        wide = platform.sum_dtype(values.device.type)
        totals = torch.zeros(int(self.sequence.max()) + 1, dtype=wide, device=values.device)
        return totals.index_add(0, self.sequence, values.to(wide))[self.sequence].to(values.dtype)

    def means(self, values: Tensor) -> Tensor:
        """`sums` divided by the sequence's number of loss tokens, [n]."""
        return self.sums(values) / self.length


def tiny_batch() -> tuple[Tensor, TokenBatch]:
    """Log-probs and a batch of three sequences of 3, 1 and 4 tokens in float64, with ratios between
    0.6 and 1.6."""
    logp = torch.tensor([-0.9, -0.4, -1.7, -2.2, -0.15, -1.1, -0.6, -0.35], dtype=torch.float64)
    gap = torch.tensor([0.13, -0.31, 0.42, -0.07, 0.05, -0.45, 0.21, -0.12], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    return logp, TokenBatch(
        old_logp=logp - gap,
        behaviour_logp=logp - 1.1 * gap,
        advantages=torch.tensor([0.7, -0.3, 1.2], dtype=torch.float64)[sequence],
        sequence=sequence,
        length=torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)[sequence],
        reference_logp=logp - 0.5 * gap,
        entropy=torch.linspace(0.5, 1.5, 8, dtype=torch.float64),
    )
