"""A language model's output layer as the loss sees it, and the shifted logits that every kernel
works with.

    x[v] = h . W[v] + b[v]                         raw logit
    z[v] = cap * tanh(logit_scale * x[v] / cap) / T  (logit_scale * x[v] / T without a soft-cap)

Kernels never store x. They store u = h . W[v] - r, with a shift r per token that is folded into the
matrix product, so that the rounding to the operands' dtype falls on a number near the log-prob
instead of on a large logit. Shape legend: n tokens of one chunk, V vocabulary entries, H hidden
size.
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
    """How the stored u [V, n] becomes a shifted logit z' = z - m, and how E = exp(z') becomes a
    gradient again.

    Linear: z' = scale * (u + b). Soft-capped: z' = scale / inner * tanh(inner * (u + raw + b)) -
    level.
    """

    scale: float | Tensor
    """logit_scale / T, a number or [n]."""
    raw: Tensor
    """r [n]: what was subtracted from the raw logits, a number of the tile's dtype."""
    level: Tensor
    """m [n]: what z' lacks of z."""
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
