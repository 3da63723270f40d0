"""Tests and `bench_plan.py` import `other_simulation.py`, which has no package, by its name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
