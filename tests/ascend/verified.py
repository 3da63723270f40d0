"""The table "what is verified where" of configs/ascend/README.md, from the tests that ran.

    pytest tests/ascend ... --verified configs/ascend/README.md

writes it between the two markers there. Each test file says in `SHOWS` what it shows: a line of the
table -> the tests, separated by commas, that show it. A line whose tests were not all run and passed
says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- verified: begin -->", "<!-- verified: end -->"
HEAD = "| what | x86-64, without a card | H200 | Ascend |\n|---|---|---|---|\n"


def lines(shows: Mapping[str, str], outcomes: Mapping[str, list[str]]) -> list[str]:
    """Rows of the table; outcomes: a test's name -> how each of its cases ended."""
    found = []
    for what, tests in shows.items():
        ended = [end for name in tests.split(", ") for end in outcomes.get(name, ["not run"])]
        worst = next((end for end in ("failed", "not run", "skipped") if end in ended), "passed")
        said = f"{len(ended)} tests" if worst == "passed" else worst
        found.append(f"| {what} | {said} | | |")
    return found


def replaced(text: str, rows: list[str]) -> str:
    """`text` with these rows in the place of those that it has of the same things, the others as
    they are."""
    old = re.search(rf"{BEGIN}\n(.*?){END}", text, re.DOTALL)
    assert old is not None, f"no {BEGIN} ... {END}"
    kept = {row.split("|")[1].strip(): row for row in old[1].splitlines()[2:]}
    kept |= {row.split("|")[1].strip(): row for row in rows}
    return text.replace(
        old[0], f"{BEGIN}\n{HEAD}" + "".join(f"{row}\n" for row in kept.values()) + END
    )


def write(path: Path, rows: list[str]) -> None:
    path.write_text(replaced(path.read_text(), rows))
