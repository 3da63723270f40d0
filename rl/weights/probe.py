"""The end-to-end check of a new version: engines and learners must give the same tokens the same
log-probs.

Digests prove which bytes an engine holds, not that it computes with them: a packed copy of older
weights, a cache that outlived them or weights laid out for other kernels pass every digest.

Engines and learners multiply with different kernels, so their log-probs differ by rounding. How
much depends on the model: on a 135M model in bfloat16 by 0.05 nats on average, by 1 and more for
rare tokens, in float32 by 1e-5. So the first version, for which only an absolute bound holds,
measures the noise, and later ones are compared with the median of all before them. Two figures are
compared, both insensitive to the few rare tokens that dominate a plain mean: the mean difference of
the log-probs of the three quarters of the tokens that differ least, and the mean difference of the
probabilities.

Detected are faults that move the log-probs by more than about twice the noise of so many tokens,
and an engine that goes on computing with any earlier version as a whole, however near, if its
results repeat bit for bit (on a CPU they do). Not detected is a stale part of the weights whose
effect is smaller than the noise. In float32 one step of one tensor is well above it; in bfloat16 a
single stale layer stayed below it for the sixty steps of lr=1e-5 that were tried, as may a slow
drift that is spread over hundreds of versions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...rollout.actors import ActorLostError
from ..data.sources import PromptSource
from ..groups import Batch

Values = NDArray[np.floating[Any]]

TOLERANCE = {"float32": 0.01, "float64": 0.01}
OTHER_TOLERANCE = 0.1
"""The absolute bound on `Level.logp`, for the first version and for every later one; on `Level.p`
it is half of this."""
NEAR = 0.75
"""Share of the tokens, those that differ least, whose log-probs are compared."""
FACTOR, FACTOR_TOKENS = 1.75, 50.0
"""A level of N tokens may be FACTOR + FACTOR_TOKENS / N times the median of the versions before:
2.1 at 127 tokens, where 77 versions of a 135M model in bfloat16 (AdamW, lr=1e-5) stayed below
1.4."""
FIRST_FACTOR = 0.5
"""After n versions the bound is wider by this / n."""
LEAST, SLACK, MOST_LOGP, MOST_P = 1e-4, 100.0, 0.03, 0.01
"""The bound is at least `LEAST`, and at least `SLACK` times the first version's level but at most
`MOST_LOGP` and `MOST_P`: noise grows as a small model becomes sure of its answers."""
SETTLED = 8
"""Number of versions for which a level measured in an earlier attempt counts."""
REMEMBERED = 256
"""Versions whose results are kept, to recognise an engine that repeats them."""


def probe_ids(source: PromptSource, count: int) -> tuple[int, ...]:
    """The tokens of the first training prompts, one after another, `count` in all."""
    token_ids: list[int] = []
    position = 0
    while len(token_ids) < count:
        token_ids += source.train(position).token_ids
        position += 1
    return tuple(token_ids[:count])


def as_batch(token_ids: Sequence[int]) -> Batch:
    """A batch of one sequence in which every token but the first is a loss token."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """The difference between two computations of the same log-probs; `logp` is NaN if any of them
    is not finite."""

    logp: float
    """Mean |difference| in nats of the three quarters of the tokens that differ least."""
    p: float
    """Mean |difference| of the probabilities."""

    @classmethod
    def between(cls, found: Values, expected: Values) -> Level:
        """The level of two [N] arrays of log-probs."""
        apart = np.abs(found.astype(np.float64) - expected)
        near = np.sort(apart)[: max(1, int(NEAR * len(apart)))]
        probabilities = np.abs(
            np.exp(found.astype(np.float64)) - np.exp(expected.astype(np.float64))
        )
        finite = bool(np.isfinite(apart).all())
        return cls(
            logp=float(near.mean()) if finite else float("nan"), p=float(probabilities.mean())
        )

    def within(self, bound: Level) -> bool:
        return self.logp <= bound.logp and self.p <= bound.p  # False for NaN


class Probe:
    """Compares engines and learners at every version, with a bound from the noise of those before
    it."""

    def __init__(self, tolerance: float, level: Level | None = None) -> None:
        """tolerance: the absolute bound, in nats. level: the noise measured by an earlier attempt
        of the run."""
        self._tolerance = tolerance
        self._levels: list[Level] = [] if level is None else [level] * SETTLED
        self._seen: dict[bytes, tuple[int, Values]] = {}

    @property
    def level(self) -> Level | None:
        """The noise so far; None before the first version."""
        if not self._levels:
            return None
        return Level(
            logp=float(np.median([level.logp for level in self._levels])),
            p=float(np.median([level.p for level in self._levels])),
        )

    def begin_stage(self) -> None:
        """Forgets the noise, since the next version is a whole stage later, another model."""
        self._levels.clear()

    async def check(
        self,
        expected: Values,
        found: Sequence[Values],
        reload: Callable[[int], Awaitable[Values]],
        *,
        version: int,
        changed: float | None = None,
    ) -> dict[str, float]:
        """Compares the learners' log-probs [N] with each worker's; returns metrics of the
        differences.

        reload: makes a worker load everything once more, and returns its log-probs then. changed:
        the share of the weights that this version changes; None: unknown. Raises ActorLostError if
        they differ after a reload too, and ValueError if the learners' own are not finite, which is
        no engine's fault.
        """
        wrong = int(np.count_nonzero(~np.isfinite(expected)))
        if wrong:
            raise ValueError(
                f"the learners' own log-probs of {wrong} of {len(expected)} tokens are NaN or"
                f" infinite at version {version}: their weights are damaged; resume from an earlier"
                " checkpoint"
            )

        async def again(worker: int) -> tuple[Values, Values]:
            return await reload(worker), expected

        pairs = [(logprobs, expected) for logprobs in found]
        return await self.check_pairs(pairs, again, version=version, changed=changed)

    async def check_pairs(
        self,
        found: Sequence[tuple[Values, Values]],
        reload: Callable[[int], Awaitable[tuple[Values, Values]]],
        *,
        version: int,
        changed: float | None = None,
        what: str = "compute with",
        other: str = "theirs",
    ) -> dict[str, float]:
        """As `check`, of pairs (a worker's log-probs [N], the expected ones). what, other: words
        for the error: what the worker does not do, and what it is compared with."""
        results, reloads = list(found), 0
        for worker, pair in enumerate(results):
            bound = self._bound(len(pair[1]))
            if self._fault(*pair, bound, changed, other) is None:
                continue
            reloads += 1
            results[worker] = pair = await reload(worker)
            fault = self._fault(*pair, bound, changed, other)
            if fault is not None:
                raise ActorLostError(
                    f"rollout worker {worker} does not {what} version {version} that it"
                    f" holds: the digest of every tensor is the learners', but {fault}, also after"
                    " it loaded all weights once more; sync.probe_tokens=0 switches the"
                    " comparison off"
                )
        levels = [Level.between(*pair) for pair in results]
        self._levels.append(
            Level(logp=max(level.logp for level in levels), p=max(level.p for level in levels))
        )
        for logprobs, expected in results:
            self._seen.setdefault(logprobs.tobytes(), (version, expected))
        while len(self._seen) > REMEMBERED:
            self._seen.pop(next(iter(self._seen)))
        apart = [np.abs(logprobs - expected) for logprobs, expected in results]
        return {
            "sync/probe_diff_mean": max(float(values.mean()) for values in apart),
            "sync/probe_diff_max": max(float(values.max()) for values in apart),
            "sync/probe_noise": self._levels[-1].logp,
            "sync/probe_noise_p": self._levels[-1].p,
            "sync/reloads": float(reloads),
        }

    def _bound(self, tokens: int) -> Level:
        most = Level(logp=self._tolerance, p=self._tolerance / 2)
        level = self.level
        if level is None:
            return most
        factor = (FACTOR + FACTOR_TOKENS / tokens) * (1 + FIRST_FACTOR / len(self._levels))
        first = self._levels[0]
        logp = max(factor * level.logp, LEAST, min(SLACK * first.logp, MOST_LOGP))
        p = max(factor * level.p, LEAST, min(SLACK * first.p, MOST_P))
        return Level(logp=min(most.logp, logp), p=min(most.p, p))

    def _fault(
        self,
        found: Values,
        expected: Values,
        bound: Level,
        changed: float | None,
        other: str = "theirs",
    ) -> str | None:
        """A description of the fault in an engine's log-probs; None if there is none."""
        level = Level.between(found, expected)
        if not level.within(bound):
            at = int(np.argmax(np.abs(found - expected))) + 1
            return (
                f"the log-probs of {len(expected)} tokens differ from {other} by {level.logp:.3g}"
                f" and the probabilities by {level.p:.3g} on average, where {bound.logp:.3g} and"
                f" {bound.p:.3g} are noise (most at token {at})"
            )
        earlier = self._seen.get(found.tobytes())
        if earlier is None or not changed:
            return None
        version, theirs = earlier
        whose = "the learners' have" if other == "theirs" else f"{other} has"
        moved = int(np.count_nonzero(theirs != expected))
        if 2 * moved < len(expected):
            return None
        return (
            f"the log-probs of {len(expected)} tokens are those of version {version} bit for bit,"
            f" while {whose} changed at {moved}"
        )


def tolerance_of(dtype: str) -> float:
    """The absolute tolerance in nats for weights served in `dtype` (as in `model.dtype`)."""
    return TOLERANCE.get(dtype, OTHER_TOLERANCE)


__all__ = ["Level", "Probe", "as_batch", "probe_ids", "tolerance_of"]
