"""`MathReward`: right or wrong by the final answer.

Nearly all answers are decided here, in microseconds. What is not goes to math-verify in worker processes with a kill
deadline, a memory limit and no network; they start when the first such answer comes, so many runs never start them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from ..inputs import RewardInput
from ..verdict import Status, Verdict, verifier_error
from ..worker_pool import Answer, Ended, WorkerPool
from .compare import Reference, compare, read_reference
from .extract import extract
from .lexer import clean
from .options import Outcome, Policy
from .parser import MAX_CHARS

MEMORY_BYTES = 2**30
"""Address space of a symbolic worker; sympy itself takes about 200 MB of it."""
_LONG_REFERENCE = 200
_NOT_FOR_SYMPY = re.compile(r"__|[^\n\t -~]|\\(?:forall|exists|implies|iff|Rightarrow|mho|[hv]?phantom|color|not)\b")
"""Its parser drops what it does not know and compares the rest, so two different statements come out the same."""
_COMMAND = re.compile(r"\\(?!text|mathrm|mbox|operatorname|[dt]?frac|left|right|quad|circ)[A-Za-z]+")
_OPERATORS = ("\\int", "\\sum", "\\prod", "\\lim", "\\oint")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt|frac|sinh|cosh|tanh)[A-Za-z]{4,}")


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is known of a reference and the candidates: an outcome, or the answers that need the symbolic back end."""

    outcome: Outcome
    open: tuple[str, ...] = ()


class MathReward:
    """Score 1.0 for a completion whose final answer is the reference, else 0.0.

    `timeout`: seconds for one symbolic comparison; `concurrency`: worker processes; `options`: fields of `Policy`, e.g.
    `units="ignore"`. Thread-safe. Raises ValueError for an unknown option.
    """

    def __init__(self, *, timeout: float = 5.0, concurrency: int = 4, **options: Any) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be positive seconds")
        self.policy = _policy(options)
        self.timeout = timeout
        self._reference = lru_cache(maxsize=65536)(read_gold)
        self._decide = lru_cache(maxsize=65536)(self._decide_exactly)
        self._symbolic: dict[tuple[str, str], Answer] = {}
        self._pool = WorkerPool(
            f"{__name__.rpartition('.')[0]}.sympy_worker:serve",
            {},
            workers=concurrency,
            memory_bytes=MEMORY_BYTES,
            network=False,
            output=False,  # parsers complain about every odd input
            environment={k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG") if k in os.environ},
        )

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        found: list[Verdict | None] = []
        waiting: list[tuple[int, RewardInput, _Decision, float]] = []
        for index, row in enumerate(batch):
            start = time.perf_counter()
            extracted = extract(row.completion, row.prompt.rstrip().endswith("<think>"))
            if not extracted.candidates:
                found.append(Verdict(status=Status.UNPARSEABLE, score=0.0, message="no answer found"))
                continue
            decision = self._decide(row.answer, extracted.candidates)
            seconds = time.perf_counter() - start
            if decision.open:
                found.append(None)
                waiting.append((index, row, decision, seconds))
            else:
                found.append(_verdict(decision.outcome, extracted.candidates, seconds))
        if waiting:
            answers = self._compare_symbolically([(row.answer, a) for _, row, d, _ in waiting for a in d.open])
            for index, row, decision, seconds in waiting:
                found[index] = _symbolic_verdict([answers[row.answer, a] for a in decision.open], decision, seconds)
        assert all(verdict is not None for verdict in found)
        return [verdict for verdict in found if verdict is not None]

    def check_reference(self, row: RewardInput) -> str | None:
        """What is wrong with a reference, in words; None if it can be graded against."""
        reference = self._reference(row.answer)
        if not row.answer.strip() or len(row.answer) > 20 * MAX_CHARS:
            return "it is empty" if not row.answer.strip() else f"it is longer than {20 * MAX_CHARS} characters"
        if reference.tree is not None:
            return None
        answer = self._pool.run([{"gold": reference.text}], self.timeout)[0]
        if answer.ended is Ended.DONE and answer.value:
            return None
        return reference.problem if answer.ended is Ended.DONE else f"{reference.problem}; {answer.message}"

    def close(self) -> None:
        self._pool.close()

    def _decide_exactly(self, gold: str, candidates: tuple[str, ...]) -> _Decision:
        reference, policy = self._reference(gold), self.policy
        if policy.boxes == "last":
            candidates = candidates[-1:]
        if len(candidates) > 1 and compare(reference, ", ".join(candidates), policy) is Outcome.EQUAL:
            return _Decision(Outcome.EQUAL)
        outcomes = [
            _screened(reference, text, compare(reference, text, policy), policy.unsimplified == "reject")
            for text in candidates
        ]
        for decided in (Outcome.TOO_BIG, Outcome.DIFFERENT):
            if decided in outcomes:
                return _Decision(decided)
        unknown = tuple(t for t, o in zip(candidates, outcomes, strict=True) if o is Outcome.UNKNOWN)
        return _Decision(Outcome.UNKNOWN if unknown else Outcome.EQUAL, unknown)

    def _compare_symbolically(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Answer]:
        known = {pair: self._symbolic[pair] for pair in pairs if pair in self._symbolic}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        tasks = [{"gold": self._reference(gold).text, "answer": answer} for gold, answer in new]
        found = dict(zip(new, self._pool.run(tasks, self.timeout), strict=True))
        if len(self._symbolic) > 65536:
            self._symbolic.clear()
        self._symbolic.update({p: a for p, a in found.items() if a.ended not in (Ended.LOST, Ended.RAISED)})
        return known | found


def _policy(options: dict[str, Any]) -> Policy:
    hints = get_type_hints(Policy)
    for name, value in options.items():
        if name not in hints:
            raise ValueError(
                f"the math reward has no option {name!r}; it has {', '.join(f.name for f in fields(Policy))}"
            )
        allowed = get_args(hints[name])
        if (allowed and value not in allowed) or (not allowed and (not isinstance(value, int) or value < 0)):
            raise ValueError(
                f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed)) or 'a count, 0 or more'}"
            )
    return Policy(**options)


def read_gold(gold: str) -> Reference:
    """The reference answer of a data row, which may be a whole solution with a box or GSM8K's `#### x`."""
    if "\\boxed" in gold or "\\fbox" in gold or "####" in gold or len(gold) > _LONG_REFERENCE:
        candidates = extract(gold).candidates
        return read_reference(", ".join(candidates) if candidates else gold)
    return read_reference(gold)


def _screened(gold: Reference, answer: str, outcome: Outcome, simplified: bool) -> Outcome:
    """Refuses to hand what cannot be an answer to the symbolic back end."""
    if outcome is not Outcome.UNKNOWN:
        return outcome
    if len(answer) > MAX_CHARS or _NOT_FOR_SYMPY.search(answer) or _NOT_FOR_SYMPY.search(clean(gold.text[:MAX_CHARS])):
        return Outcome.DIFFERENT
    if gold.number is not None and (_WORD.search(answer) or (simplified and _COMMAND.search(answer))):
        return Outcome.DIFFERENT
    if simplified and any(operator in answer and operator not in gold.text for operator in _OPERATORS):
        return Outcome.DIFFERENT
    depth = deepest = 0
    for character in answer:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return Outcome.DIFFERENT if deepest > 30 else outcome


def _verdict(outcome: Outcome, candidates: tuple[str, ...], seconds: float) -> Verdict:
    if outcome is Outcome.EQUAL:
        return Verdict(status=Status.CORRECT, score=1.0, seconds=seconds)
    if outcome is Outcome.TOO_BIG:
        return Verdict(status=Status.OVER_LIMIT, score=0.0, message="a number too big to compute", seconds=seconds)
    message = "" if len(candidates) == 1 else f"{len(candidates)} different final answers"
    return Verdict(status=Status.WRONG, score=0.0, message=message, seconds=seconds)


def _symbolic_verdict(answers: Sequence[Answer], decision: _Decision, seconds: float) -> Verdict:
    """All open comparisons must hold. What ran out of time or memory, or took its worker down, is the model's doing."""
    seconds += max(answer.seconds for answer in answers)
    ends = {answer.ended: answer for answer in answers}
    if (lost := ends.get(Ended.LOST) or ends.get(Ended.RAISED)) is not None:
        return verifier_error(f"symbolic comparison: {lost.message}", seconds)
    for ended in (Ended.TIMEOUT, Ended.MEMORY, Ended.CRASHED):
        if ended in ends:
            return Verdict(status=Status.OVER_LIMIT, score=0.0, message=ends[ended].message, seconds=seconds)
    right = all(answer.value for answer in answers)
    return Verdict(status=Status.CORRECT if right else Status.WRONG, score=float(right), seconds=seconds)
