"""The nouns of a version that is broadcast from the learners into an engine's own processes.

`vllm_backend/transfer.py` has the two ends of the broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import ELEMENT_BYTES, TORCH_NAMES

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""name -> dtype (as safetensors spells it) and shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BroadcastGroup:
    """Rank 0 of the learners and the processes of all engines. A group that has lost a member is
    never used again."""

    host: str
    port: int
    """Port of the store by which learners and workers agree."""
    group: int
    """The group's number at that store."""
    workers: int
    device: str
    """A platform's name."""
    backend: str
    """vLLM's weight-transfer engine by which the processes receive."""
    ranks: int = 1
    """Processes of one engine."""
    engine_port: int = 0
    """The port at which those join rank 0 of the learners."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Broadcast:
    """One broadcast of a group."""

    group: BroadcastGroup
    number: int
    """Its number within the group, from 0."""
    timeout: float
    """Seconds after which a worker fetches the version another way."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineTransfer:
    """One version, and the broadcast that sends it."""

    broadcast: Broadcast
    tensors: Layout
    """The tensors, in the order in which they are sent."""
    digests: Mapping[str, str]

    @property
    def described(self) -> Layout:
        """`tensors` with torch's names of the dtypes."""
        return {name: (TORCH_NAMES[dtype], shape) for name, (dtype, shape) in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(
            math.prod(shape) * ELEMENT_BYTES[dtype] for dtype, shape in self.tensors.values()
        )


__all__ = ["Broadcast", "BroadcastGroup", "EngineTransfer", "Layout"]
