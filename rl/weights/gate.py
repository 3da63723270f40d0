"""The gate on every step: a check that, over the tokens that train, the probabilities of engines
and learners differ only by rounding, and by the updates in between if rollouts run ahead.

These tokens are many and were decoded on the real path, so this finds an engine that becomes stale
later, which a proof at the start cannot. It compares probabilities, in which rare tokens have
little weight, with the median of earlier versions; the KL only warns, since a single rare token can
dominate it.
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
"""Multiples of the expected difference at which there is a warning and an error, and of the
expected KL at which there is a warning."""
WARN_LEAST, STOP_LEAST = 0.05, 0.2
"""Shares of the absolute tolerance below which there is no warning, and no error."""
REMEMBERED = 32
"""Steps over which the median is taken."""


class Gate:
    """Checks the metrics of each step in turn against those before."""

    def __init__(self, tolerance: float) -> None:
        """tolerance: as of `Probe`, in nats."""
        self._tolerance = tolerance
        self._noise: deque[float] = deque(maxlen=REMEMBERED)
        self._kl: deque[float] = deque(maxlen=REMEMBERED)
        self._ahead: deque[float] = deque(maxlen=REMEMBERED)
        """The differences of steps whose rollouts ran ahead of the learners."""

    def begin_stage(self) -> None:
        """Forgets the measured rounding, since the next stage trains another model."""
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
        """`sync/gate`: the step's difference between engines and learners, scaled so that above 1
        there is an alarm (`Alarms`); {} for a step without these metrics.

        version: the one served when the step began. moved: the change of the probabilities by one
        update, as the probe measured it. within: the updates of this step before the last of its
        log-probs. Raises ActorLostError above a second threshold, but only for steps whose tokens
        are all of that version.
        """
        if MEAN not in metrics:
            return {}
        worker, apart = self._furthest(metrics)
        stale = metrics.get(STALENESS, 0.0) + within
        between = max(stale * (moved or 0.0), (stale > 0) * (self._median(self._ahead) or 0.0))
        expected = self._median(self._noise)
        # the absolute bounds are a floor; before anything was measured they are all there is
        warn = max(WARN_LEAST * self._tolerance, WARN * ((expected or 0.0) + between))
        stop = max(STOP_LEAST * self._tolerance, STOP * (expected or 0.0))
        if expected is None:
            warn, stop = self._tolerance / 2 + WARN * between, self._tolerance
        if stale > 0:
            # no error: how far the learners' own updates move these tokens is not known beforehand
            stop = math.inf
            self._ahead.append(apart)
        if not apart <= stop:  # not `apart > stop`: NaN has to fail too
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
        """(the worker that differs most from the learners, its difference); NaN is the largest."""
        workers = {
            f"rollout worker {match[1]}": value
            for name, value in metrics.items()
            if (match := OF_WORKER.fullmatch(name))
        }
        if not workers:
            return "the only rollout worker", metrics[MEAN]
        worst = max(workers, key=lambda name: (math.isnan(workers[name]), workers[name]))
        return worst, max(metrics[MEAN], workers[worst])

    @staticmethod
    def _median(values: deque[float]) -> float | None:
        return sorted(values)[len(values) // 2] if values else None


__all__ = ["Gate"]
