"""Where compiled loops are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.kernels.kept import can_be_kept
from numba.core import caching


def _unwritable(self: Any) -> None:
    raise PermissionError("read-only")


def test_an_installation_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching.InTreeCacheLocator, "ensure_cache_path", _unwritable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert can_be_kept()
    assert [folder.name for folder in tmp_path.iterdir()] == ["numba"]  # the user's cache


def test_a_machine_without_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
        monkeypatch.setattr(each, "ensure_cache_path", _unwritable)
    assert not can_be_kept()
