"""Signs that a run does not learn: one line each, with the likely cause and the fix, once a run.

A sign must hold for `tracking.warn_after` steps in a row, not counting those in which its metric is
not known; one that held in every step of a shorter run is reported at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..algorithm.advantages import ROUNDING
from ..config.load import Config

Metrics = Mapping[str, float]
ENTROPY = "actor/entropy_per_token"
ENTROPY_LEFT = "its share of the start's"
SOLVED = 0.9
"""Share of right answers from which low entropy is no loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A warning for a person, e.g.
    `Alarm(title="no update", text="no weight has moved in 5 steps (1 to 5): ...")`."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """A symptom of a run that does not learn, as a predicate on a step's metrics."""

    title: str
    shows: Callable[[Metrics], bool | None]
    """Whether a step's metrics show it; None if they do not tell."""
    cause: Callable[[Metrics], str]
    """The likely cause and the fix, from the last step's metrics."""
    at_once: bool = False
    """Whether a single step is enough."""


class Alarms:
    """Checks all signs against the metrics of each step in turn; reports each sign once."""

    def __init__(self, config: Config, entropy_start: float | None = None) -> None:
        """entropy_start: as `self.entropy_start` was in the run's earlier attempt."""
        self.entropy_start = entropy_start
        """Nats a token in the first step that trained: the reference for a collapse."""
        self._signs = signs(config)
        self._patience = config.tracking.warn_after
        self._seen: dict[str, list[int]] = {sign.title: [] for sign in self._signs}
        """By sign, the current row of steps that show it."""
        self._told: dict[str, int] = {sign.title: 0 for sign in self._signs}
        """By sign, the number of steps whose metrics told."""
        self._said: set[str] = set()
        self._last: Metrics = {}

    def after(self, step: int, metrics: Metrics) -> list[Alarm]:
        """Alarms for the signs that have now held for long enough, and were not reported before."""
        entropy = metrics.get(ENTROPY)
        if self.entropy_start is None and entropy and math.isfinite(entropy):
            self.entropy_start = entropy
        if entropy is not None and self.entropy_start:
            metrics = {**metrics, ENTROPY_LEFT: entropy / self.entropy_start}
        self._last = metrics
        for sign in self._signs:
            shows = sign.shows(metrics)
            if shows is None:
                continue
            self._told[sign.title] += 1
            self._seen[sign.title] = [*self._seen[sign.title], step] if shows else []
        return self._say(lambda sign, seen, told: seen >= self._patience or sign.at_once)

    def at_end(self) -> list[Alarm]:
        """Alarms for the signs that held in every step of a run too short for `after`."""
        return self._say(lambda sign, seen, told: seen == told < self._patience)

    def _say(self, holds: Callable[[Sign, int, int], bool]) -> list[Alarm]:
        due = [
            sign
            for sign in self._signs
            if self._patience
            and self._seen[sign.title]
            and sign.title not in self._said
            and holds(sign, len(self._seen[sign.title]), self._told[sign.title])
        ]
        self._said |= {sign.title for sign in due}
        return [Alarm(title=sign.title, text=self._text(sign)) for sign in due]

    def _text(self, sign: Sign) -> str:
        first, last = self._seen[sign.title][0], self._seen[sign.title][-1]
        when = f"step {last}" if first == last else f"steps {first} to {last}"
        return f"{when}: {sign.cause(self._last)}"


def failures(step: int, metrics: Metrics) -> list[Alarm]:
    """Alarms for failures in a step that were repaired or left out; reported every time."""
    alarms = []
    if count := metrics.get("sync/digest_failures", 0):
        text = (
            f"step {step}: {count:.0f} times weights came, or lay in an engine's memory, that were"
            " not the learners' bit for bit; they were sent again: look at the network and at"
            " memory errors"
        )
        alarms.append(Alarm(title="digest failures", text=text))
    if count := metrics.get("sync/reloads", 0):
        text = (
            f"step {step}: {count:.0f} engines gave other log-probs than the learners, though their"
            " digests were right, and loaded all weights once more: they had multiplied by a copy"
        )
        alarms.append(Alarm(title="probe failures", text=text))
    if count := metrics.get("training/verifier_errors", 0):
        text = (
            f"step {step}: {count:.0f} answers have no verdict because their grader failed; they do"
            " not train: `status` verifier_error in rollouts/ has the messages"
        )
        alarms.append(Alarm(title="verifier errors", text=text))
    return alarms


def signs(config: Config) -> list[Sign]:
    """The signs that are checked in a run of this configuration."""
    return [
        *_signs_of_answers(config.rollout.max_response_length),
        *_signs_of_updates(config.tracking.entropy_floor),
    ]


def _signs_of_answers(longest: int) -> list[Sign]:
    """Signs in the rewards and in the sampled answers."""
    return [
        Sign(
            title="reward stuck at 0", shows=_all_zero, cause=lambda m: _cause_of_zero(m, longest)
        ),
        Sign(
            title="all rewards equal",
            shows=lambda m: _all_equal(m) and not _all_zero(m),
            cause=_cause_of_equal,
        ),
        Sign(
            title="engines and learners apart",
            shows=lambda m: m["sync/gate"] > 1 if "sync/gate" in m else None,
            cause=lambda m: (
                "the probabilities of the tokens that train differ between engines and learners by"
                f" {m['training/rollout_probs_diff_mean']:.2g} on average, {m['sync/gate']:.2g}"
                " times what rounding and the updates in between are taken for: an engine may"
                " decode with older weights (look at training/rollout_probs_diff_mean/worker_*), or"
                " draw from another distribution than it says (rollout.temperature, top_p)"
            ),
            at_once=True,
        ),
        Sign(title="no update", shows=_no_update, cause=_cause_of_no_update),
        Sign(
            title="answers all cut off",
            shows=lambda m: m.get("training/cut_fraction", 0.0) >= 0.99,
            cause=lambda m: (
                f"every answer reaches rollout.max_response_length={longest} and is cut; raise it,"
                " or check that the model ends its answers (chat template, end token)"
            ),
        ),
    ]


def _signs_of_updates(floor: float) -> list[Sign]:
    """Signs in the policy and its gradients."""
    return [
        Sign(
            title="entropy collapsed",
            shows=lambda m: _collapsed(m, floor),
            cause=lambda m: (
                f"the policy's entropy is {m[ENTROPY]:.2g} nats a token, {m[ENTROPY_LEFT]:.1%} of"
                f" what it was at the start (tracking.entropy_floor={floor:g}), and"
                f" {m['training/accuracy']:.0%} of the answers are right: it explores no more;"
                " lower optim.lr, raise loss.clip_high, or set loss.entropy_coef=0.001"
            ),
        ),
        Sign(
            title="no gradient",
            shows=lambda m: m["actor/grad_norm"] == 0 if "actor/grad_norm" in m else None,
            cause=lambda m: (
                "updates are made with a gradient of exactly 0: every token is masked or clipped"
                " (actor/pg_clipfrac, rollout_corr/rollout_rs_masked_fraction); widen loss.clip_*"
                " or the bounds of offpolicy"
            ),
        ),
        Sign(
            title="log-probs are not finite",
            shows=lambda m: (
                m["actor/nonfinite_logp"] > 0.01 if "actor/nonfinite_logp" in m else None
            ),
            cause=lambda m: (
                f"{m['actor/nonfinite_logp']:.1%} of the tokens have log-probs that are NaN or"
                " infinite and do not train; check the engine (model.dtype, rollout.engine_args)"
                " and actor/grad_norm"
            ),
        ),
        Sign(
            title="gradients are not finite",
            shows=lambda m: (
                not math.isfinite(m["actor/grad_norm"]) if "actor/grad_norm" in m else None
            ),
            cause=lambda m: (
                f"{m.get('actor/steps_skipped', 0):.0f} updates were left out because their"
                " gradient was NaN or infinite; lower optim.lr, or bound the loss (kl.bound,"
                " loss.dual_clip)"
            ),
        ),
    ]


def _collapsed(metrics: Metrics, floor: float) -> bool | None:
    """Whether the entropy has collapsed: False for a policy that has solved its problems, which
    need not explore; None for a step without an update."""
    if ENTROPY_LEFT not in metrics:
        return None
    return metrics[ENTROPY_LEFT] < floor and metrics.get("training/accuracy", 0.0) < SOLVED


def _all_equal(metrics: Metrics) -> bool:
    if "critic/score/max" not in metrics:
        return False
    high, low = metrics["critic/score/max"], metrics["critic/score/min"]
    return high - low <= ROUNDING * max(1.0, abs(high), abs(low))


def _all_zero(metrics: Metrics) -> bool:
    return _all_equal(metrics) and abs(metrics["critic/score/max"]) <= ROUNDING


def _no_update(metrics: Metrics) -> bool:
    """Whether the step made no update of the policy; False while the critic warms up."""
    return metrics.get("training/updates", 0.0) == 0 and "critic/vf_loss" not in metrics


def _cause_of_zero(metrics: Metrics, longest: int) -> str:
    if metrics.get("training/cut_fraction", 0.0) > 0.5:
        cut = (
            f"{metrics['training/cut_fraction']:.0%} of the answers are cut at"
            f" rollout.max_response_length={longest}"
        )
        return f"no answer has scored above 0, and {cut}; raise it first"
    return (
        "no answer has scored above 0: the problems are too hard for this model, or its answers are"
        " not in the form that the reward reads; look at samples.md, try easier data or a cold"
        " start (stages=[sft,rl]), or `emberl audit` the reward"
    )


def _cause_of_equal(metrics: Metrics) -> str:
    value = metrics["critic/score/max"]
    return (
        f"every answer scores {value:.4g}, so that none is better than another; the problems are"
        " solved, or the reward does not look at the answer: check reward.parts, or take harder"
        " data"
    )


def _cause_of_no_update(metrics: Metrics) -> str:
    solved, failed = (
        metrics.get(f"training/filter_groups/solved_{which}", 0.0) for which in ("all", "none")
    )
    dropped = metrics.get("training/filter_groups/dropped", 0.0)
    if dropped:
        return (
            f"no weight has moved: all {dropped:.0f} groups have equal scores ({solved:.0f} all"
            f" above 0, {failed:.0f} all 0 or less); raise rollout.group_size, take problems of"
            " another difficulty, or set filter.dynamic_sampling=true"
        )
    return (
        "no weight has moved: no token had an advantage; check that answers are not empty and that"
        " rewards differ"
    )
