"""The small system, as a fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_system", Path(__file__).with_name("small.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_system"] = module
    spec.loader.exec_module(module)
    return module


small_system = _load()


@pytest.fixture
def emberl(tmp_path: Path) -> object:
    return small_system.Emberl(tmp_path)
