"""The gate on every step: over the tokens that train, engines' and learners' probabilities differ
by rounding, and by the updates in between where rollouts run ahead, and by nothing else.

These tokens are many and were decoded on the real path, so this sees what a proof at the start
cannot, an engine that stayed behind later. It compares probabilities, on which rare tokens weigh
little, with the median of the versions before; the KL only warns, since a single rare token can
make it.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping

from ...rollout.actors import ActorLostError

MEAN = "training/rollout_probs_diff_mean"
KL = "rollout_corr/k3_kl"
OF_WORKER = re.compile(rf"{MEAN}/worker_(\d+)")
STALENESS = "sched/staleness/max"
WARN, STOP, KL_WARN = 3.0, 8.0, 30.0
"""Times what is expected."""
WARN_LEAST, STOP_LEAST = 0.05, 0.2
"""Shares of the absolute tolerance below which nothing is said, and nothing stops."""
REMEMBERED = 32
"""Steps whose median is expected."""


class Gate:
    """Sees the metrics of each step in turn."""

    def __init__(self, tolerance: float) -> None:
        """tolerance: of `Probe`, nats."""
        self._tolerance = tolerance
        self._noise: deque[float] = deque(maxlen=REMEMBERED)
        self._kl: deque[float] = deque(maxlen=REMEMBERED)
        self._ahead: deque[float] = deque(maxlen=REMEMBERED)
        """How far apart steps were whose rollouts ran ahead of the learners."""

    def begin_stage(self) -> None:
        """What comes is another model: what its rounding is has to be measured anew."""
        self._noise.clear()
        self._kl.clear()
        self._ahead.clear()

    def check(
        self,
        metrics: Mapping[str, float],
        *,
        version: int,
        moved: float | None,
        within: float = 0.0,
    ) -> dict[str, float]:
        """`sync/gate`: how far the step's tokens are from the learners, where 1 is the threshold
        from which there is an alarm (`Alarms`); nothing of a step without such figures.

        version: that was served when the step began. moved: what one update changes of the
        probabilities, as the probe measured it. within: updates of this step before the last of
        its log-probs. ActorLostError past a second threshold, but only
        of steps whose tokens are all of that version.
        """
        if MEAN not in metrics:
            return {}
        worker, apart = self._furthest(metrics)
        stale = metrics.get(STALENESS, 0.0) + within
        between = max(stale * (moved or 0.0), (stale > 0) * (self._median(self._ahead) or 0.0))
        expected = self._median(self._noise)
        # the first steps are held to the absolute bounds alone
        warn = max(WARN_LEAST * self._tolerance, WARN * ((expected or 0.0) + between))
        stop = max(STOP_LEAST * self._tolerance, STOP * (expected or 0.0))
        if expected is None:
            warn, stop = self._tolerance / 2 + WARN * between, self._tolerance
        if stale > 0:
            # how far an update of the learners' own may go is not known beforehand
            stop = math.inf
            self._ahead.append(apart)
        if not apart <= stop:  # NaN is not
            raise ActorLostError(
                f"{worker} decoded with other weights than version {version}: the probabilities of"
                f" the tokens that train differ from the learners' by {apart:.3g} on average, where"
                f" rounding of {expected or 0.0:.3g} is expected and {stop:.3g} is the most; a"
                " graph, a packed copy or a cache is older than the weights, or the engine draws"
                " from another distribution than it says"
            )
        kl = abs(metrics.get(KL, 0.0))
        usual = self._median(self._kl)
        kl_warn = max(self._tolerance**2, KL_WARN * (usual or 0.0))
        if usual is None or between:
            kl_warn = math.inf
        figure = max(apart / warn, kl / kl_warn)
        if figure <= 1 and not stale:
            self._noise.append(apart)
            self._kl.append(kl)
        return {"sync/gate": figure}

    def _furthest(self, metrics: Mapping[str, float]) -> tuple[str, float]:
        """Who is furthest from the learners, and how far."""
        workers = {
            f"rollout worker {found[1]}": value
            for name, value in metrics.items()
            if (found := OF_WORKER.fullmatch(name))
        }
        if not workers:
            return "the only rollout worker", metrics[MEAN]
        worst = max(workers, key=lambda name: (math.isnan(workers[name]), workers[name]))
        return worst, max(metrics[MEAN], workers[worst])

    @staticmethod
    def _median(values: deque[float]) -> float | None:
        return sorted(values)[len(values) // 2] if values else None


__all__ = ["Gate"]
