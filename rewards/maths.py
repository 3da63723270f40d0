"""`MathReward`: right or wrong by the final answer. Nearly all answers are decided here, in microseconds; what is not goes
to math-verify in worker processes with a kill deadline, a memory limit and no network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

from .answers import boxes, extract
from .equality import Outcome, Policy, Reference, compare, read_reference
from .inputs import RewardInput
from .verdict import Status, Verdict

_MESSAGES = {Outcome.EQUAL: "", Outcome.DIFFERENT: "not the reference", Outcome.TOO_BIG: "a number too big to compute"}


class MathReward:
    """Score 1.0 for a completion whose final answer is the reference, else 0.0.

    `timeout`: seconds for one symbolic comparison; `concurrency`: worker processes; `options`: fields of `Policy`, e.g.
    `{"units": "ignore"}`. Thread-safe. Raises ValueError for an unknown option.
    """

    def __init__(self, *, timeout: float = 5.0, concurrency: int = 2, **options: Any) -> None:
        if unknown := sorted(set(options) - {f.name for f in fields(Policy)}):
            raise ValueError(
                f"unknown options {unknown} of the math reward; it takes {[f.name for f in fields(Policy)]}"
            )
        self.policy = Policy(**options)
        self._reference = lru_cache(maxsize=65536)(_read)
        self._compare = lru_cache(maxsize=65536)(
            lambda gold, answer: compare(self._reference(gold), answer, self.policy)
        )

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return [self._grade(row) for row in batch]

    def _grade(self, row: RewardInput) -> Verdict:
        start = time.perf_counter()
        extracted = extract(row.completion, row.prompt.rstrip().endswith("<think>"))
        if not extracted.candidates:
            return Verdict(status=Status.UNPARSEABLE, score=0.0, message="no answer found")
        outcome = self._compare(row.answer, extracted.candidates[-1])
        seconds = time.perf_counter() - start
        status = Status.CORRECT if outcome is Outcome.EQUAL else Status.WRONG
        return Verdict(status=status, score=float(outcome is Outcome.EQUAL), seconds=seconds)


def _read(gold: str) -> Reference:
    found = boxes(gold)
    if found:
        return read_reference(found[-1] if len(found) == 1 else ", ".join(found))
    if "####" in gold:
        return read_reference(gold.rsplit("####", 1)[1])
    return read_reference(gold)
