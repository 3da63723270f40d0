"""Copy-the-problem: every formula and number of a prompt given as the answer earns nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.math_answers.references import is_copy, read_reference
from emberl.rewards.math_answers.reward import MathReward

DATA = Path(__file__).parents[3].parent / "shared" / "data"
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?")

# a problem and its answer, which its formulas have the value of
FORMULAS: list[tuple[str, str]] = [
    (r"Evaluate $\log_4 16$.", "2"),
    (r"Compute $i^{62}$.", "-1"),
    (r"Simplify $(-5i)(8i)$.", "40"),
    (r"What is $\frac{30}{6}$?", "5"),
    (r"Find $\sum_{k=1}^{100} k$.", "5050"),
    (r"Find the value of $\int_0^1 x\,dx$.", r"\frac{1}{2}"),
    (r"Compute \(2^{10}\).", "1024"),
    (r"Simplify $\sqrt{50}$.", r"5\sqrt{2}"),
    (r"Expand $(x+1)^2$.", "x^2+2x+1"),
    (r"Factor $x^2-9$.", "(x-3)(x+3)"),
    (r"Simplify $\frac{x^2-1}{x-1}$.", "x+1"),
    (r"Differentiate: find $\frac{d}{dx} x^3$.", "3x^2"),
    (r"Evaluate $\sin^2\frac{T\pi}{2}+\sin^2\frac{(5-T)\pi}{2}$.", "1"),
    (r"Evaluate $\lim_{x\to 0}\frac{\sin x}{x}$.", "1"),
    (r"Find $\lfloor 7.9 \rfloor$.", "7"),
    (r"Compute $\binom{6}{2}$.", "15"),
    (r"Compute $5!$.", "120"),
    (r"Compute $|{-8}|$.", "8"),
    (r"Evaluate $\cos 60^\circ$.", r"\frac{1}{2}"),
    (r"Evaluate $\cos 60^\circ$.", "0.5"),
    (r"Find $\gcd(12, 18)$.", "6"),
    (r"What is $23 + 25$?", "48"),
    ("What is 23 + 25?", "48"),
    ("What is 12 * 4 - 6 / 2?", "45"),
    ("What is 15% of 200?", "30"),
    ("Compute 7+5-3=", "9"),
    (r"Write $0.\overline{3}$ as a fraction.", r"\frac{1}{3}"),
    (r"Write $\frac{3}{8}$ as a decimal.", "0.375"),
    (r"Convert $1011_2$ to base ten.", "11"),
    (r"Express $3.2\times 10^3$ in standard notation.", "3200"),
    (r"Simplify $e^{\ln 7}$.", "7"),
    (r"Compute $\det\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}$.", "-2"),
    (r"Solve $2x = 10$ for $x$.", "5"),
    (r"Solve $x + 3 = 8$.", "x=5"),
    (r"Rationalise $\frac{1}{\sqrt{2}}$.", r"\frac{\sqrt{2}}{2}"),
    (r"Simplify $\sqrt{3+2\sqrt{2}}$.", r"1+\sqrt{2}"),
    (r"Write $x>2$ in interval notation.", r"(2,\infty)"),
    (r"Write $|x|<3$ in interval notation.", "(-3,3)"),
    (r"Compute $(1+2i)(1-2i)$.", "5"),
    (r"Compute $100^{1/2}$.", "10"),
    (r"计算 $\sqrt{16}+2$ 的值。", "6"),
    (r"求 $\log_2 32$。", "5"),
    (r"If $f(x) = x+1$, find $f(4)$.", "5"),
    (r"Simplify $\frac{6x}{2x}$.", "3"),
    (r"Simplify $\sin^2 x+\cos^2 x$.", "1"),
    (r"Find $x - x + 5$.", "5"),
    (r"Evaluate $\max(3, 9)$.", "9"),
    (r"Evaluate $17 \bmod 5$.", "2"),
    (r"Convert $\pi$ radians to degrees.", r"180^\circ"),
    (r"Convert $180^\circ$ to radians.", r"\pi"),
]


def candidates(prompt: str) -> list[str]:
    """What a policy could copy: each formula, its sides, and its pieces without `=`."""
    found: list[str] = []
    for match in _MATH.finditer(prompt):
        formula = next(group for group in match.groups() if group).strip()
        found += [formula, formula.rstrip("="), *(side.strip() for side in formula.split("="))]
    found += [number.strip() for number in _NUMBER.findall(prompt)]
    found += re.findall(r"[\d.]+(?:\s*[-+*/%]\s*[\d.]+)+", prompt)
    return list(dict.fromkeys(text for text in found if text))


def paid(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    reward = MathReward()
    verdicts = reward(
        [RewardInput(prompt=p, completion=f"\\boxed{{{a}}}", answer=r) for p, r, a in rows]
    )
    reward.close()
    return [row for row, verdict in zip(rows, verdicts, strict=True) if verdict.score == 1]


def test_formulas_of_the_problem_are_no_answers() -> None:
    rows = [
        (prompt, reference, answer)
        for prompt, reference in FORMULAS
        for answer in candidates(prompt)
    ]
    assert paid([row for row in rows if row[1] != row[2]]) == []


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded data is not at ../shared/data")
def test_numbers_of_a_problem_pay_only_as_the_reference_is_written() -> None:
    problems = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").open()]
    rows = [
        (p["question"], p["answer"], answer)
        for p in problems
        for answer in candidates(p["question"])
    ]
    own = [p["answer"].split("####")[1].strip().replace(",", "") for p in problems]
    own_of = dict(zip((p["question"] for p in problems), own, strict=True))
    assert [
        row
        for row in paid(rows)
        if float(row[2].replace(",", "").rstrip("%")) != float(own_of[row[0]])
    ] == []
    assert [row for row in paid(rows) if row[2].endswith("%")] == []


@pytest.mark.parametrize(
    ("reference", "answer", "prompt", "copied"),
    [
        ("5", "5", "Is it 5 or 6?", False),
        ("5", "n = 5", "Is it 5 or 6?", False),
        ("\\frac{1}{2}", "1/2", "What is 1/2 of 1?", False),
        ("0.5", "1/2", "What is 1/2 of 1?", True),
        ("0.5", "1/2", "What is 11/2 of 1?", False),
        ("B", "B", "(A) 1 (B) 2", False),
        ("2, 3", "3, 2", "Sort 3, 2.", False),
        ("(2,\\infty)", "x>2", "Write x>2 in interval notation.", True),
    ],
)
def test_what_is_a_copy(reference: str, answer: str, prompt: str, copied: bool) -> None:
    assert is_copy(read_reference(reference).tree, answer, prompt) is copied
