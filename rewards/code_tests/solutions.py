"""A row's own solutions: the names they define, and programs by which its tests are verified before
training."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..syntax import syntax_tree

# Columns and who writes so: HumanEval; MBPP; KodCode; SYNTHETIC-1; LeetCodeDataset; APPS, TACO,
# CodeContests.
_ONE = (
    "canonical_solution",
    "code",
    "solution",
    "gold_standard_solution",
    "reference_solution",
    "completion",
)
_MANY = "solutions"
_MOST = 3  # of many solutions: where none of three passes, the tests are to blame
_PYTHON3, _CPP = 3, 2  # CodeContests' numbers of languages


def solutions_of(columns: Mapping[str, Any]) -> list[str]:
    """The row's own solutions as completions, the most trusted first; empty if it has none."""
    solutions = [
        text for key in _ONE if isinstance(text := columns.get(key), str) and _is_program(text)
    ][:1]
    if not solutions:
        solutions = [text for text in _many(columns.get(_MANY)) if _is_program(text)][:_MOST]
    if not solutions:
        solutions = [text for text in _best(columns.get("inferences")) if _is_program(text)][:1]
    prompt = columns.get("prompt")
    if (
        solutions
        and columns.get("entry_point")
        and isinstance(prompt, str)
        and columns.get("canonical_solution") == solutions[0]
    ):
        head = str(columns.get("code_prompt") or prompt)
        solutions = (
            [head + solutions[0]]
            if f"def {columns['entry_point']}" not in solutions[0]
            else solutions
        )
    return [text if "```" in text else f"```{_tag(text)}\n{text}\n```" for text in solutions]


def defined_names(columns: Mapping[str, Any]) -> frozenset[str]:
    """The names that the row's own solution binds at its top level, without imports."""
    for key in _ONE:
        text = columns.get(key)
        if isinstance(text, str) and _is_program(text) and "```" not in text:
            try:
                body = syntax_tree(text).body
            # the body of a function that continues a prompt
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            names = {node.name for node in body if isinstance(node, kinds)}
            targets = [
                target for node in body if isinstance(node, ast.Assign) for target in node.targets
            ]
            return frozenset(
                names | {target.id for target in targets if isinstance(target, ast.Name)}
            )
    return frozenset()


def _is_program(text: str) -> bool:
    """Whether a text is a program that does something; some files have a stub such as `sys.exit(0)`
    for a solution."""
    return any(
        word in text
        for word in ("def ", "class ", "print", "return", "write", "lambda", "cout", "printf")
    )


def _tag(text: str) -> str:
    return "cpp" if "#include" in text else "python"


def _many(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, Mapping) and isinstance(value.get("solution"), list):  # CodeContests
        pairs = list(zip(value.get("language", []), value["solution"], strict=False))
        names = {_PYTHON3: 0, "PYTHON3": 0, _CPP: 1, "CPP": 1}
        return [
            text
            for language, text in sorted(pairs, key=lambda p: names.get(p[0], 2))
            if language in names
        ]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _best(value: Any) -> Sequence[str]:
    """AceCode's model answers that passed every test."""
    rows = value if isinstance(value, list) else []
    return [
        str(row.get("completion") or row.get("inference"))
        for row in rows
        if isinstance(row, Mapping) and row.get("pass_rate") == 1.0
    ]
