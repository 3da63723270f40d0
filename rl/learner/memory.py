"""Estimates of an update's memory, and the number of tokens that a pass may therefore hold.

Estimates, from the shape of the model: activations of a dense decoder layer as plain transformers
keeps them for the backward pass, or a layer's input alone under gradient checkpointing, and the
fused loss's tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels import platform
from ...kernels.loss.fused_loss import CHUNK_BYTES
from .flops import ModelFlops

LARGEST = 16384
"""Most tokens of a pass on an accelerator; more do not fill it better."""
LARGEST_CPU = 2048
"""The same on a CPU: a layer's products are fastest while their operands stay in the caches."""
SMALLEST = 256
"""Least tokens of a pass, and the step of its size."""
PASS_BYTES = 600 << 20
"""Most bytes of activations of a pass on a CPU, far more than its caches: a larger pass takes
memory and gains nothing, whatever `optim.micro_batch_tokens` allows."""
SPARE = 0.8
"""Share of the free memory to plan with; allocators, collectives and the estimate's error have the
rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes of an update on one rank."""

    state: int
    """Master weights, their gradients and AdamW's two moments, this rank's shards; and the gathered
    weights and gradients in the dtype of the passes."""
    loss: int
    """The fused loss's tile, and the gradient of its weight."""
    token: int
    """Bytes for every padded token of a pass."""
    square: int = 0
    """Bytes for every pair of tokens of a sequence, where attention keeps its scores: of one layer
    with gradient checkpointing, else of all."""

    def of_pass(self, tokens: int, longest: int) -> int:
        """Bytes of a pass of `tokens` padded tokens, in sequences of at most `longest`."""
        return self.state + self.loss + tokens * (self.token + self.square * longest)


def need(
    model: ModelFlops,
    *,
    parameters: int,
    trained: int,
    world: int,
    dtype: torch.dtype,
    attention: str,
    checkpointing: bool = False,
    fused: bool = False,
    resident: bool = False,
    gathered: int | None = None,
) -> Need:
    """The memory that an update needs on one rank.

    parameters, trained: number of all parameters, and of those with a gradient. fused: layers keep
    only their products' inputs (`layers.py`). resident: the master weights are in memory already,
    so the free memory is without them. gathered: parameters that are whole at a time, if gradients
    are reduced after every pass; None: all.
    """
    size = dtype.itemsize
    master = max(4, size)
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    # the residual stream twice, attention's operands and answer, the gate's factors
    inner = 2 * model.hidden + heads + model.heads * model.head_dim + 2 * model.intermediate
    # norms, also in float32, the rotary embedding's parts, the gate's product and its factors
    if not fused:
        inner += (4 * 4 // size + 6) * model.hidden + 4 * heads + 2 * model.intermediate
    per_layer = inner * size
    token = (
        model.hidden * size * model.layers + per_layer
        if checkpointing
        else model.layers * per_layer
    )
    kept = 0
    if attention == "eager":  # scores, the float32 softmax, and its copy in the model's dtype
        kept = model.heads * (4 + 2 * size) * (1 if checkpointing else model.layers)
    shards = ((0 if resident else parameters) + 3 * trained) * master // world
    whole = parameters if gathered is None else gathered
    slopes = min(trained, whole) * (size + (master if size != master else 0))
    return Need(
        state=shards + whole * size + slopes,
        loss=CHUNK_BYTES + model.hidden * model.vocabulary * master,
        token=token + 4 * model.hidden * master,
        square=kept,
    )


def gathered_at_once(model: ModelFlops, parameters: int) -> int:
    """Parameters that a resharding pass holds whole: those of two layers, as the next one is
    prefetched, and those outside the layers."""
    layer = model.token // 2 // model.layers
    return min(parameters, parameters - (model.layers - 2) * layer)


def fits(needed: Need, free: int) -> bool:
    """Whether a pass of `SMALLEST` tokens fits into `free` bytes."""
    return needed.of_pass(SMALLEST, SMALLEST) <= int(free * SPARE)


def check_longest(needed: Need, room: int, longest: int) -> None:
    """Raises ValueError if a pass of one sequence of `longest` tokens takes more than `room`
    bytes."""
    if needed.of_pass(longest, longest) > room:
        gib = 2**30
        raise ValueError(
            f"an update needs about {needed.of_pass(longest, longest) / gib:.1f} GiB"
            f" ({needed.state / gib:.1f} of them weights, gradients and AdamW's moments) with one"
            f" sequence of {longest} tokens, but {room / gib:.1f} GiB of what is free on this"
            " learner's device may be planned with; set"
            " model.gradient_checkpointing: true, train adapters (model.lora), shorten"
            " rollout.max_response_length, or give more devices (cluster.learners)"
        )


def tokens_that_fit(needed: Need, free: int, *, longest: int, largest: int) -> int:
    """Tokens of a pass, at most `largest`, in whole multiples of `SMALLEST`; `longest` is the
    longest sequence's.

    Raises:
        ValueError: not even one sequence of the longest fits.
    """
    room = int(free * SPARE)
    check_longest(needed, room, longest)
    fitting = (room - needed.state - needed.loss) // (needed.token + needed.square * longest)
    return max(SMALLEST, min(largest, fitting) // SMALLEST * SMALLEST)


def worth_keeping(needed: Need, tokens: int, target: platform.Platform) -> int:
    """`tokens`, on a CPU reduced so that a pass keeps at most `PASS_BYTES`."""
    if not target.is_cpu:
        return tokens
    return min(tokens, max(SMALLEST, PASS_BYTES // needed.token // SMALLEST * SMALLEST))


def largest_pass(target: platform.Platform) -> int:
    return LARGEST_CPU if target.is_cpu else LARGEST


def free_memory(target: platform.Platform, device: torch.device | None = None) -> int:
    """Bytes that this process may still allocate on its device (None: the thread's current one);
    on a CPU the smaller of the machine's and the control group's free memory."""
    if not target.is_cpu:
        free, _ = torch.get_device_module(target.device).mem_get_info(device)
        return int(free)
    rows = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    return min(int(rows["MemAvailable"].split()[0]) * 1024, _control_group())


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left below the control group's limit, version 2 and 1; file pages that the kernel can
    drop count as free."""
    for limit, used, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        if not (root / limit).exists() or (text := (root / limit).read_text().strip()) == "max":
            continue
        rows = (
            line.split()
            for line in (root / limit).with_name("memory.stat").read_text().splitlines()
        )
        dropped = next((int(row[1]) for row in rows if row[0] == inactive), 0)
        return max(0, int(text) - int((root / used).read_text()) + dropped)
    return 1 << 62
