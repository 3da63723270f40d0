"""The floating-point operations of a model's passes, and their share of a device's peak (MFU).

MFU counts what the model needs, not what the hardware happens to do: recomputation under gradient
checkpointing, padding and masked products are left out, so doing less of them raises it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COUNTED = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of a dense decoder of the Llama shape: attention with grouped heads, a gated MLP, and a
    head.

    A multiplication and an addition are two operations; only matrix products count. A token costs
    two per weight of the layers, and two per weight of the head if it is a loss token (the fused
    loss takes no others through the head); looking up an embedding is no product, so a tied model
    costs as much as an untied one. Attention over L tokens costs 4 L^2 * heads * head_dim a layer
    for the two products over the full square; a causal pass needs half of it. An update is three
    times a forward pass: backward has two products for each, by the inputs and by the weights.

    Other conventions: PaLM (arXiv 2204.02311, appendix B) counts the full square and the head for
    every token, as torch.utils.flop_counter does of whatever runs; that also sees padding, and five
    products instead of four in the backward of fused attention, which forms the scores anew.
    `causal=False` is the full square, for comparing with these. verl halves the square as here, but
    counts the embedding as a product and the head for every token.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> ModelFlops:
        """The sizes in a transformers configuration.

        Raises:
            ValueError: an architecture that this does not count, such as a mixture of experts or
                sliding windows.
        """
        kind = config.model_type
        if kind not in COUNTED:
            raise ValueError(
                f"FLOPs of model_type={kind!r} are not counted, only those of {', '.join(COUNTED)}"
            )
        if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ()):
            raise ValueError(
                f"FLOPs of this {kind} are not counted: not all of its layers have full attention"
            )
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def token(self) -> int:
        """One token through all layers, forward, without its attention to other tokens."""
        # q and output, k and v
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return 2 * self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """One loss token through the head, forward."""
        return 2 * self.hidden * self.vocabulary

    def attention(self, length: int, *, causal: bool = True) -> int:
        """The two products between a sequence's tokens in all layers, forward."""
        square = 4 * int(length) ** 2 * self.heads * self.head_dim * self.layers
        return square // 2 if causal else square

    def sequence(self, length: int, *, causal: bool = True) -> int:
        """A whole sequence through all layers, forward, without the head: its cost when
        micro-batches are balanced."""
        return int(length) * self.token + self.attention(length, causal=causal)

    def forward(self, lengths: Iterable[int], loss_tokens: int, *, causal: bool = True) -> int:
        """A forward pass over sequences of these lengths, of whose tokens `loss_tokens` go through
        the head."""
        return (
            sum(self.sequence(length, causal=causal) for length in lengths)
            + int(loss_tokens) * self.head
        )

    def update(
        self,
        lengths: Iterable[int],
        loss_tokens: int,
        *,
        causal: bool = True,
        frozen_weights: bool = False,
        repeated: int = 0,
    ) -> int:
        """Forward and backward of an update, without the optimizer.

        repeated: tokens of prompts that another sequence has computed; attention sees them.
        frozen_weights: only adapters (LoRA) train, so there are no gradients by the model's own
            weights, and products with them cost twice a forward pass. The adapters' own small
            products are not counted.
        """
        sizes = [int(length) for length in lengths]
        attention = sum(self.attention(length, causal=causal) for length in sizes)
        weights = (sum(sizes) - repeated) * self.token + int(loss_tokens) * self.head
        return 3 * attention + (2 if frozen_weights else 3) * weights


def counted(config: Any) -> bool:
    """Whether `ModelFlops` counts the model: its layers mix tokens by full attention alone."""
    try:
        ModelFlops.of(config)
    except ValueError:
        return False
    return True


PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H800": 989.5e12,
    "NVIDIA H800 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "Ascend910B1": 400e12,
    "Ascend910B2": 376e12,
    "Ascend910B3": 313e12,
    "Ascend910B4": 280e12,
    "Ascend910_9362": 280e12,
    "Ascend910_9382": 376e12,
    "Ascend910_9392": 400e12,
}
"""Dense bfloat16 FLOP/s of one device by the name that torch reports, or the beginning of it.

NVIDIA: data sheets, whose figures from Hopper on are for 2:4 sparsity and halved here; H800 and H20
are not on public data sheets and unverified. Ascend: unverified. The figures are in the names that
Huawei's MindStudio gives the boards (Atlas 800T A2 "376T" and so on), which do not say for which
precision; a 910C, Ascend910_93xx, shows as two devices, and half of its figure stands here. For the
9382 that is what arXiv 2506.12708 gives a die in bfloat16.
"""


def peak_flops(device_name: str | None) -> float | None:
    """Dense bfloat16 FLOP/s of the device of this name; None where it is unknown: a CPU, a slice of
    a GPU (MIG), or a device that is not in the table."""
    name = device_name or ""
    if " MIG " in name:
        return None
    known = [key for key in PEAKS if name == key or name.startswith((f"{key} ", f"{key}-"))]
    return PEAKS[max(known, key=len)] if known else None


def speed(
    flops: int, *, tokens: int, seconds: float, devices: int, peak: float | None
) -> dict[str, float]:
    """Metrics of an update that cost `flops` and took `tokens` tokens through `devices` devices:
    tokens/s and TFLOP/s of a device, and where its `peak` is known the share of it (verl's names;
    MFU is between 0 and 1)."""
    rate = flops / seconds / devices
    metrics = {
        "perf/actor/tokens_per_second_per_device": tokens / seconds / devices,
        "perf/actor/tflops_per_device": rate / 1e12,
    }
    return metrics if peak is None else metrics | {"perf/mfu/actor": rate / peak}
