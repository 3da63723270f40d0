"""Two environments, as a user writes them:

rollout.environment=./example_environments.py:Calculator
rollout.environment=./example_environments.py:GuessGame   reward.parts={game: {use: environment}}
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

from emberl.rollout.environments import Environment, Step
from emberl.rollout.samples import Prompt

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


class Calculator(Environment):
    """Works out what the model puts between `<calc>` and `</calc>`; a turn without that is the
    answer, which a verifier marks."""

    role = "tool"

    def step(self, text: str) -> Step:
        calls = re.findall(r"<calc>(.*?)</calc>", text, re.DOTALL)
        return (work_out(calls[-1]), None, False) if calls else ("", None, True)


def work_out(expression: str) -> str:
    """The value as text, or what is wrong; four operations of numbers and brackets, nothing
    else."""
    try:
        return f"{_value(ast.parse(expression.strip()[:200], mode='eval').body):.10g}"
    except (SyntaxError, ValueError, ArithmeticError) as error:
        return f"error: {error}"


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return float(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return float(OPERATORS[type(op)](_value(operand)))
    raise ValueError("only + - * / and brackets")


class GuessGame(Environment):
    """The row's answer is a number from 0 to 9. The model guesses, hears `+` (it is more) or `-`
    (less), and guesses once more. Right at once pays 1, right the second time 0.8; else the second
    guess pays the less the farther it is off, and something without a digit pays nothing."""

    def reset(self, prompt: Prompt) -> None:
        self.secret, self.turn = int(prompt.answer), 0

    def step(self, text: str) -> Step:
        self.turn += 1
        digits = re.findall(r"[0-9]", text)
        off = abs(int(digits[0]) - self.secret) if digits else 10
        if off == 0:
            return "", 1.0 if self.turn == 1 else 0.8, True
        if self.turn == 2:
            return "", 0.05 * (10 - off), True
        return "+" if digits and int(digits[0]) < self.secret else "-", None, False
