"""A language model's output layer as the loss sees it, and the shifted logits that every kernel
works with.

    x[v] = h . W[v] + b[v]                         raw logit
    z[v] = cap * tanh(logit_scale * x[v] / cap) / T  (logit_scale * x[v] / T without a soft-cap)

Kernels never store x. They store u = h . W[v] - r, with a shift r per token that is folded into the
matrix product, so that the rounding to the operands' dtype falls on a number near the log-prob
instead of on a large logit.

The checked arguments of the fused loss are here, too (`prepare`): every error names the argument,
what was seen and what is wanted.

Shape legend: n tokens of one chunk, V vocabulary entries, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..platform import PLATFORMS


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products of operands of `dtype` are made: float32 for bfloat16 on a
    CPU for which oneDNN has no bfloat16 product (x86 without AVX-512), where torch's own takes
    eight times as long."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return dtype
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    fast = built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if fast else torch.float32


def add_product(out: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """out += a b, or out = a b where `fresh`; a [m, k] and b [k, n] of one dtype, out [m, n] of
    any. Where the library can, a wider result takes the sums as the multipliers have them, else the
    product is rounded to a's dtype between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if fresh else out.addmm_(a, b)
    elif (
        out.dtype == torch.float32
        and a.device.type in PLATFORMS
        and PLATFORMS[a.device.type].wide_products
    ):
        if fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        product = torch.mm(a, b)
        out.copy_(product) if fresh else out.add_(product)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The output layer. `temperature` is a number or [N], one per token."""

    weight: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def scale(self, index: Tensor | slice) -> float | Tensor:
        """logit_scale / T of the tokens `index`: a number, or [n] in float32."""
        if isinstance(self.temperature, Tensor):
            return self.logit_scale / self.temperature[index].to(accumulator(self.weight.dtype))
        return self.logit_scale / self.temperature

    def logits(self, raw: Tensor, scale: float | Tensor) -> Tensor:
        """z of raw logits [n]."""
        if self.softcap is None:
            return raw if isinstance(scale, float) and scale == 1.0 else raw * scale
        inner = self.logit_scale / self.softcap
        return torch.tanh(raw * inner) * scale / inner


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """The map from the stored u [V, n] to shifted logits z' = z - m, and from E = exp(z') back to
    the gradient by the raw logits.

    Linear: z' = scale * (u + b). Soft-capped: z' = scale / inner * tanh(inner * (u + raw + b)) -
    level.
    """

    scale: float | Tensor
    """logit_scale / T, a number or [n]."""
    raw: Tensor
    """r [n]: the shift subtracted from the raw logits, representable in the tile's dtype."""
    level: Tensor
    """m [n] = z - z'."""
    inner: float | None
    """logit_scale / cap, or None without a soft-cap."""

    @staticmethod
    def around(
        head: Head, target: Tensor, shift: Tensor, scale: float | Tensor, dtype: torch.dtype
    ) -> Transform:
        """The transform that puts the log-prob estimates `shift` [n] at z' of the raw target logits
        `target` [n], for tiles of `dtype`."""
        wide = target.dtype
        if head.softcap is None:
            raw = (target - shift / scale).to(dtype).to(wide)
            return Transform(scale=scale, raw=raw, level=raw * scale, inner=None)
        level = head.logits(target, scale) - shift
        return Transform(
            scale=scale,
            raw=target.to(dtype).to(wide),
            level=level,
            inner=head.logit_scale / head.softcap,
        )

    def at(self, target: Tensor) -> Tensor:
        """z' of raw logits [n] that were computed apart, in full precision."""
        if self.inner is None:
            return (target - self.raw) * self.scale
        return torch.tanh(target * self.inner) * self.scale / self.inner - self.level


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
    """Raises ValueError unless a given tensor has this shape, dtype (None: any) and device."""
    if value is None:
        return
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted {shape}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; wanted {dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; wanted {device}, where hidden is")


def refuse_not_finite(call: Call, logp: Tensor) -> None:
    """Raises ValueError if a log-prob of `logp` [N] is infinite or NaN."""
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
