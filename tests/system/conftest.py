"""The small system, and the Ray cluster that most of its runs share, as fixtures."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "small_system", Path(__file__).with_name("small.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_system"] = module
    spec.loader.exec_module(module)
    return module


small_system = _load()


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """A cluster of this process for the runs in it, which leave it up: to start one takes longer
    than most of them. Not for the session: other tests kill all children of this process, and
    without its cluster the process ends."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture
def emberl(tmp_path: Path, request: pytest.FixtureRequest) -> object:
    return small_system.Emberl(tmp_path, lambda: request.getfixturevalue("shared_ray"))
