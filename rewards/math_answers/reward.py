"""`MathReward`: 1 for a completion with the right final answer, else 0.

Nearly all answers are decided in this process, in microseconds. Sums, integrals and limits go to
sympy in worker processes with a kill deadline, a memory limit and no network; these start with the
first such answer, so that many runs need none. An answer that neither can compare is `unknown`: it
scores 0 and is counted separately.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from ..inputs import Reward, RewardInput
from ..verdict import Status, Verdict, verifier_error
from ..worker_pool import Answer, Ended, WorkerPool
from .compare import compare
from .extract import MAX_ANSWERS, extract
from .options import Comparison, Options, all_of
from .parser import TooDeep, Unreadable, parse
from .references import (
    MAX_TEXT,
    Reference,
    accepted,
    as_choice,
    is_copy,
    read_gold,
    rewritings,
    why_no_answer,
)
from .tree import Kind, Node, has

MEMORY_BYTES = 2**30
"""Address space of a worker with sympy, which takes about 200 MB itself."""
_CACHE = 65536
_Pair = tuple[str, str]
"""A reference and an answer."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """The outcome of comparing the candidates with a reference, and the answers that need algebra
    for it."""

    outcome: Comparison
    open: tuple[str, ...] = ()


class MathReward(Reward):
    """Scores 1.0 if the final answer equals the reference, else 0.0. Thread-safe.

    `timeout`: processor seconds for one comparison by algebra; `concurrency`: worker processes;
    `options`: fields of `Options`, e.g. `units="ignore"`. Raises ValueError for an unknown option
    or value.
    """

    def __init__(self, *, timeout: float = 5.0, concurrency: int = 4, **options: Any) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be positive seconds")
        self.policy = _policy(options)
        self.timeout = timeout
        self._reference = lru_cache(maxsize=_CACHE)(read_gold)
        self._decide = lru_cache(maxsize=_CACHE)(self._decide_exactly)
        self._algebra: dict[_Pair, Answer] = {}
        kept = [name for name in ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG") if name in os.environ]
        self._pool = WorkerPool(
            f"{__name__.rpartition('.')[0]}.algebra:serve",
            {},
            workers=concurrency,
            memory_bytes=MEMORY_BYTES,
            network=False,
            output=False,
            environment={name: os.environ[name] for name in kept},
        )

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        graded = [(row, *self._graded(row)) for row in batch]
        pairs = [(row.answer, answer) for row, _, open_ in graded for answer in open_]
        answers = self._compare_by_algebra(pairs) if pairs else {}
        verdicts = []
        for row, verdict, open_ in graded:
            own = [answers[row.answer, answer] for answer in open_]
            verdicts.append(_algebraic_verdict(own, verdict.seconds) if own else verdict)
        return verdicts

    def _graded(self, row: RewardInput) -> tuple[Verdict, tuple[str, ...]]:
        """The verdict, and the answers that only algebra can decide. Raises for no answer."""
        start = time.perf_counter()
        open_: tuple[str, ...] = ()
        try:
            status, message, open_ = self._grade(row)
        except (RecursionError, MemoryError) as error:  # one degenerate answer costs no other row
            status, message = Status.OVER_LIMIT, type(error).__name__
        except Exception as error:  # a text that no test has thought of costs its own row
            status, message = Status.UNKNOWN, f"{type(error).__name__}: {error}"[:200]
        return _timed(status, message, time.perf_counter() - start), open_

    def check_reference(self, row: RewardInput) -> str | None:
        """The fault of a reference, in words; None if it is accepted against itself and its usual
        rewritings."""
        if (problem := why_no_answer(row.answer)) is not None:
            return problem
        if re.fullmatch(r"-?\d{1,15}", row.answer):  # as most are: large data sets open in seconds
            return None
        reference = self._reference(accepted(row.answer)[0])
        for rewritten in rewritings(reference.text):
            verdict = self([RewardInput(completion=rewritten, answer=row.answer)])[0]
            if verdict.score != 1.0:
                problem = reference.problem or "it is refused against itself"
                return f"{problem}: {rewritten[:80]} is {verdict.status.value}"
        return None

    def close(self) -> None:
        self._pool.close()

    def _grade(self, row: RewardInput) -> tuple[Status, str, tuple[str, ...]]:
        """Status, message, and the answers that algebra has to decide."""
        opened = row.prompt.rstrip()[-16:].lower().endswith(("<think>", "<thinking>"))
        candidates = extract(row.completion, opened).candidates
        if self.policy.boxes == "last":
            candidates = candidates[-1:]
        if not candidates:
            return Status.UNPARSEABLE, "no answer found", ()
        if len(candidates) > MAX_ANSWERS:
            return Status.WRONG, f"more than {MAX_ANSWERS} different final answers", ()
        if re.fullmatch("[A-J]", row.answer):
            asked = row.messages[-1]["content"] if row.messages else row.prompt
            candidates = tuple(as_choice(answer, asked) for answer in candidates)
        decision = self._decide(row.answer, candidates)
        if decision.outcome is Comparison.EQUAL and row.prompt:
            reference = self._reference(row.answer)
            if any(is_copy(reference.tree, answer, row.prompt) for answer in candidates):
                return Status.WRONG, "the answer is copied from the problem", ()
        status, message = _STATUS[decision.outcome]
        if len(candidates) > 1 and status is not Status.CORRECT:
            message = f"{len(candidates)} different final answers"
        return status, message, decision.open

    def _decide_exactly(self, gold: str, candidates: tuple[str, ...]) -> _Decision:
        if len(golds := accepted(gold)) > 1:
            decisions = [self._decide_exactly(each, candidates) for each in golds]
            equal = (each for each in decisions if each.outcome is Comparison.EQUAL)
            return next(equal, decisions[0])
        reference, policy = self._reference(gold), self.policy
        whole = ", ".join(candidates)
        if len(candidates) > 1 and compare(reference, whole, policy) is Comparison.EQUAL:
            return _Decision(Comparison.EQUAL)
        outcomes = [compare(reference, text, policy) for text in candidates]
        # Every candidate has to be right, or a box around each digit would pay (audit/hacks.py).
        for decided in (Comparison.TOO_BIG, Comparison.DIFFERENT):
            if decided in outcomes:
                return _Decision(decided)
        decided_texts = zip(candidates, outcomes, strict=True)
        unknown = tuple(text for text, outcome in decided_texts if outcome is Comparison.UNKNOWN)
        if not unknown:
            return _Decision(Comparison.EQUAL)
        if not all(needs_algebra(reference, answer, policy) for answer in unknown):
            return _Decision(Comparison.UNKNOWN)
        return _Decision(Comparison.UNKNOWN, unknown)

    def _compare_by_algebra(self, pairs: Sequence[_Pair]) -> dict[_Pair, Answer]:
        known = {pair: self._algebra[pair] for pair in pairs if pair in self._algebra}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        trees = [(self._reference(gold).tree, parse(answer)) for gold, answer in new]
        tasks = [{"gold": scalar(gold), "answer": scalar(answer)} for gold, answer in trees]
        answers = dict(zip(new, self._pool.run(tasks, self.timeout), strict=True))
        if len(self._algebra) > _CACHE:
            self._algebra.clear()
        # These outcomes say nothing about the answer and are not cached.
        lost = (Ended.LOST, Ended.RAISED)
        self._algebra.update({p: a for p, a in answers.items() if a.ended not in lost})
        return known | answers


def needs_algebra(reference: Reference, answer: str, policy: Options) -> bool:
    """Whether algebra can decide what evaluation cannot: an answer against a reference that holds a
    sum, integral or limit."""
    if reference.tree is None or len(answer) > MAX_TEXT:
        return False
    try:
        gold, tree = scalar(reference.tree), scalar(parse(answer))
    except (Unreadable, TooDeep):
        return False
    if gold is None or tree is None:
        return False
    return has(gold, Kind.BIG) or (policy.unsimplified == "accept" and has(tree, Kind.BIG))


def scalar(node: Node | None) -> Node | None:
    """The scalar of `name = scalar` or of the tree itself; None if it is not a scalar."""
    if node is None:
        return None
    equation = node.kind is Kind.RELATION and node.data == ("=",)
    if equation and node.args[0].kind in (Kind.NAME, Kind.APPLY):
        node = node.args[1]
    return None if node.kind is Kind.LIST or has(node, *_SHAPES) else node


_SHAPES = (
    *(Kind.RELATION, Kind.TEXT, Kind.VERBATIM, Kind.DOTS, Kind.GROUP, Kind.SET, Kind.QUALIFIED),
    *(Kind.UNION, Kind.MATRIX),
)
_STATUS = {
    Comparison.EQUAL: (Status.CORRECT, ""),
    Comparison.DIFFERENT: (Status.WRONG, ""),
    Comparison.UNKNOWN: (Status.UNKNOWN, "cannot be compared with the reference"),
    Comparison.TOO_BIG: (Status.OVER_LIMIT, "too big or too deep to compute"),
}


def _timed(status: Status, message: str, seconds: float) -> Verdict:
    score = float(status is Status.CORRECT)
    return Verdict(status=status, score=score, message=message, seconds=seconds)


def _algebraic_verdict(answers: Sequence[Answer], seconds: float) -> Verdict:
    """The verdict of comparisons by algebra, which must all be equal. Running out of time or
    memory, or crashing the worker, is the model's doing."""
    seconds += max(answer.seconds for answer in answers)
    ends = {answer.ended: answer for answer in answers}
    if (lost := ends.get(Ended.LOST) or ends.get(Ended.RAISED)) is not None:
        return verifier_error(f"comparison by algebra: {lost.message}", seconds)
    for ended in (Ended.TIMEOUT, Ended.MEMORY, Ended.CRASHED):
        if ended in ends:
            return _timed(Status.OVER_LIMIT, ends[ended].message, seconds)
    return _timed(*_STATUS[all_of([Comparison(str(answer.value)) for answer in answers])], seconds)


def _policy(options: dict[str, Any]) -> Options:
    hints = get_type_hints(Options)
    for name, value in options.items():
        if name not in hints:
            known = ", ".join(field.name for field in fields(Options))
            raise ValueError(f"the math reward has no option {name!r}; it has {known}")
        allowed = get_args(hints[name])
        valid = value in allowed if allowed else isinstance(value, int) and value >= 0
        if not valid:
            choice = " or ".join(map(repr, allowed)) or "a count, 0 or more"
            raise ValueError(f"{name} is {value!r}; it must be {choice}")
    return Options(**options)
