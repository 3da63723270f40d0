"""From groups, or from worked solutions, to the flat `Batch` that the learners train on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .algorithm.aggregation import Aggregation, token_weights
from .groups import Batch, Group


def make_batch(groups: Sequence[Group], aggregation: Aggregation, *, keep_all: bool = False) -> Batch | None:
    """The batch of all completions that have a verdict; None if no token is left that could train.

    Weights are computed over all of them. After that, a completion whose advantage is exactly 0 is left out of the
    passes, since its gradient is exactly 0 (`keep_all` keeps it, for a loss with a KL or entropy term); the
    denominators still count it.
    """
    rows = [
        (group.prompt.token_ids, completion, advantage)
        for group in groups
        for completion, verdict, advantage in zip(group.completions, group.verdicts, _advantages(group), strict=True)
        if verdict.trains and len(completion)
    ]
    if not rows:
        return None
    sequences = [np.concatenate([prompt, completion.token_ids]).astype(np.int32) for prompt, completion, _ in rows]
    batch = _flat(
        sequences,
        [len(prompt) for prompt, _, _ in rows],
        [completion.logprobs for _, completion, _ in rows],
        [float(advantage) for _, _, advantage in rows],
        aggregation,
    )
    live = [i for i, (_, _, advantage) in enumerate(rows) if keep_all or advantage != 0]
    return batch.select(live) if live else None


def sft_batch(examples: Sequence[tuple[Sequence[int], int]]) -> Batch:
    """(token ids, length of the prompt in them) pairs as a batch whose loss is the answers' mean negative log-likelihood."""
    sequences = [np.array(token_ids, dtype=np.int32) for token_ids, _ in examples]
    zeros = [np.zeros(len(token_ids) - start, np.float32) for token_ids, start in examples]
    return _flat(sequences, [start for _, start in examples], zeros, [1.0] * len(examples), "token-mean")


def _flat(
    sequences: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    logprobs: Sequence[np.ndarray],
    advantages: Sequence[float],
    aggregation: Aggregation,
) -> Batch:
    lengths = [len(s) for s in sequences]
    mask = np.concatenate([np.arange(n) >= start for n, start in zip(lengths, prompt_lengths, strict=True)])
    sequence_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    behaviour = np.zeros(len(mask), np.float32)
    behaviour[mask] = np.concatenate(logprobs)
    return Batch(
        token_ids_T=np.concatenate(sequences),
        positions_T=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        sequence_ids_T=sequence_ids,
        loss_mask_T=mask,
        behaviour_logp_T=behaviour,
        advantages_T=np.repeat(np.array(advantages, np.float32), lengths),
        weights_T=token_weights(mask, sequence_ids, aggregation),
        num_loss_tokens=int(mask.sum()),
    )


def _advantages(group: Group) -> np.ndarray:
    assert group.advantages is not None, f"group {group.prompt.id} has no advantages yet"
    return group.advantages
