"""`MathReward`: right or wrong by the final answer.

Nearly all answers are decided here, in microseconds. Sums, integrals and limits go to sympy in
worker processes with a kill
deadline, a memory limit and no network; they start when the first such answer comes, so many runs
never start them. What neither
can compare is `unknown`: it scores 0, under a status of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from ..inputs import RewardInput
from ..verdict import Status, Verdict, verifier_error
from ..worker_pool import Answer, Ended, WorkerPool
from .compare import compare
from .extract import MAX_ANSWERS, extract
from .options import Outcome, Policy
from .parser import TooDeep, Unreadable, parse
from .references import MAX_TEXT, Reference, is_copy, read_gold, rewritings, why_no_answer
from .tree import Kind, Node, has

MEMORY_BYTES = 2**30
"""Address space of a symbolic worker; sympy itself takes about 200 MB of it."""
_CACHE = 65536


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is known of a reference and the candidates: an outcome, or the answers that need
    algebra."""

    outcome: Outcome
    open: tuple[str, ...] = ()


class MathReward:
    """Score 1.0 for a completion whose final answer is the reference, else 0.0.

    `timeout`: seconds of processor time for one comparison by algebra; `concurrency`: worker
    processes; `options`: fields of
    `Policy`, e.g. `units="ignore"`. Thread-safe. Raises ValueError for an unknown option.
    """

    def __init__(self, *, timeout: float = 5.0, concurrency: int = 4, **options: Any) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be positive seconds")
        self.policy = _policy(options)
        self.timeout = timeout
        self._reference = lru_cache(maxsize=_CACHE)(read_gold)
        self._decide = lru_cache(maxsize=_CACHE)(self._decide_exactly)
        self._algebra: dict[tuple[str, str], Answer] = {}
        self._pool = WorkerPool(
            f"{__name__.rpartition('.')[0]}.algebra:serve",
            {},
            workers=concurrency,
            memory_bytes=MEMORY_BYTES,
            network=False,
            output=False,
            environment={
                k: os.environ[k]
                for k in ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG")
                if k in os.environ
            },
        )

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        found: list[Verdict | None] = []
        waiting: list[tuple[int, RewardInput, _Decision, float]] = []
        for index, row in enumerate(batch):
            start = time.perf_counter()
            verdict: Verdict | None
            try:
                verdict, decision = self._grade(row, start)
            except (
                RecursionError,
                MemoryError,
            ) as error:  # one degenerate answer costs no other row
                verdict, decision = _verdict(Status.OVER_LIMIT, type(error).__name__, start), None
            except (
                Exception
            ) as error:  # a text that no test has thought of: it costs its own row, and is counted
                verdict, decision = (
                    _verdict(Status.UNKNOWN, f"{type(error).__name__}: {error}"[:200], start),
                    None,
                )
            found.append(verdict)
            if verdict is None and decision is not None:
                waiting.append((index, row, decision, time.perf_counter() - start))
        if waiting:
            answers = self._compare_by_algebra(
                [(row.answer, a) for _, row, d, _ in waiting for a in d.open]
            )
            for index, row, decision, seconds in waiting:
                found[index] = _algebraic_verdict(
                    [answers[row.answer, a] for a in decision.open], seconds
                )
        assert all(verdict is not None for verdict in found)
        return [verdict for verdict in found if verdict is not None]

    def check_reference(self, row: RewardInput) -> str | None:
        """What is wrong with a reference, in words; None if it is accepted against itself and its
        usual rewritings."""
        if (problem := why_no_answer(row.answer)) is not None:
            return problem
        reference = self._reference(row.answer)
        for rewritten in rewritings(reference.text):
            if (
                verdict := self([RewardInput(completion=rewritten, answer=row.answer)])[0]
            ).score != 1.0:
                return f"{reference.problem or 'it is refused against itself'}: {rewritten[:80]} is {verdict.status.value}"
        return None

    def close(self) -> None:
        self._pool.close()

    def _grade(self, row: RewardInput, start: float) -> tuple[Verdict | None, _Decision | None]:
        """The verdict, or what algebra has to decide."""
        extracted = extract(
            row.completion, row.prompt.rstrip()[-16:].lower().endswith(("<think>", "<thinking>"))
        )
        candidates = (
            extracted.candidates[-1:] if self.policy.boxes == "last" else extracted.candidates
        )
        if not candidates:
            return _verdict(Status.UNPARSEABLE, "no answer found", start), None
        if len(candidates) > MAX_ANSWERS:
            return _verdict(
                Status.WRONG, f"more than {MAX_ANSWERS} different final answers", start
            ), None
        decision = self._decide(row.answer, candidates)
        if decision.open:
            return None, decision
        if decision.outcome is Outcome.EQUAL and row.prompt:
            reference = self._reference(row.answer)
            if any(is_copy(reference.tree, answer, row.prompt) for answer in candidates):
                return _verdict(Status.WRONG, "the answer is copied from the problem", start), None
        status, message = _STATUS[decision.outcome]
        if len(candidates) > 1 and status is not Status.CORRECT:
            message = f"{len(candidates)} different final answers"
        return _verdict(status, message, start), None

    def _decide_exactly(self, gold: str, candidates: tuple[str, ...]) -> _Decision:
        reference, policy = self._reference(gold), self.policy
        if (
            len(candidates) > 1
            and compare(reference, ", ".join(candidates), policy) is Outcome.EQUAL
        ):
            return _Decision(Outcome.EQUAL)
        outcomes = [compare(reference, text, policy) for text in candidates]
        for decided in (Outcome.TOO_BIG, Outcome.DIFFERENT):
            if decided in outcomes:
                return _Decision(decided)
        unknown = tuple(
            t for t, o in zip(candidates, outcomes, strict=True) if o is Outcome.UNKNOWN
        )
        if not unknown:
            return _Decision(Outcome.EQUAL)
        if not all(needs_algebra(reference, answer, policy) for answer in unknown):
            return _Decision(Outcome.UNKNOWN)
        return _Decision(Outcome.UNKNOWN, unknown)

    def _compare_by_algebra(
        self, pairs: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Answer]:
        known = {pair: self._algebra[pair] for pair in pairs if pair in self._algebra}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        tasks = [
            {"gold": scalar(self._reference(gold).tree), "answer": scalar(parse(answer))}
            for gold, answer in new
        ]
        found = dict(zip(new, self._pool.run(tasks, self.timeout), strict=True))
        if len(self._algebra) > _CACHE:
            self._algebra.clear()
        self._algebra.update(
            {p: a for p, a in found.items() if a.ended not in (Ended.LOST, Ended.RAISED)}
        )
        return known | found


def needs_algebra(reference: Reference, answer: str, policy: Policy) -> bool:
    """Whether algebra can decide what evaluation cannot: a sum, integral or limit for a reference
    that has one."""
    if reference.tree is None or len(answer) > MAX_TEXT:
        return False
    try:
        gold, tree = scalar(reference.tree), scalar(parse(answer))
    except (Unreadable, TooDeep):
        return False
    if gold is None or tree is None:
        return False
    if policy.unsimplified == "reject" and not has(gold, Kind.BIG):
        return False
    return has(gold, Kind.BIG) or has(tree, Kind.BIG)


def scalar(node: Node | None) -> Node | None:
    """The scalar that `name = scalar` states, else the tree; None for a shape."""
    if (
        node is not None
        and node.kind is Kind.RELATION
        and node.data == ("=",)
        and node.args[0].kind in (Kind.NAME, Kind.APPLY)
    ):
        node = node.args[1]
    shapes = (
        Kind.RELATION,
        Kind.TEXT,
        Kind.VERBATIM,
        Kind.DOTS,
        Kind.GROUP,
        Kind.SET,
        Kind.QUALIFIED,
        Kind.UNION,
        Kind.MATRIX,
    )
    return None if node is None or has(node, *shapes) or node.kind is Kind.LIST else node


_STATUS = {
    Outcome.EQUAL: (Status.CORRECT, ""),
    Outcome.DIFFERENT: (Status.WRONG, ""),
    Outcome.UNKNOWN: (Status.UNKNOWN, "cannot be compared with the reference"),
    Outcome.TOO_BIG: (Status.OVER_LIMIT, "too big or too deep to compute"),
}


def _verdict(status: Status, message: str, start: float) -> Verdict:
    return Verdict(
        status=status,
        score=float(status is Status.CORRECT),
        message=message,
        seconds=time.perf_counter() - start,
    )


def _algebraic_verdict(answers: Sequence[Answer], seconds: float) -> Verdict:
    """All open comparisons must hold. What ran out of time or memory, or took its worker down, is
    the model's doing."""
    seconds += max(answer.seconds for answer in answers)
    ends = {answer.ended: answer for answer in answers}
    if (lost := ends.get(Ended.LOST) or ends.get(Ended.RAISED)) is not None:
        return verifier_error(f"comparison by algebra: {lost.message}", seconds)
    for ended in (Ended.TIMEOUT, Ended.MEMORY, Ended.CRASHED):
        if ended in ends:
            return Verdict(
                status=Status.OVER_LIMIT, score=0.0, message=ends[ended].message, seconds=seconds
            )
    words = {answer.value for answer in answers}
    outcome = (
        Outcome.DIFFERENT
        if "different" in words
        else Outcome.UNKNOWN
        if words != {"equal"}
        else Outcome.EQUAL
    )
    status, message = _STATUS[outcome]
    return Verdict(
        status=status, score=float(status is Status.CORRECT), message=message, seconds=seconds
    )


def _policy(options: dict[str, Any]) -> Policy:
    hints = get_type_hints(Policy)
    for name, value in options.items():
        if name not in hints:
            raise ValueError(
                f"the math reward has no option {name!r}; it has {', '.join(f.name for f in fields(Policy))}"
            )
        allowed = get_args(hints[name])
        if (allowed and value not in allowed) or (
            not allowed and (not isinstance(value, int) or value < 0)
        ):
            raise ValueError(
                f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed)) or 'a count, 0 or more'}"
            )
    return Policy(**options)
