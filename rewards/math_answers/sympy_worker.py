"""The symbolic comparison, for worker processes only: math-verify behind stricter rules. Imports sympy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


def serve() -> Callable[[dict[str, Any]], bool]:
    """A function of `{"gold", "answer"}` (is it the same?) or `{"gold"}` (can it be read?)."""

    logging.disable(logging.CRITICAL)  # math-verify logs a warning with a traceback for every odd input

    @lru_cache(maxsize=1024)
    def read(text: str) -> list[Any]:
        configs = (LatexExtractionConfig(), ExprExtractionConfig())
        found: list[Any] = parse(f"${text}$", extraction_config=configs, parsing_timeout=None)
        return found

    def answer(task: dict[str, Any]) -> bool:
        gold = read(task["gold"])
        if "answer" not in task:
            return any(not isinstance(value, str) for value in gold)
        return bool(verify(gold, read(task["answer"]), timeout_seconds=None))

    return answer
