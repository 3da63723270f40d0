"""The table "what is verified where" of configs/ascend/README.md, from the tests that ran.

    pytest -p verified tests/ascend ... --verified configs/ascend/README.md

writes it between the two markers there (tests of the ordinary environment, too, with this folder on
the path; `make test-ascend` knows which). Each test file says in `SHOWS` what it shows: a line of the
table -> the tests, separated by commas, that show it. A line whose tests were not all run and passed
says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- verified: begin -->", "<!-- verified: end -->"
_outcomes: dict[str, list[str]] = {}
_shows: dict[str, str] = {}
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


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--verified", help="write what was verified into this file's table")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """For the table, only those of its tests are run that are not of this folder."""
    for item in items:
        _shows.update(getattr(getattr(item, "module", None), "SHOWS", {}))
    if config.getoption("--verified", None):
        named = {name for tests in _shows.values() for name in tests.split(", ")}
        here = Path(__file__).parent
        items[:] = [
            item for item in items if here in item.path.parents or item.originalname in named
        ]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome == "skipped":
        name = report.nodeid.split("::")[-1].split("[")[0]
        _outcomes.setdefault(name, []).append(report.outcome)


def pytest_sessionfinish(session: Any) -> None:
    path = session.config.getoption("--verified", None)
    if path:
        write(Path(path), lines(_shows, _outcomes))
