"""The nouns of a version that goes from the learners into an engine's own processes, by a
broadcast.

`vllm_backend/transfer.py` has what the learners and the workers do with them.
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
    """Rank 0 of the learners and the processes of all engines; one that lost a member is never used
    again."""

    host: str
    port: int
    """Of the store by which learners and workers agree."""
    group: int
    """Its number at that store."""
    workers: int
    device: str
    """A platform's name."""
    backend: str
    """The weight-transfer engine of vLLM through which the processes receive."""
    ranks: int = 1
    """Processes of one engine."""
    engine_port: int = 0
    """Where those meet rank 0 of the learners."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Broadcast:
    """The next broadcast of a group."""

    group: BroadcastGroup
    number: int
    """Of the broadcast within its group, from 0."""
    timeout: float
    """Seconds, before a worker has the version another way."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EngineTransfer:
    """One version and the broadcast by which it comes."""

    broadcast: Broadcast
    tensors: Layout
    """In the order in which they are sent."""
    digests: Mapping[str, str]

    @property
    def described(self) -> Layout:
        """With torch's names of the dtypes."""
        return {name: (TORCH_NAMES[dtype], shape) for name, (dtype, shape) in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(
            math.prod(shape) * ELEMENT_BYTES[dtype] for dtype, shape in self.tensors.values()
        )


__all__ = ["Broadcast", "BroadcastGroup", "EngineTransfer", "Layout"]
