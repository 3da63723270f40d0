"""Whether what numba compiles can be kept between processes: compiling takes seconds of every
start."""

from __future__ import annotations

from typing import Any

from numba import njit


def _example(x: Any) -> Any:
    return x


def can_be_kept() -> bool:
    """Whether numba finds a folder for it: `NUMBA_CACHE_DIR`, the one of this file, or, where the
    installation may not be written to, the user's cache."""
    try:
        njit(cache=True)(_example)
    except RuntimeError:  # it has no other name for that
        return False
    return True


KEPT = can_be_kept()
