"""These tests need torch-npu over the stand-ins of CANN's libraries: `make test-ascend` sets both on
the path. Elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ready = importlib.util.find_spec("torch_npu") is not None and "/cann" in os.environ.get(
    "LD_LIBRARY_PATH", ""
)
collect_ignore_glob = [] if ready else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parent))  # `values.py` has no package
