"""Which way a version takes: whole or as a patch, and by what it travels. Pure decisions from
measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["dense", "patch"]
Transport = Literal["object_store", "collective", "directory"]

CODING_RATE = 1e9
"""Bytes of weights a second that a patch costs on each side, until that has been measured."""
COPY_RATE = 4e9
"""The same of weights that come whole."""
ADVANTAGE = 0.8
"""The other way must take at most this share of the time for `auto` to change over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements by which `auto` decides; None until taken."""

    num_bytes: float
    """Of the whole weights."""
    bandwidth: float | None = None
    """Bytes a second from the learners to an engine."""
    ratio: float | None = None
    """The whole weights / a patch."""
    coding_s: float = 0.0
    """Seconds to make a patch and to apply it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    mode: Mode
    why: str


def choose(measured: Measured, now: Mode) -> Choice:
    """The mode that takes less time for one version, with a bias to what is in use."""
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
    """The faster of Ray's object store and the broadcast into vLLM's processes; rates: bytes a
    second, of those that were tried. Only where vLLM has its engine for that and devices a fabric
    of their own (`fabric`) is it tried at all."""
    if not fabric:
        return "object_store"
    if now not in rates or (other := _OTHER[now]) not in rates:
        return now if now not in rates else _OTHER[now]
    return other if rates[now] < ADVANTAGE * rates[other] else now


_OTHER: Mapping[Transport, Transport] = {"object_store": "collective", "collective": "object_store"}


def guessed_ratio(changed: float) -> float:
    """How much smaller a patch of bfloat16 weights is, to within a factor of two, where this share
    of them changed."""
    return 1.0 / max(1 / 5000, min(1.0, 0.7 * changed))


__all__ = ["Choice", "Measured", "Mode", "Transport", "choose", "choose_transport", "guessed_ratio"]
