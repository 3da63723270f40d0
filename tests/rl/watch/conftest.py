"""The planted faults of Ascend boxes, as the module `planted` for the tests of this folder, which is
no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = sys.modules["planted"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
