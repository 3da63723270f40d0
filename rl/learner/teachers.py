"""The frozen teachers of on-policy distillation as a learner rank runs them.

Shape legend: n loss tokens of a micro-batch, T tokens of the batch, k compared entries of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.loss.divergence import Teaching
from ...kernels.loss.terms import TokenLoss
from ..algorithm.losses import Objective
from ..groups import Batch
from .logits import own_logits
from .policy import MicroBatchTensors, Policy, hidden_states
from .shards import passes

ROWS = 512
"""Tokens whose logits [ROWS, V] a teacher forms at a time."""


class Teacher(Policy):
    """A frozen policy that can also give whole distributions."""

    def forward(
        self,
        micro: MicroBatchTensors,
        loss: TokenLoss | None,
        shift_n: Tensor | None,
        temperature: float,
        teaching: Teaching | None = None,
        compared: tuple[int, int] | None = None,
    ) -> Any:
        """`Policy.forward`; or, for `compared` = (k, size of the student's vocabulary), the k
        highest log-probs [n, k] and their vocabulary ids [n, k] (None: all in order)."""
        if compared is None:
            return super().forward(micro, loss, shift_n, temperature, teaching)
        body = getattr(self.model, self.model.base_model_prefix)
        hidden_nH = hidden_states(body, micro)
        rows = [self._rows(part, temperature, *compared) for part in torch.split(hidden_nH, ROWS)]
        ids = None if rows[0][1] is None else torch.cat([row[1] for row in rows])
        return torch.cat([row[0] for row in rows]), ids

    def _rows(
        self, hidden_nH: Tensor, temperature: float, k: int, vocabulary: int
    ) -> tuple[Tensor, Any]:
        logits = own_logits(self.model, hidden_nH)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logp = torch.log_softmax(logits.to(wide) / temperature, -1)
        # output layers of one tokenizer may be padded to different sizes
        shared = min(vocabulary, logp.shape[1])
        if shared == vocabulary == logp.shape[1] and not 0 < k < shared:
            return logp, None
        best = logp[:, :shared].topk(min(k or shared, shared), dim=-1)
        return best.values, best.indices


def teaching(
    teachers: Sequence[Teacher],
    micro: MicroBatchTensors,
    batch: Batch,
    objective: Objective,
    vocabulary: int,
    cut: Callable[[tuple[int, ...]], MicroBatchTensors],
) -> Teaching:
    """The teachers' distributions for a micro-batch's loss tokens. Each teacher runs on its own
    sequences, of which `cut` makes a micro-batch, also if it has none: its pass is a collective."""
    distill, index = objective.distill, micro.index_n
    assert batch.teacher_ids_T is not None and distill.loss != "policy_gradient"
    teacher_n = torch.from_numpy(batch.teacher_ids_T.astype(np.int64)).to(index.device)[index]
    logp_nk: Tensor | None = None
    ids_nk: Tensor | None = None
    for number, teacher in enumerate(teachers):
        own_n = teacher_n == number
        sequences = torch.unique_consecutive(micro.sequence_ids_n[own_n]).tolist()
        with torch.no_grad(), passes(teacher):
            logp, ids = teacher(
                cut(tuple(sequences)),
                None,
                None,
                objective.temperature,
                compared=(distill.top_k, vocabulary),
            )
        if logp_nk is None:
            logp_nk = logp.new_zeros(len(index), logp.shape[1])
            ids_nk = None if ids is None else ids.new_zeros(len(index), logp.shape[1])
        logp_nk[own_n] = logp
        if ids_nk is not None:
            ids_nk[own_n] = ids
    assert logp_nk is not None
    weights_T = np.where(batch.loss_mask_T, batch.weights_T, 0.0)
    weights_n = torch.from_numpy(weights_T).to(index.device)[index]
    return Teaching(
        logp=logp_nk,
        ids=ids_nk,
        weights=torch.where(teacher_n >= 0, weights_n, 0.0),
        kind=distill.loss,
        beta=distill.beta,
        coef=distill.coef,
    )


def sampled_logprobs(
    teachers: Sequence[Teacher],
    batch: Batch,
    look: Callable[[Batch, Teacher], NDArray[Any]],
) -> NDArray[Any]:
    """Log-probs [T] of the loss tokens by their sequence's teacher, 0 where it has none; `look`
    gives those of a batch by one teacher."""
    assert batch.teacher_ids_T is not None
    first = np.flatnonzero(np.diff(batch.sequence_ids_T, prepend=-1))
    teacher_S = batch.teacher_ids_T[first]
    logp_T = np.zeros(batch.num_tokens, np.float64)
    for number, teacher in enumerate(teachers):
        sequences = np.flatnonzero(teacher_S == number)
        if len(sequences):  # the same on every rank
            where = np.isin(batch.sequence_ids_T, sequences)
            logp_T[where] = look(batch.select(sequences.tolist()), teacher)
    return logp_T
