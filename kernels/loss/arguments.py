"""The arguments of the fused loss, checked: every error names the argument, what was seen and what
is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .head import Head

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Checked operands in the dtype in which they are multiplied."""

    hidden: Tensor
    targets: Tensor
    head: Head

    @property
    def index(self) -> Tensor:
        """[N] int64: all tokens in order."""
        return torch.arange(len(self.hidden), device=self.hidden.device)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    shift: Tensor | None,
) -> Call:
    """Checks the arguments that both public functions share, and applies autocast as a linear layer
    would."""
    _check_operands(hidden, weight, bias)
    count = (len(hidden),)
    check("targets", targets, count, torch.int64, hidden.device)
    check("shift", shift, count, None, hidden.device)
    _check_scaling(temperature, logit_scale, softcap, hidden)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if isinstance(temperature, Tensor) and temperature.ndim == 0:
        temperature = float(temperature)
    head = Head(
        weight=weight, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap
    )
    _check_targets(targets, len(weight))
    return Call(hidden=hidden, targets=targets, head=head)


def check(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """An optional tensor's shape, dtype (None for any) and device."""
    if value is None:
        return
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted {shape}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; wanted {dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; wanted {device}, where hidden is")


def refuse_not_finite(call: Call, logp: Tensor) -> None:
    """ValueError if a log-prob [N] is not a number below infinity."""
    broken = (~torch.isfinite(logp)).nonzero()
    if len(broken):
        raise not_finite(call.hidden, int(broken[0]))


def not_finite(hidden: Tensor, row: int) -> ValueError:
    """The error for a token whose logits are not finite."""
    culprit = "weight or bias" if bool(torch.isfinite(hidden[row]).all()) else "hidden"
    return ValueError(
        f"{culprit} is not finite, which makes the logits of row {row} not finite; look for a step"
        " that diverged"
    )


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; wanted [N,"
            " H] and [V, H] (flatten batch and time first)"
        )
    if len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted [V, H] with V at least 1")
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden has dtype {hidden.dtype}; wanted one of {', '.join(map(str, DTYPES))}"
        )
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"weight has dtype {weight.dtype}; wanted {hidden.dtype}, as hidden (cast one, or use"
            " autocast)"
        )
    check("weight", weight, tuple(weight.shape), None, hidden.device)
    check("bias", bias, (len(weight),), None, hidden.device)


def _check_scaling(
    temperature: float | Tensor, logit_scale: float, softcap: float | None, hidden: Tensor
) -> None:
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(
                "temperature requires a gradient, which the fused loss does not give; detach it"
            )
        if temperature.ndim:
            check("temperature", temperature, (len(hidden),), None, hidden.device)
        lowest = float(temperature.min()) if temperature.numel() else 1.0
    else:
        lowest = temperature
    for name, value in (
        ("temperature", lowest),
        ("logit_scale", logit_scale),
        ("softcap", softcap),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; wanted a finite number above 0")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    outside = ((targets < 0) | (targets >= vocabulary)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}; wanted an id from 0 to {vocabulary - 1} in"
            " every row"
        )
