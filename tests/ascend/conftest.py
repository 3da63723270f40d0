"""These tests need triton-ascend. Looking for it must not import stock Triton: the interpreter's
switch is read then."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_triton = importlib.util.find_spec("triton")
_places = (
    []
    if _triton is None
    else [Path(p) / "backends/ascend" for p in _triton.submodule_search_locations or ()]
)
collect_ignore_glob = [] if any(place.exists() for place in _places) else ["test_*.py"]
