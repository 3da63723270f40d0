"""mean@n, pass@k and maj@k by hand."""

from __future__ import annotations

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.evaluate import majority_at_k, pass_at_k, summarise
from emberl.rl.groups import Group
from emberl.rollout.samples import Completion, Prompt, Span


def group(source: str, *right: bool | None, kind: str | None = None) -> Group:
    verdicts = tuple(
        verifier_error("killed") if r is None else Verdict(status=Status.CORRECT if r else Status.WRONG, score=float(r))
        for r in right
    )
    completions = tuple(
        Completion(
            prompt_id=source, sample=i, token_ids=np.array([5, 1], np.int32), logprobs=np.zeros(2, np.float32),
            spans=(Span(0, 0, 2),), finish_reason="stop",
        )
        for i in range(len(right))
    )  # fmt: skip
    columns = {"kind": kind} if kind else {}
    return Group(
        prompt=Prompt(id=source, token_ids=(3,), answer="1", source=source, columns=columns),
        completions=completions,
        verdicts=verdicts,
    )


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    # 4 answers, 1 right: a pair misses it in C(3,2) = 3 of C(4,2) = 6 draws.
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 3, 2) == pytest.approx(1.0)
    assert pass_at_k(4, 0, 4) == 0.0


def test_majority_shares_ties() -> None:
    assert majority_at_k(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority_at_k(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority_at_k(["7", "8", "9"], [True, False, False]) == pytest.approx(1 / 3)


def test_summary_by_source_and_kind() -> None:
    groups = [group("a", True, False, kind="chain"), group("a", True, True, kind="solve"), group("b", False, None)]
    texts = [["x</think>1", "x</think>2"], ["</think>1", "</think>1"], ["</think>3", "</think>4"]]
    found = summarise(groups, texts)
    assert found.accuracy == pytest.approx(3 / 6)  # an answer without a verdict is not correct, and is counted:
    assert found.metrics["val-aux/verifier_errors"] == 1
    assert found.metrics["val-core/a/mean@2"] == pytest.approx(0.75)
    assert found.metrics["val-core/a/best@2"] == 1.0
    assert found.metrics["val-core/a/maj@2"] == pytest.approx(0.75)  # a tie of right and wrong counts half
    assert found.metrics["val-core/b/mean@2"] == 0.0
    assert found.metrics["val-aux/chain/accuracy"] == pytest.approx(0.5)
    assert found.metrics["val-aux/solve/accuracy"] == 1.0
