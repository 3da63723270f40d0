"""How the losses of tokens add up to one number: a weight for every token, fixed over the whole
step.

The denominators are counted before the step is split over ranks and micro-batches, so that partial
losses are plain sums and no split changes the result. (A mean per micro-batch, as in TRL's bnpo,
lets short micro-batches weigh more.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.algorithm import Aggregation


def token_weights(
    mask: NDArray[np.bool_],
    sequence_ids: NDArray[Any],
    aggregation: Aggregation,
    *,
    norm_const: float | None = None,
    num_sequences: int | None = None,
) -> NDArray[np.float64]:
    """[T] the share of each loss token in the step's loss; 0 where `mask` is false.

    With N loss tokens, S sequences and n_i loss tokens in sequence i:

    - token-mean: 1 / N (DAPO, arXiv 2503.14476, eq. 8)
    - seq-mean-token-mean: 1 / (S n_i) (GRPO, arXiv 2402.03300, eq. 3)
    - seq-mean-token-sum: 1 / S (REINFORCE on whole sequences, RLOO)
    - seq-mean-token-sum-norm: 1 / (S norm_const) (Dr.GRPO, arXiv 2503.20783; TRL divides by the
      same number)

    Tokens that are rejected later (off-policy masks) get a weight of 0 in the loss, but stay in
    these counts, as in AReaL, TRL and OpenRLHF: else the kept ones would grow by N / N_kept. For
    the other way pass the narrowed mask.

    Args:
        mask: [T] which tokens train.
        sequence_ids: [T] integers from 0.
        norm_const: of seq-mean-token-sum-norm, e.g. the largest length of an answer.
        num_sequences: S, where sequences without a loss token are to count; default: those that
            have one.

    Raises:
        ValueError: no token trains, or `norm_const` is missing.
    """
    mask = np.asarray(mask, bool)
    counts = np.bincount(np.asarray(sequence_ids)[mask]) if mask.any() else np.zeros(0, np.int64)
    sequences = int(np.count_nonzero(counts)) if num_sequences is None else num_sequences
    if not len(counts) or sequences < 1:
        raise ValueError(
            f"the loss mask leaves none of {len(mask)} tokens to train; skip this step"
        )
    weights = np.zeros(len(mask), np.float64)
    if aggregation == "token-mean":
        weights[mask] = 1.0 / mask.sum()
    elif aggregation == "seq-mean-token-mean":
        weights[mask] = 1.0 / (sequences * counts[np.asarray(sequence_ids)[mask]])
    elif aggregation == "seq-mean-token-sum":
        weights[mask] = 1.0 / sequences
    else:
        if norm_const is None:
            raise ValueError(
                f"loss.aggregation={aggregation} needs loss.norm_const, e.g."
                " rollout.max_response_length"
            )
        weights[mask] = 1.0 / (sequences * norm_const)
    return weights


__all__ = ["Aggregation", "token_weights"]
