"""The choice between whole weights and patches, and of their transport, for `auto`: pure functions
of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["dense", "patch"]
Transport = Literal["object_store", "collective", "directory"]

CODING_RATE = 1e9
"""Bytes of weights a second at which each side codes a patch, until that has been measured."""
COPY_RATE = 4e9
"""Bytes of weights a second at which weights that come whole are copied."""
ADVANTAGE = 0.8
"""`auto` changes to another way only if that takes at most this share of the current one's time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements by which `auto` decides; None until taken."""

    num_bytes: float
    """Bytes of the whole weights."""
    bandwidth: float | None = None
    """Bytes a second from the learners to an engine."""
    ratio: float | None = None
    """Bytes of the whole weights / bytes of a patch."""
    coding_s: float = 0.0
    """Seconds to make a patch and to apply it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    mode: Mode
    why: str


def choose(measured: Measured, now: Mode) -> Choice:
    """The mode that takes less time for one version, with a bias to the current one."""
    if measured.bandwidth is None:
        return Choice(mode=now, why="the link has not been measured yet")
    dense = measured.num_bytes / measured.bandwidth + measured.num_bytes / COPY_RATE
    coding = measured.coding_s or 2 * measured.num_bytes / CODING_RATE
    ratio = measured.ratio or 50.0
    patch = measured.num_bytes / ratio / measured.bandwidth + coding
    better: Mode = "patch" if patch < dense else "dense"
    if better != now and min(patch, dense) > ADVANTAGE * max(patch, dense):
        better = now
    why = (
        f"{measured.num_bytes / 1e6:.3g} MB of weights at {measured.bandwidth / 1e6:.3g} MB/s:"
        f" dense {dense:.2g} s, patches {patch:.2g} s ({ratio:.3g}x smaller, {coding:.2g} s to"
        " code)"
    )
    return Choice(mode=better, why=why)


def choose_transport(
    rates: Mapping[Transport, float], now: Transport, *, fabric: bool
) -> Transport:
    """The faster of Ray's object store and the broadcast into vLLM's processes; each is tried once.
    rates: bytes a second of those that were tried. fabric: whether the broadcast is possible, i.e.
    vLLM has its engine for it and the devices have a fabric of their own."""
    if not fabric:
        return "object_store"
    if now not in rates or (other := _OTHER[now]) not in rates:
        return now if now not in rates else _OTHER[now]
    return other if rates[now] < ADVANTAGE * rates[other] else now


_OTHER: Mapping[Transport, Transport] = {"object_store": "collective", "collective": "object_store"}


def guessed_ratio(changed: float) -> float:
    """An estimate, to within a factor of two, of `Measured.ratio` for bfloat16 weights of which the
    share `changed` has changed."""
    return 1.0 / max(1 / 5000, min(1.0, 0.7 * changed))


__all__ = ["Choice", "Measured", "Mode", "Transport", "choose", "choose_transport", "guessed_ratio"]
