"""Captured graphs: on which platforms vLLM uses them, and a check that updates keep the addresses
that they read.

A graph reads the addresses with which it was captured. Weights that are written in place are read
at the next replay; a tensor that is allocated anew is not, without any error. So a table chooses
where graphs are used, each update compares the address of every tensor of the model with the one
before, and the canary (`..weights.canary`) decodes through the graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...kernels import platform
from ..weights.patch import MovedError

MOVED = "captured graphs are left behind: "
"""The beginning of a process's message about a tensor that graphs read at its old address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A row of the table."""

    device: str
    """A platform's name."""
    eager: bool
    reason: str
    rl_config: bool = False
    """Whether the row applies only if the installed vllm-ascend has `rl_config`."""


CHOICES = (
    Choice(
        device=platform.CPU.device,
        eager=False,
        reason="vLLM captures no graphs on a CPU, and its default there is left alone",
    ),
    Choice(
        device=platform.CUDA.device,
        eager=False,
        reason="reload_weights copies into the storage that was captured (0.21 and later also for"
        " mixtures of experts, vllm #40390); what moves all the same is refused, and the canary"
        " decodes through the graphs",
    ),
    Choice(
        device=platform.NPU.device,
        rl_config=True,
        eager=False,
        reason="rl_config keeps matrices in the plain format, and its sleep captures anew what it"
        " frees; what moves all the same is refused, and the canary decodes through the graphs",
    ),
    Choice(
        device=platform.NPU.device,
        eager=True,
        reason="before rl_config, vllm-ascend makes tensors anew after loading while its graphs"
        " read the old ones, and cannot capture again (vime #157, vllm-ascend #13905, #17197)",
    ),
)
"""The first row that applies is taken."""


def choice(device: str) -> Choice:
    """The row of `CHOICES` for a platform and the installed vllm-ascend."""
    rl_config = has_rl_config()
    return next(c for c in CHOICES if c.device == device and (rl_config or not c.rl_config))


def has_rl_config() -> bool:
    """Whether the installed vllm-ascend takes `additional_config.rl_config` (0.27.1 and later),
    read from its source: importing it needs CANN."""
    spec = importlib.util.find_spec("vllm_ascend")
    if spec is None or not spec.submodule_search_locations:
        return False
    source = Path(next(iter(spec.submodule_search_locations)), "ascend_config.py")
    return source.is_file() and "class RlConfig" in source.read_text()


class Place(NamedTuple):
    """A tensor's address and layout, as a captured graph reads it."""

    pointer: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


def places(model: Any) -> dict[str, Place]:
    """name -> place of every parameter, buffer and other tensor that a module of the model holds,
    since graphs also read tensors that are derived from weights. Tensors without memory are left
    out."""
    by_name = {}
    for prefix, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for name, value in held.items():
            if _has_memory(value):
                by_name[f"{prefix}.{name}".lstrip(".")] = Place(
                    value.data_ptr(), tuple(value.shape), tuple(value.stride()), str(value.dtype)
                )
    return by_name


def _has_memory(value: Any) -> bool:
    """Whether it is a tensor with an address: not packed by oneDNN, sparse, empty or on `meta`."""
    if not hasattr(value, "data_ptr") or str(value.layout) != "torch.strided":
        return False
    return bool(value.numel()) and value.device.type != "meta"


def moved(before: Mapping[str, Place], after: Mapping[str, Place]) -> list[str]:
    """Tensors whose place differs, or that are gone, each with the difference, e.g. `x.weight
    (pointer)`."""
    changes = []
    for name, place in before.items():
        if name not in after:
            changes.append(f"{name} (gone)")
        elif after[name] != place:
            differs = next(
                part
                for part, old, new in zip(Place._fields, place, after[name], strict=True)
                if old != new
            )
            changes.append(f"{name} ({differs})")
    return changes


def captures(worker: Any) -> bool:
    """Whether a vLLM worker decodes with captured graphs."""
    config = worker.vllm_config
    mode = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
    if worker.device.type == platform.CPU.device or config.model_config.enforce_eager:
        return False
    return getattr(mode, "name", "") != "NONE"


def check_in_place(worker: Any, before: Mapping[str, Place], after: Mapping[str, Place]) -> None:
    """Raises MovedError, with the first tensor, if a worker's graphs would go on reading tensors
    that have moved."""
    elsewhere = moved(before, after)
    if elsewhere and captures(worker):
        raise MovedError(
            f"{MOVED}the load made {len(elsewhere)} tensors of the engine anew, e.g."
            f" {elsewhere[0]}; set rollout.engine_args.enforce_eager=true"
        )
