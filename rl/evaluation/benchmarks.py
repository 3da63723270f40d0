"""Ready evaluation sets: public benchmarks with their prompt templates and verifiers.

An entry is a set as in `eval.sets`; its data set's columns are known, so that a file of the same
rows can stand in for the Hub (`gsm8k=test.jsonl`). Where a set has no template of its own here,
`rl/data` makes the prompt: MBPP's text with its first test, LiveCodeBench's question with its
starter code (`tests/rl/evaluation/test_benchmarks.py` has rows of each and what becomes of them).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.files import find_files
from ..data.rows import GYM

_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_FUNCTION = (
    "Complete this Python function. Answer with the whole function, imports included, in one code"
    " block.\n```python\n{prompt}```"
)
_PROGRAM = (
    "You are an expert Python programmer. Solve the problem by a correct Python program in one code"
    " block. Where a signature is given, write that function; else the program reads from stdin and"
    " writes to stdout."
)
_FROM_HUB = ("subset", "split", "revision")


def _math(source: str, split: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "source": source,
        "split": split,
        "prompt_template": f"{{{question}}}{_BOXED}",
        "answer_column": answer,
        "verifier": "math",
        **more,
    }


READY: Mapping[str, Mapping[str, Any]] = {
    "gsm8k": _math(
        "openai/gsm8k", "test", "question", "answer", subset="main", answer_pattern="#### (.+)"
    ),
    "math500": _math("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "aime24": _math("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": _math("math-ai/aime25", "test", "problem", "answer"),
    "amc23": _math("math-ai/amc23", "test", "question", "answer"),
    "minerva": _math("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": _math(
        "Hothan/OlympiadBench", "train", "question", "final_answer", subset="OE_TO_maths_en_COMP"
    ),
    "humaneval": {
        "source": "openai/openai_humaneval",
        "split": "test",
        "prompt_template": _FUNCTION,
        "tests_column": "test",
        "verifier": "code",
    },
    "humaneval+": {
        "source": "evalplus/humanevalplus",
        "split": "test",
        "prompt_template": _FUNCTION,
        "tests_column": "test",
        "verifier": "code",
    },
    "mbpp": {
        "source": "google-research-datasets/mbpp",
        "subset": "full",
        "split": "test",
        "verifier": "code",
    },
    "mbpp+": {
        "source": "evalplus/mbppplus",
        "split": "test",
        "prompt_template": "{prompt}\n\nYour code should pass this test:\n{test_list.0}",
        "tests_column": "test",  # its `test_list` has MBPP's own few
        "verifier": "code",
    },
    "livecodebench": {
        "source": "livecodebench/code_generation_lite",
        "split": "test",
        "layout": "livecodebench",
        "system_prompt": _PROGRAM,
        "verifier": "code",
    },
}


def named_set(text: str) -> tuple[str, dict[str, Any]]:
    """(name, keys as in `eval.sets`) of a value of `--data`: a ready set, `NAME=FILES`, where a
    ready set's name brings its template and verifier along, or files, a Hub data set or a generated
    source.

    Raises ValueError if nothing has that name.
    """
    given, equals, source = text.partition("=")
    if not equals:
        given, source = "", text
        if text in READY:
            return text, {"name": text, **READY[text]}
    elif given in READY:
        ready = {key: value for key, value in READY[given].items() if key not in _FROM_HUB}
        return given, {"name": given, **ready, "source": source}
    if given and not re.fullmatch(r"[\w.+-]+", given):
        raise ValueError(
            f"--data {text}: {given!r} is to be the set's name, which has letters, digits and"
            " . _ + - only; write NAME=FILES"
        )
    generated = source == "arithmetic" or source.startswith(GYM)
    if not generated and find_files(source, "--data", "test") is None:
        near = difflib.get_close_matches(source, READY, n=1)
        if near or "/" not in source or Path(source).suffix:
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(
                f"--data {text}: no file of that name, and no ready set{hint} There are"
                f" {', '.join(READY)}; or give files, a Hub data set owner/name or {GYM}<task>"
            )
    stem = Path(source.rstrip("/")).name.split(".")[0].removeprefix(GYM).replace("*", "")
    return given or stem or "data", {"source": source}
