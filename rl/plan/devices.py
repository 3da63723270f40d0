"""Data sheets for `emberl plan`: accelerators and models, and how fast the one decodes and trains
the other.

A roofline: a decode step reads the weights once and every running answer's keys and values, or
multiplies as fast as the device can, whichever takes longer. It knows no kernel; `--from-run`
replaces it with what a run measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from ..config.base import Settings
from ..config.mistakes import explain
from ..learner.flops import PEAKS

Floats = NDArray[np.float64]

BYTES = 2  # of a weight, key or value in bfloat16
# Assumptions
READ = 0.6  # share of a memory's bandwidth in decoding
HASH = 10e9  # bytes per second of xxh3-128 on one core
LINE = 64  # bytes that a device's memory moves for one element of two


class CommitRates(Settings):
    """The parts of an engine's standstill for new weights. `emberl bench device` measures them,
    under "commit" of its JSON."""

    copy_bytes_per_s: float = Field(gt=0)  # from the host's memory into the device's
    hash_bytes_per_s: float = Field(gt=0)  # xxh3-128 on one core of the host
    scatter_elements_per_s: float = Field(gt=0)  # compared and written in the device's memory


def read_rates(path: Path) -> CommitRates:
    """The rates that `emberl bench device --json` measured; ValueError with what is missing."""
    try:
        return CommitRates.model_validate(json.loads(path.read_text())["commit"])
    except ValidationError as error:
        what = f"is wrong under 'commit': {explain(error, CommitRates)}"
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"cannot be read: {error!r}"
    raise ValueError(f"link.rates={path} {what}; emberl bench device --json makes it")


class Device(CommitRates):
    """One accelerator as the scheduler counts it (a 910C is two)."""

    flops: float  # bfloat16, dense, per second
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes
    per_node: int
    mfu: float  # share of `flops` in training
    step_overhead: float  # seconds of a decode step for launches and all-reduces of layers
    sources: dict[str, str]  # figure -> where it is from; what is not here is an assumption


def _sheet(**figures: tuple[float, str]) -> Device:
    """A device by its figures, each with where it is from; empty for an assumption."""
    values: dict[str, Any] = {name: value for name, (value, _) in figures.items()}
    return Device(
        hash_bytes_per_s=HASH,
        # each element is in a line of its own, compared and written
        scatter_elements_per_s=values["bandwidth"] * READ / LINE / 2,
        sources={name: text for name, (_, text) in figures.items() if text},
        **values,
    )


DEVICES = {
    "910B": _sheet(
        flops=(
            PEAKS["Ascend910B2"],
            "376 TFLOPS, as the 910C's die (arXiv 2506.12708); public figures range 256-376",
        ),
        bandwidth=(1.6e12, "1.6 TB/s, inferred from the 910C's die (arXiv 2506.12708)"),
        memory=(64e9, "64 GB, SGLang documentation"),
        per_node=(8, "8 cards in an HCCS full mesh"),
        mfu=(0.30, "30 %, Pangu Ultra MoE on 6,000 910B (arXiv 2505.04519)"),
        step_overhead=(5e-3, ""),
        copy_bytes_per_s=(25e9, ""),
    ),
    "910C": _sheet(
        flops=(PEAKS["Ascend910_9382"], "376 TFLOPS per die, a device (arXiv 2506.12708)"),
        bandwidth=(1.6e12, "1.6 TB/s per die (arXiv 2506.12708)"),
        memory=(64e9, "64 GB per die (arXiv 2506.12708)"),
        per_node=(16, "16 devices of an A3 node (arXiv 2506.12708)"),
        mfu=(0.30, "30 %, measured on 910B (arXiv 2505.04519)"),
        step_overhead=(5e-3, ""),
        copy_bytes_per_s=(25e9, ""),
    ),
    "H200": _sheet(
        flops=(PEAKS["NVIDIA H200"], "989.5 TFLOPS dense, NVIDIA data sheet (1,979 with sparsity)"),
        bandwidth=(4.8e12, "4.8 TB/s, NVIDIA data sheet"),
        memory=(141e9, "141 GB, NVIDIA data sheet"),
        per_node=(8, "8, HGX H200"),
        mfu=(0.40, ""),
        step_overhead=(3e-3, ""),
        copy_bytes_per_s=(50e9, ""),
    ),
}


class ModelShape(NamedTuple):
    """The sizes that decide a model's speed, from the config.json of the model it is named
    after."""

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
        """Of one token of a sequence of `context` tokens: forward, backward, and recomputation."""
        # scores and sums, half of them masked
        attention = 2 * self.layers * self.heads * self.head_dim * context
        return 4 * (2 * self.parameters + attention)


MODELS = {
    "0.6m": ModelShape("quickstart", 0.6e6, layers=3, heads=2, kv_heads=1, head_dim=64),
    "7b": ModelShape("Qwen2.5-7B", 7.6e9, layers=28, heads=28, kv_heads=4, head_dim=128),
    "32b": ModelShape("Qwen2.5-32B", 32.8e9, layers=64, heads=40, kv_heads=8, head_dim=128),
    "72b": ModelShape("Qwen2.5-72B", 72.7e9, layers=80, heads=64, kv_heads=8, head_dim=128),
}


class DecodeTable(NamedTuple):
    """The speed of one worker: seconds of a step, in which each running answer gets a token.
    Bilinear between its points and constant beyond them."""

    running: Floats  # [R] answers in the batch, ascending
    context: Floats  # [C] mean tokens that each of them reads, prompt and answer so far, ascending
    seconds: Floats  # [R, C]
    prefill: float = 0.0  # seconds of a prompt's token; decoding stands still meanwhile

    def rows(self, slots: int) -> list[list[float]]:
        """[slots + 1][C]: the step times of each batch."""
        columns = [np.interp(range(slots + 1), self.running, column) for column in self.seconds.T]
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def decode_table(
    device: Device, model: ModelShape, cards: int, *, slots: int, longest: int
) -> DecodeTable:
    """Step times of one engine on `cards` devices, up to `slots` answers of `longest` tokens."""
    running = np.unique(np.rint(np.geomspace(1, slots, 12)))
    context = np.linspace(0, longest, 9)
    n, c = running[:, None], context[None, :]
    read = (model.weight_bytes + n * c * model.kv_bytes) / (cards * device.bandwidth * READ)
    prefill = 2 * model.parameters / (cards * device.flops * device.mfu)
    seconds = device.step_overhead + np.maximum(read, n * prefill)
    return DecodeTable(running=running, context=context, seconds=seconds, prefill=prefill)


def most_slots(device: Device, model: ModelShape, cards: int, context: float) -> int:
    """Answers whose keys and values fit beside the weights, at this mean context; a tenth of the
    memory stays free."""
    left = 0.9 * cards * device.memory - model.weight_bytes
    return max(0, int(left / (model.kv_bytes * max(context, 1.0))))
