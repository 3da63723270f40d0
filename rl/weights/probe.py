"""The end-to-end proof of a new version: engines and learners give the same tokens the same log-probs.

Digests prove which bytes an engine holds, not that it computes with them: a packed copy of older weights, a cache that
outlived them or weights laid out for other kernels pass every digest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...rollout.actors import ActorLostError
from ..data.sources import PromptSource
from ..groups import Batch

TOLERANCE = {"float32": 0.01, "float64": 0.01}
OTHER_TOLERANCE = 0.1
"""Mean absolute difference in nats. Kernels differ by less than a tenth of this; other weights by several times as much."""


def probe_ids(source: PromptSource, count: int) -> tuple[int, ...]:
    """The tokens of the first training prompts, one after another, `count` in all."""
    token_ids: list[int] = []
    position = 0
    while len(token_ids) < count:
        token_ids += source.train(position).token_ids
        position += 1
    return tuple(token_ids[:count])


def as_batch(token_ids: Sequence[int]) -> Batch:
    """One sequence of which every token but the first counts."""
    size = len(token_ids)
    zeros = np.zeros(size, np.float32)
    return Batch(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=np.arange(size, dtype=np.int32),
        sequence_ids_T=np.zeros(size, np.int32),
        loss_mask_T=np.arange(size) > 0,
        behaviour_logp_T=zeros,
        advantages_T=zeros,
        weights_T=zeros,
        num_loss_tokens=size - 1,
    )


def check_probe(
    expected: NDArray[np.floating[Any]],
    found: Sequence[NDArray[np.floating[Any]]],
    reload: Callable[[int], NDArray[np.floating[Any]]],
    *,
    tolerance: float,
    version: int,
) -> dict[str, float]:
    """Compares the learners' log-probs [N] with each worker's; returns figures of the differences.

    reload: has a worker load everything once more and gives its log-probs then. ActorLostError where they differ still.
    """
    results, reloads = list(found), 0
    for worker, logprobs in enumerate(results):
        if not _mean(logprobs, expected) <= tolerance:  # NaN must not pass
            reloads += 1
            results[worker] = logprobs = reload(worker)
            if not _mean(logprobs, expected) <= tolerance:
                at = int(np.argmax(np.abs(logprobs - expected))) + 1
                raise ActorLostError(
                    f"rollout worker {worker} does not compute with version {version} that it holds: the digest of every tensor "
                    f"is the learners', but the log-probs of {len(expected)} tokens differ from theirs by "
                    f"{_mean(logprobs, expected):.3g} on average (most at token {at}; tolerance {tolerance:g}), also after it "
                    "loaded all weights once more; sync.probe_tokens=0 switches the comparison off"
                )
    return {
        "sync/probe_diff_mean": max(_mean(logprobs, expected) for logprobs in results),
        "sync/probe_diff_max": max(float(np.abs(logprobs - expected).max()) for logprobs in results),
        "sync/reloads": float(reloads),
    }


def tolerance_of(dtype: str) -> float:
    """For weights served in `dtype` (as in `model.dtype`)."""
    return TOLERANCE.get(dtype, OTHER_TOLERANCE)


def _mean(logprobs: NDArray[np.floating[Any]], expected: NDArray[np.floating[Any]]) -> float:
    return float(np.abs(logprobs - expected).mean())


__all__ = ["as_batch", "check_probe", "probe_ids", "tolerance_of"]
