"""Data sheets for `emberl plan`: accelerators and models, and how fast the one decodes and trains the other.

A roofline: a decode step reads the weights once and every running answer's keys and values, or multiplies as fast as the
device can, whichever takes longer. It knows no kernel; `emberl plan --from-run` replaces it with what a run measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .scenario import DecodeTable

BYTES = 2
"""Of a weight, key or value in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator as the scheduler counts it (a 910C is two)."""

    name: str
    flops: float
    """bfloat16, dense, per second."""
    bandwidth: float
    """Bytes per second of its memory."""
    memory: float
    """Bytes."""
    per_node: int
    mfu: float
    """Share of `flops` in training."""
    read_efficiency: float
    """Share of `bandwidth` in decoding."""
    step_overhead: float
    """Seconds of a decode step that neither reading nor multiplying explains: launches, all-reduces of the layers."""
    sources: Mapping[str, str]
    """Figure -> where it is from."""


ASSUMED = "assumption"

DEVICES = {
    "910B": Device(
        name="910B",
        flops=376e12,  # inferred from the 910C's die (CloudMatrix384, arXiv 2506.12708); public figures: 256 to 376
        bandwidth=1.6e12,  # likewise inferred from the 910C's die
        memory=64e9,  # SGLang's Ascend documentation
        per_node=8,  # 8-card full mesh over HCCS
        mfu=0.30,  # Pangu Ultra MoE on 6,000 910B: 30.0 % (arXiv 2505.04519)
        read_efficiency=0.6,
        step_overhead=5e-3,
        sources={
            "flops": "376 TFLOPS, inferred from the 910C's die (arXiv 2506.12708); public figures range 256-376",
            "bandwidth": "1.6 TB/s, inferred from the 910C's die (arXiv 2506.12708)",
            "memory": "64 GB, SGLang documentation",
            "per_node": "8 cards in an HCCS full mesh",
            "mfu": "30 %, Pangu Ultra MoE on 6,000 910B (arXiv 2505.04519)",
            "read_efficiency": ASSUMED,
            "step_overhead": ASSUMED,
        },
    ),
    "910C": Device(
        name="910C",
        flops=376e12,  # one die of two: 752 TFLOPS per package (CloudMatrix384, arXiv 2506.12708)
        bandwidth=1.6e12,  # 3.2 TB/s per package (same)
        memory=64e9,  # 128 GB per package (same)
        per_node=16,  # devices of an A3 node (same)
        mfu=0.30,  # the 910B's, for want of another: arXiv 2505.04519
        read_efficiency=0.6,
        step_overhead=5e-3,
        sources={
            "flops": "376 TFLOPS per die, a device (arXiv 2506.12708)",
            "bandwidth": "1.6 TB/s per die (arXiv 2506.12708)",
            "memory": "64 GB per die (arXiv 2506.12708)",
            "per_node": "16 devices (arXiv 2506.12708)",
            "mfu": "30 %, measured on 910B (arXiv 2505.04519)",
            "read_efficiency": ASSUMED,
            "step_overhead": ASSUMED,
        },
    ),
    "H200": Device(
        name="H200",
        flops=989e12,  # NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity
        bandwidth=4.8e12,  # NVIDIA H200 data sheet
        memory=141e9,  # NVIDIA H200 data sheet
        per_node=8,  # HGX H200
        mfu=0.40,
        read_efficiency=0.6,
        step_overhead=3e-3,
        sources={
            "flops": "989 TFLOPS dense, NVIDIA data sheet (1,979 with sparsity)",
            "bandwidth": "4.8 TB/s, NVIDIA data sheet",
            "memory": "141 GB, NVIDIA data sheet",
            "per_node": "8, HGX H200",
            "mfu": ASSUMED,
            "read_efficiency": ASSUMED,
            "step_overhead": ASSUMED,
        },
    ),
}


def this_cpu() -> Device:
    """One core of this machine, timed for a third of a second with numpy."""
    size = 512
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    flops = _rate(lambda: a @ a, 2 * size**3)
    source, target = np.zeros(1 << 25, np.uint8), np.ones(1 << 25, np.uint8)  # 32 MiB: more than a core's cache
    bandwidth = _rate(lambda: np.copyto(target, source), 2 * source.size)
    return Device(
        name="CPU", flops=flops, bandwidth=bandwidth, memory=4e9, per_node=1, mfu=0.3, read_efficiency=0.3,
        step_overhead=3e-3,
        sources={
            "flops": f"{flops / 1e12:.2f} TFLOPS, float32, timed here with numpy's matrix product",
            "bandwidth": f"{bandwidth / 1e9:.0f} GB/s, timed here with a copy of 32 MiB",
            "memory": ASSUMED, "per_node": ASSUMED, "mfu": ASSUMED, "read_efficiency": ASSUMED,
            "step_overhead": ASSUMED,
        },
    )  # fmt: skip


def device(name: str) -> Device:
    """A preset by its name, whatever its case."""
    if name.upper() == "CPU":
        return this_cpu()
    if name.upper() not in DEVICES:
        raise ValueError(f"device={name!r} is none of {', '.join(DEVICES)}, CPU")
    return DEVICES[name.upper()]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What of a model decides its speed. From the config.json of the model it is named after."""

    source: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def weight_bytes(self) -> float:
        return BYTES * self.parameters

    @property
    def kv_bytes(self) -> float:
        """Of one token."""
        return 2 * BYTES * self.layers * self.kv_heads * self.head_dim

    def train_flops(self, context: float) -> float:
        """Of one token of a sequence of `context` tokens, forward, backward and the forward pass again (recomputation)."""
        attention = 2 * self.layers * self.heads * self.head_dim * context  # scores and sums, half of them masked
        return 4 * (2 * self.parameters + attention)


MODELS = {
    "0.6m": ModelShape(source="quickstart", parameters=0.6e6, layers=3, heads=2, kv_heads=1, head_dim=64),
    "7b": ModelShape(source="Qwen2.5-7B", parameters=7.6e9, layers=28, heads=28, kv_heads=4, head_dim=128),
    "32b": ModelShape(source="Qwen2.5-32B", parameters=32.8e9, layers=64, heads=40, kv_heads=8, head_dim=128),
    "72b": ModelShape(source="Qwen2.5-72B", parameters=72.7e9, layers=80, heads=64, kv_heads=8, head_dim=128),
}


def decode_table(device: Device, model: ModelShape, cards: int, *, slots: int, longest: int) -> DecodeTable:
    """Step times of one engine on `cards` devices, up to `slots` answers of `longest` tokens."""
    running = np.unique(np.rint(np.geomspace(1, slots, 12)))
    context = np.linspace(0, longest, 9)
    n, c = running[:, None], context[None, :]
    read = (model.weight_bytes + n * c * model.kv_bytes) / (cards * device.bandwidth * device.read_efficiency)
    multiply = n * 2 * model.parameters / (cards * device.flops * device.mfu)
    prefill = 2 * model.parameters / (cards * device.flops * device.mfu)
    return DecodeTable(
        running=running, context=context, seconds=device.step_overhead + np.maximum(read, multiply), prefill=prefill
    )


def most_slots(device: Device, model: ModelShape, cards: int, context: float) -> int:
    """Answers whose keys and values fit beside the weights, at this mean context; a tenth of the memory stays free."""
    left = 0.9 * cards * device.memory - model.weight_bytes
    return max(0, int(left / (model.kv_bytes * max(context, 1.0))))


def _rate(work: object, amount: float) -> float:
    """Of the fastest of the repetitions that fit into 0.15 s."""
    assert callable(work)
    best, deadline = float("inf"), time.perf_counter() + 0.15
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return amount / best
