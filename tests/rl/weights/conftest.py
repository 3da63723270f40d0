"""The tests here import fakes by name: `import faulty_engines`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "faulty_engines", Path(__file__).parents[2] / "faulty_engines.py"
)
assert _spec is not None and _spec.loader is not None
sys.modules["faulty_engines"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["faulty_engines"])
