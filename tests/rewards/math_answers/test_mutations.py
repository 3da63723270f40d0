"""Near misses and other spellings of references, made by generators and judged by an evaluation of
its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.math_answers.reward import MathReward

HERE = Path(__file__).parent
DATA = HERE.parents[2].parent / "shared" / "data"
REFERENCES = [
    "5",
    "-84",
    "12.5",
    "1,234,567",
    "\\frac{3}{4}",
    "-\\frac{14}{3}",
    "3\\sqrt{13}",
    "2^{n+1}",
    "\\sqrt{2+\\sqrt{3}}",
    "1+\\frac{1}{e}",
    "(a+5)(b+2)",
    "x^2-5x+6",
    "\\frac{x+1}{x-2}",
    "6-5i",
    "\\frac{2\\pi}{3}",
    "90^\\circ",
    "(3,\\frac{\\pi}{2})",
    "[-2,7)",
    "(-\\infty,0]\\cup[4,\\infty)",
    "y=2x+3",
    "\\{1,3,5\\}",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "52_8",
    "6.02e23",
    "e^{-2t}\\cos(3t)",
    "\\log_2 (x+1)",
    "a_{n+1}=2a_n+1",
    "\\frac{\\sqrt{a^2+b^2}}{c}",
    "k\\pi",
    "\\binom{10}{3}-1",
]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accepted(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    reward = MathReward(timeout=2.0, concurrency=1)
    verdicts = reward(
        [RewardInput(completion=f"\\boxed{{{answer}}}", answer=gold) for gold, answer in pairs]
    )
    reward.close()
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.score == 1]


def references(every: int) -> list[str]:
    if not DATA.is_dir():
        return REFERENCES
    rows = [
        json.loads(line)["answer"] for line in (DATA / "math500_answers" / "answers.jsonl").open()
    ]
    return REFERENCES + [row for row in rows if "\\text{" not in row][::every]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["brace_moves", "value_changes"])
def test_near_misses_are_refused(kind: str) -> None:
    mutate, judge = getattr(load("mutations"), kind), load("judge")
    pairs = list(dict.fromkeys((r, m) for r in references(8) for _, m in mutate(r) if m != r))
    right = accepted(pairs)
    wrong = [pair for pair in right if judge.same(*pair) is False]
    assert len(wrong) <= 0.005 * len(pairs), wrong


@pytest.mark.slow
def test_other_spellings_are_accepted() -> None:
    rewrite = load("rewritings").rewritings
    pairs = [(r, answer) for r in references(8) for _, answer in rewrite(r)]
    refused = set(pairs) - set(accepted(pairs))
    assert len(refused) <= 0.005 * len(pairs), sorted(refused)[:40]
