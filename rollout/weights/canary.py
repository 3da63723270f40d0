"""The noun `Canary`: weights that differ from those that are served in every tensor, and what
engines decoded with them.

A canary is made of the served weights in place, on each side by itself, and taken back the same
way, bit for bit: rows and columns of every tensor get signs drawn from a seed, and the whole of it
is multiplied by a power of two. A rank-one pattern of signs goes through the product of LoRA's
adapters as well as through the sum. The powers give every tensor the scale of a freshly initialised
network, for two reasons. With the signs alone a trained model amplifies rounding until nothing can
be told (135M, bfloat16: 0.8 nats); and in a network whose layers all count alike one tensor that
was left behind shows in the log-probs of every token.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..samples import Completion
from .patch import TensorBytes
from .tensors import as_tensor

GAINS = {
    "embed": 2.0,
    "lm_head": 2.0,
    "q_proj": 1.4,
    "k_proj": 1.4,
    "o_proj": 4.0,
    "down_proj": 2.0,
}
"""Root mean square of a product's elements for an input of 1, where it is not 1. Of embedding and
head it is the logits': more would drown all but the likeliest tokens in rounding. Attention
averages over tokens, which its output's gain makes up for."""
MOST_IN_PLACE = 1 << 27
"""Elements: some seconds of a core."""
ZERO_BECOMES = 0.5
"""The size of the elements that a tensor of zeros gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """How each tensor is changed."""

    seed: int
    powers: Mapping[str, int]
    """name -> k; the tensor is multiplied by 2^k."""
    zeros: frozenset[str] = frozenset()
    """Names of tensors that are zero everywhere."""
    without: str | None = None
    """A tensor that is left as it is: what an engine that left it behind would compute."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeProof:
    """What one engine decoded, all for the same requests, with the weights that it serves, with the
    canary, and with the first again."""

    before: tuple[Completion, ...]
    canary: tuple[Completion, ...]
    read: tuple[NDArray[np.float32], ...]
    """[n] log-probs that the engine gives the canary's completions when it reads them as
    prompts."""
    after: tuple[Completion, ...]
    seconds: float
    """In which it served nothing else."""


def canary_of(seed: int, squares: Mapping[str, tuple[tuple[int, ...], float]]) -> Canary:
    """squares: name -> (shape of the whole tensor, sum of the squares of its elements). ValueError
    with the name of a tensor that has elements which are no numbers."""
    powers, zeros = {}, []
    for name, (shape, total) in squares.items():
        if not math.isfinite(total):
            raise ValueError(
                f"{name} has elements that are NaN or infinite, and so no log-prob is a number;"
                " begin from weights without them, e.g. an earlier checkpoint"
            )
        if not total:
            zeros.append(name)
            continue
        rms = math.sqrt(total / math.prod(shape))
        powers[name] = round(math.log2(_scale(name, shape) / rms))
    return Canary(seed=seed, powers=powers, zeros=frozenset(zeros))


def squares_of(tensors: Mapping[str, TensorBytes]) -> dict[str, tuple[tuple[int, ...], float]]:
    """As `canary_of` takes them."""
    found = {}
    for name in tensors:
        tensor = tensors[name]
        found[name] = (tuple(tensor.shape), float(as_tensor(tensor).double().square().sum()))
    return found


def _scale(name: str, shape: Sequence[int]) -> float:
    """Root mean square of a tensor's elements in the canary."""
    if len(shape) < 2:
        return 1.0
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return gain / math.sqrt(shape[-1])


def alter(
    tensor: Tensor,
    name: str,
    canary: Canary,
    *,
    back: bool = False,
    rows: tuple[int, int] | None = None,
    axis: Literal["both", "rows", "columns"] = "both",
) -> None:
    """Makes the canary's tensor of the served one in place, or, `back`, the other way round.

    rows: (first row here, rows of the whole), where `tensor` is a shard. axis: of a factor of a
    product only the rows' signs, or the columns' and the scale.
    """
    if name == canary.without:
        return
    zero = name in canary.zeros
    if zero and not back:  # a zero keeps its sign, by which it is known bit for bit
        tensor.copy_(torch.full_like(tensor, ZERO_BECOMES).copysign_(tensor))
    if axis != "columns":
        first, count = rows or (0, tensor.shape[0] if tensor.dim() else 1)
        signs = _signs(canary.seed, name, 0, count)[first : first + max(1, len(tensor))]
        tensor.mul_(signs.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))
    if axis != "rows":
        if tensor.dim() > 1:
            tensor.mul_(_signs(canary.seed, name, 1, tensor.shape[-1]).to(tensor))
        if not zero:
            tensor.mul_(2.0 ** (-canary.powers[name] if back else canary.powers[name]))
    if zero and back:
        tensor.mul_(0.0)


def altered(name: str, tensor: TensorBytes, canary: Canary, *, back: bool = False) -> TensorBytes:
    """The same of a tensor's bytes, which stay as they are."""
    made = as_tensor(tensor).clone()
    alter(made, name, canary, back=back)
    data = made.contiguous().view(-1).view(torch.uint8).numpy()
    return TensorBytes(dtype=tensor.dtype, shape=tensor.shape, data=data)


def written_in_place(sizes: Mapping[str, int], canary: Canary) -> list[str]:
    """Of tensors (name -> elements) that an engine could write in place, those that it does write
    so when this canary is loaded: the others come whole, so that both ways are proved. It writes
    every element, which is slow: of a large model other tensors each time."""
    names, chosen, left = sorted(sizes), [], MOST_IN_PLACE
    for number in np.random.default_rng([canary.seed, 2]).permutation(len(names)):
        if sizes[names[number]] <= left:
            chosen.append(names[number])
            left -= sizes[names[number]]
    return chosen


def _signs(seed: int, name: str, axis: int, count: int) -> Tensor:
    """[count] of 1.0 and -1.0, each half of the draws."""
    rng = np.random.default_rng([seed, axis, zlib.crc32(name.encode())])
    return torch.from_numpy(2 * rng.integers(0, 2, count, dtype=np.int8) - 1)
