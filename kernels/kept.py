"""Whether numba's compiled code can be cached between processes: compiling takes seconds of every
start."""

from __future__ import annotations

from typing import Any

from numba import njit


def _example(x: Any) -> Any:
    return x


def can_be_kept() -> bool:
    """Whether numba finds a writable cache folder: `NUMBA_CACHE_DIR`, this file's `__pycache__`,
    or, where the installation is read-only, the user's cache."""
    try:
        njit(cache=True)(_example)
    except RuntimeError:  # numba has no class of its own for "no locator available"
        return False
    return True


KEPT = can_be_kept()
