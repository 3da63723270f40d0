"""The policy as the learner runs it: a Hugging Face model up to its last hidden states, then the fused head and loss.

Shape legend: B sequences of a micro-batch, L their padded length, n loss tokens of the micro-batch, T tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.fused_loss import linear_logprob, linear_loss
from ...kernels.terms import TokenLoss, TokenStats, TokenTerms
from ..groups import Batch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatchTensors:
    """One padded micro-batch on the device. Sequences stand at the left, so that the causal mask alone keeps padding out."""

    token_ids_BL: Tensor
    rows_n: Tensor
    """Where in the flattened [B * L] hidden states each loss token is predicted: one position before the token itself."""
    targets_n: Tensor
    index_n: Tensor
    """Which of the batch's T tokens each loss token is."""
    sequence_ids_n: Tensor


HEIGHT, WIDTH = 8, 8
"""Padded sizes are multiples of these: libraries compile or look up a kernel for every new shape, so few shapes pay."""


def _round_up(size: int, multiple: int) -> int:
    return max(1, -(-size // multiple)) * multiple


def to_tensors(batch: Batch, sequences: tuple[int, ...], device: torch.device) -> MicroBatchTensors:
    """Pads these sequences of the batch; an empty tuple gives padding and no loss, to keep step with other ranks."""
    starts = np.concatenate(([0], np.cumsum(batch.sequence_lengths)))
    spans = [np.arange(starts[s], starts[s + 1]) for s in sequences] or [np.zeros(0, np.int64)]
    width = _round_up(max(len(span) for span in spans), WIDTH)
    token_ids = np.zeros((_round_up(len(spans), HEIGHT), width), np.int64)
    rows, index = [], []
    for i, span in enumerate(spans):
        token_ids[i, : len(span)] = batch.token_ids_T[span]
        where = np.flatnonzero(batch.loss_mask_T[span])
        assert not len(where) or where[0] > 0, "the first token of a sequence has nothing to be predicted from"
        rows.append(i * width + where - 1)
        index.append(span[where])
    index_n = np.concatenate(index)
    return MicroBatchTensors(
        token_ids_BL=torch.from_numpy(token_ids).to(device),
        rows_n=torch.from_numpy(np.concatenate(rows)).to(device),
        targets_n=torch.from_numpy(batch.token_ids_T[index_n].astype(np.int64)).to(device),
        index_n=torch.from_numpy(index_n).to(device),
        sequence_ids_n=torch.from_numpy(batch.sequence_ids_T[index_n]).to(device),
    )


class Policy(nn.Module):
    """Wraps a causal language model so that the whole of a pass, the head included, runs inside one `forward`: sharded
    parameters are gathered around that call and nowhere else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def hidden(self, micro: MicroBatchTensors) -> Tensor:
        """[n, H] the hidden states from which the loss tokens are predicted."""
        body = getattr(self.model, self.model.base_model_prefix)
        hidden_BLH = body(input_ids=micro.token_ids_BL, use_cache=False).last_hidden_state
        rows: Tensor = hidden_BLH.flatten(0, 1)[micro.rows_n]
        return rows

    def forward(
        self, micro: MicroBatchTensors, loss: TokenLoss | None, shift_n: Tensor | None, temperature: float
    ) -> tuple[Tensor | None, TokenStats, dict[str, Tensor]]:
        """The summed loss with its graph (None without a loss), the tokens' statistics and the loss's per-token metrics."""
        head = self.model.get_output_embeddings()
        hidden_nH, targets_n = self.hidden(micro), micro.targets_n
        if loss is None:
            stats = linear_logprob(
                hidden_nH,
                head.weight,
                targets_n,
                bias=head.bias,
                temperature=temperature,
                softcap=self.softcap,
                shift=shift_n,
            )
            return None, stats, {}
        return linear_loss(
            hidden_nH,
            head.weight,
            targets_n,
            MicroBatchLoss(loss, micro.index_n),
            bias=head.bias,
            temperature=temperature,
            softcap=self.softcap,
            shift=shift_n,
            sequence_ids=micro.sequence_ids_n if loss.whole_sequences else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchLoss:
    """A batch's loss as a micro-batch sees it: the kernels count the rows they were given, the loss the batch's tokens."""

    loss: TokenLoss
    index_n: Tensor

    @property
    def whole_sequences(self) -> bool:
        return self.loss.whole_sequences

    @property
    def needs_entropy(self) -> bool:
        return self.loss.needs_entropy

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        return self.loss(stats, self.index_n[index])
