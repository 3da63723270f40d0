"""These tests need triton-ascend (those in npu/ torch-npu). Looking for it must not import stock
Triton: the interpreter's switch is read then."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import verified

_triton = importlib.util.find_spec("triton")
_places = (
    []
    if _triton is None
    else [Path(p) / "backends/ascend" for p in _triton.submodule_search_locations or ()]
)
collect_ignore_glob = [] if any(place.exists() for place in _places) else ["test_*.py"]
_outcomes: dict[str, list[str]] = {}
_shows: dict[str, str] = {}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--verified", help="write what was verified into this file's table")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        _shows.update(getattr(getattr(item, "module", None), "SHOWS", {}))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome == "skipped":
        name = report.nodeid.split("::")[-1].split("[")[0]
        _outcomes.setdefault(name, []).append(report.outcome)


def pytest_sessionfinish(session: Any) -> None:
    path = session.config.getoption("--verified", None)
    if path:
        verified.write(Path(path), verified.lines(_shows, _outcomes))
