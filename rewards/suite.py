"""`RewardSuite`: named parts with weights and gates, graded concurrently, each with a deadline and
metrics."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .by_source import BySource
from .inputs import BadReference, Reward, RewardInput
from .registry import load_reward
from .verdict import LARGEST_SCORE, Status, Verdict, verifier_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A named component of the reward."""

    name: str
    reward: Reward
    weight: float = 1.0
    gate: str | None = None
    """Name of another part: this one counts only if that one scored above 0."""
    deadline: float = 600.0
    """Seconds for a batch; samples without a verdict by then get `verifier_error`. It is the last
    resort: a reward's own, tighter limit per sample tells a bomb from a stuck grader. For a reward
    that counts what it has finished, seconds without progress, since a long queue of slow programs
    is no stuck grader."""


class RewardSuite:
    """Grades completions: score = sum of weight x score over the parts that apply to the sample and
    whose gate is open.

    A part that does not apply (`not_applicable`) adds nothing and leaves the weights of the others
    unchanged, as in TRL, whose sum skips None. If no part applies, the completion has no score. The
    first part that applies determines the status. If a part that counts failed (`verifier_error`),
    the completion has no score. Thread-safe; `grade` never raises for a fault of a part.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        names = [part.name for part in parts]
        if not parts:
            raise ValueError(
                "a reward suite needs at least one part, e.g. {'answer': {'use': 'math'}}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"the parts of a reward need different names, got {names}")
        for part in parts:
            if part.gate is not None and (part.gate not in names or part.gate == part.name):
                raise ValueError(
                    f"reward.{part.name}.gate is {part.gate!r}; it must name another part of"
                    f" {names}"
                )
        self.parts = tuple(parts)
        self._tally = {part.name: _Tally() for part in parts}
        self._under_way: dict[str, list[_Call]] = {part.name: [] for part in parts}
        self._lock = threading.Lock()

    def apart(self) -> RewardSuite:
        """A suite of the same parts with metrics of its own. Only one of the two must be closed."""
        other = RewardSuite(self.parts)
        other._under_way = self._under_way
        other._lock = self._lock
        return other

    def grade(self, inputs: Sequence[RewardInput]) -> list[Verdict]:
        """Returns one verdict per input, in order. Blocks at most for the longest deadline of the
        parts, or longer while a part reports progress."""
        if not inputs:
            return []
        start = time.perf_counter()
        calls = [self._call(part, inputs) for part in self.parts]
        graded = {call.part.name: call.verdicts(start) for call in calls}
        with self._lock:
            for name, verdicts in graded.items():
                self._tally[name].add(verdicts, time.perf_counter() - start)
        return [
            self._combine({name: graded[name][i] for name in graded}, row.source)
            for i, row in enumerate(inputs)
        ]

    def _call(self, part: Part, inputs: Sequence[RewardInput]) -> _Call:
        """Starts a part on a batch, or refuses if earlier calls of it are stuck, since threads
        cannot be killed."""
        call = _Call(part, inputs)
        with self._lock:
            under_way = [c for c in self._under_way[part.name] if not c.done.is_set()]
            stuck = sum(c.abandoned for c in under_way)
            self._under_way[part.name] = [*under_way, call]
        call.start(f"{stuck} earlier calls are stuck" if stuck >= _MAX_STUCK else "")
        return call

    def _combine(self, verdicts: Mapping[str, Verdict], source: str) -> Verdict:
        scores = {name: v.score for name, v in verdicts.items() if v.score is not None}
        seconds = max(v.seconds for v in verdicts.values())

        def failed(message: str) -> Verdict:
            return Verdict(
                status=Status.VERIFIER_ERROR,
                score=None,
                parts=scores,
                message=message,
                seconds=seconds,
            )

        applying = [p for p in self.parts if _applies(verdicts[p.name])]
        if not any(p.weight and (p.gate is None or _applies(verdicts[p.gate])) for p in applying):
            why = next((v.message for v in verdicts.values() if v.message), "")
            return failed(
                f"no part of the reward applies to this sample of source {source!r}; {why}"
            )
        counted = [p for p in applying if p.gate is None or _open(verdicts[p.gate])]
        # a gate without a verdict is neither open nor shut
        gates = [p.gate for p in applying if p.gate is not None and p.weight]
        needed = [applying[0].name, *(p.name for p in counted if p.weight), *gates]
        for name in needed:
            if verdicts[name].status is Status.VERIFIER_ERROR:
                return failed(f"{name}: {verdicts[name].message}")
        score = sum(p.weight * scores[p.name] for p in counted if p.name in scores)
        if not abs(score) <= LARGEST_SCORE:  # also what is no number
            return failed(
                f"the weighted sum of {scores} is not within +-{LARGEST_SCORE:g}; set other weights"
            )
        main = verdicts[applying[0].name]
        return Verdict(
            status=main.status, score=score, parts=scores, message=main.message, seconds=seconds
        )

    @property
    def finished(self) -> int:
        """The sum of the parts' counts (see `Reward.finished`)."""
        return sum(part.reward.finished for part in self.parts)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics since the last call and resets them:
        `reward/<part>/{mean,std,seconds_mean,seconds_max}`, the count of each status,
        `reward/<part>/status/<status>`, and `reward/<part>/extra/<name>`, the mean of each number
        that a reward returned or logged beside its score."""
        with self._lock:
            metrics: dict[str, float] = {}
            for name, tally in self._tally.items():
                metrics |= {f"reward/{name}/{key}": value for key, value in tally.figures().items()}
                self._tally[name] = _Tally()
        return metrics

    def check_references(self, rows: Sequence[str | RewardInput]) -> list[BadReference]:
        """The references that some part cannot grade against, with the index of their row in
        `rows`. Raises ValueError for rows without a reward."""
        inputs = [
            RewardInput(completion="", answer=row) if isinstance(row, str) else row for row in rows
        ]
        refused: list[BadReference] = []
        for part in self.parts:
            try:
                messages = part.reward.check_references(inputs)
            except ValueError as error:
                raise ValueError(f"reward.{part.name}: {error}") from error
            for index, (row, message) in enumerate(zip(inputs, messages, strict=True)):
                if message is not None:
                    refused.append(
                        BadReference(row=index, answer=row.answer, part=part.name, message=message)
                    )
        return sorted(refused, key=lambda bad: bad.row)

    def trial(self, example: RewardInput) -> None:
        """Calls every plugin once, before training. Raises ValueError naming the part that fails,
        or if no part that counts applies to the example."""
        for part in self.parts:
            try:
                part.reward.trial(example)
            except ValueError as error:
                raise ValueError(f"reward.{part.name}: {error}") from error
        tried = {p.name: grade_each(p.reward, [example])[0] for p in self.parts if p.weight}
        if tried and not any(_applies(verdict) for verdict in tried.values()):
            why = "; ".join(f"reward.{name}: {verdict.message}" for name, verdict in tried.items())
            raise ValueError(f"no part of the reward applies to the first problem: {why}")

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()


_MAX_STUCK = 4


class TooManyErrors(RuntimeError):
    """More completions than allowed have no verdict; the message gives the most common causes."""


def check_errors(verdicts: Sequence[Verdict], limit: float = 0.01) -> None:
    """Raises `TooManyErrors` if more than the fraction `limit` of a batch has no verdict.

    Unless `limit` is 0, one failure is always allowed, so that it does not stop a run with small
    batches.
    """
    failed = [v.message or "no cause given" for v in verdicts if v.status is Status.VERIFIER_ERROR]
    if len(failed) <= max(limit * len(verdicts), 1 if limit > 0 else 0):
        return
    causes = "; ".join(
        f"{count} x {cause[:300]}" for cause, count in Counter(failed).most_common(3)
    )
    raise TooManyErrors(
        f"{len(failed)} of {len(verdicts)} completions have no verdict (limit {limit:.1%}); the"
        f" causes: {causes}"
    )


def build_suite(specs: Mapping[str, Mapping[str, Any]]) -> RewardSuite:
    """A suite from plain mappings, as a configuration file holds them.

    Each part: `use` (a built-in name, `package.module:function` or `./file.py:function`) or
    `by_source` (patterns of data sources to such mappings), `weight` (1.0), `gate`, `deadline` (s
    per batch), and what `load_reward` takes: `timeout` (s per sample), `concurrency` (processes),
    `style`, `isolation`, `options` (the reward's own keywords), `kwargs` (those of a user's
    function). Raises ValueError naming the key that does not fit.
    """
    parts: list[Part] = []
    try:
        for name, spec in specs.items():
            parts.append(_build_part(name, dict(spec)))
        return RewardSuite(parts)
    except ValueError:
        for part in parts:  # no suite owns them yet, and some have processes of their own
            part.reward.close()
        raise


LOADER_KEYS = ("timeout", "concurrency", "style", "isolation", "options", "kwargs")


def _build_part(name: str, spec: dict[str, Any]) -> Part:
    weight, gate, deadline = (
        spec.pop("weight", 1.0),
        spec.pop("gate", None),
        spec.pop("deadline", 600.0),
    )
    if not math.isfinite(weight):
        raise ValueError(f"reward.{name}.weight is {weight}; it must be finite")
    if not deadline > 0:
        raise ValueError(f"reward.{name}.deadline is {deadline}; it must be positive seconds")
    if by_source := spec.pop("by_source", None):
        reward: Reward = _by_source(name, by_source)
    else:
        reward = _load(f"reward.{name}", spec)
    return Part(name=name, reward=reward, weight=float(weight), gate=gate, deadline=float(deadline))


def _load(key: str, spec: Mapping[str, Any]) -> Reward:
    """The reward of a specification; `key`: its place in the configuration, for messages."""
    if not isinstance(use := spec.get("use"), str) or not use:
        raise ValueError(
            f"{key}.use is missing: name a reward such as 'math' or './file.py:function'"
        )
    given = {name: value for name, value in spec.items() if name != "use" and value is not None}
    if unknown := sorted(set(given) - set(LOADER_KEYS)):
        known = ", ".join(("use", "by_source", "weight", "gate", "deadline", *LOADER_KEYS))
        raise ValueError(f"{key} has unknown keys {unknown}; it takes {known}")
    try:
        return load_reward(use, **given)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _by_source(name: str, specs: Mapping[str, str | Mapping[str, Any]]) -> BySource:
    """A reward for each specification. Equal specifications share one, with its processes."""
    plain = {pattern: {"use": s} if isinstance(s, str) else dict(s) for pattern, s in specs.items()}
    rewards: dict[str, Reward] = {}
    try:
        for pattern, spec in plain.items():
            same = next((p for p in rewards if plain[p] == spec), None)
            key = f"reward.{name}.by_source[{pattern!r}]"
            rewards[pattern] = rewards[same] if same is not None else _load(key, spec)
    except ValueError:
        BySource(rewards).close()
        raise
    return BySource(rewards)


def grade_each(reward: Reward, inputs: Sequence[RewardInput]) -> list[Verdict]:
    """Returns one verdict per input, whatever the reward does. If it raises on a batch, rows are
    graded one by one, so that a row costs only its own verdict."""
    try:
        verdicts = list(reward(inputs))
    # A reward is untrusted, and time limits of libraries derive from BaseException
    # (math_verify's TimeoutException does): a fault costs its samples, never the run.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and _is_main_thread():
            raise
        if len(inputs) > 1:
            return [verdict for row in inputs for verdict in grade_each(reward, [row])]
        return [verifier_error(f"raised {type(error).__name__}: {error}")]
    if len(verdicts) != len(inputs):
        message = f"returned {len(verdicts)} verdicts for {len(inputs)} completions"
        return [verifier_error(message) for _ in inputs]
    return verdicts


def _is_main_thread() -> bool:
    """Whether this is the main thread, which receives Ctrl-C."""
    return threading.current_thread() is threading.main_thread()


def _applies(verdict: Verdict) -> bool:
    return verdict.status is not Status.NOT_APPLICABLE


def _open(gate: Verdict) -> bool:
    return gate.score is not None and gate.score > 0


class _Call:
    """One part grading one batch in a daemon thread, so that a stuck part blocks neither the caller
    nor the exit."""

    def __init__(self, part: Part, inputs: Sequence[RewardInput]) -> None:
        self.part = part
        self.inputs = inputs
        self.result: list[Verdict] | None = None
        self.done = threading.Event()
        self.abandoned = False

    def start(self, refusal: str) -> None:
        part = self.part
        if refusal:
            self.result = self._failed(refusal)
            self.done.set()
        elif part.reward.inline:
            self._run()  # microseconds of our own code: a thread would cost more than the work
        else:
            threading.Thread(target=self._run, daemon=True, name=f"reward-{part.name}").start()

    def _run(self) -> None:
        try:
            self.result = grade_each(self.part.reward, self.inputs)
        finally:
            self.done.set()

    def verdicts(self, start: float) -> list[Verdict]:
        before = self.part.reward.finished
        while not self.done.wait(max(start + self.part.deadline - time.perf_counter(), 0.0)):
            finished = self.part.reward.finished
            if finished == before:
                self.abandoned = True
                return self._failed(f"no verdict within the deadline of {self.part.deadline:g} s")
            before, start = finished, time.perf_counter()
        assert self.result is not None
        return self.result

    def _failed(self, message: str) -> list[Verdict]:
        return [verifier_error(message) for _ in self.inputs]


@dataclass(slots=True)
class _Tally:
    """The sums behind the metrics of a part."""

    statuses: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)
    extras: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    batch_seconds: float = 0.0

    def add(self, verdicts: Sequence[Verdict], batch_seconds: float) -> None:
        self.statuses.update(v.status.value for v in verdicts)
        self.scores += [v.score for v in verdicts if v.score is not None]
        for name, value in ((n, x) for v in verdicts for n, x in v.parts.items()):
            self.extras.setdefault(name, []).append(value)
        self.seconds += [v.seconds for v in verdicts]
        self.batch_seconds = max(self.batch_seconds, batch_seconds)

    def figures(self) -> dict[str, float]:
        figures = {
            f"status/{status.value}": float(self.statuses[status.value]) for status in Status
        }
        if self.scores:
            mean = sum(self.scores) / len(self.scores)
            figures |= {
                "mean": mean,
                "std": math.sqrt(sum((s - mean) ** 2 for s in self.scores) / len(self.scores)),
            }
        figures |= {
            f"extra/{name}": sum(values) / len(values) for name, values in self.extras.items()
        }
        if self.seconds:
            figures |= {
                "seconds_mean": sum(self.seconds) / len(self.seconds),
                "seconds_max": max(self.seconds),
            }
            figures["batch_seconds_max"] = self.batch_seconds
        return figures
