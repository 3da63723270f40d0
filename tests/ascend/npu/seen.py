"""What operators ran on a device that computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Counts operators by name, and says which had a float64 tensor on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.float64: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count[name] = self.count.get(name, 0) + 1
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float64
                and tensor.device.type == "npu"
            ):
                self.float64.add(name)
        return out
