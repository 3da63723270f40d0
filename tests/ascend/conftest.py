"""These tests need triton-ascend (those in npu/ torch-npu). Looking for it must not import stock
Triton: the interpreter's switch is read then."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from verified import (  # noqa: F401 -- pytest's hooks
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)

_triton = importlib.util.find_spec("triton")
_places = (
    []
    if _triton is None
    else [Path(p) / "backends/ascend" for p in _triton.submodule_search_locations or ()]
)
collect_ignore_glob = [] if any(place.exists() for place in _places) else ["test_*.py"]
