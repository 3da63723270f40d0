"""The noun `Canary`: weights that differ from the served ones in every tensor, with which engines
decode as a proof that they use what they load.

A canary is made of the served weights in place, on each side by itself, and taken back the same
way, bit for bit: rows and columns of every tensor get signs drawn from a seed, and the whole of it
is multiplied by a power of two. A rank-one pattern of signs goes through the product of LoRA's
adapters as well as through the sum. The powers give every tensor the scale of a freshly initialised
network, for two reasons. With the signs alone a trained model amplifies rounding until it hides any
fault (135M, bfloat16: 0.8 nats); and in a network whose layers all count alike a single stale
tensor shows in the log-probs of every token.
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
"""Part of a name -> root mean square of a product's elements for an input of 1; 1 for all others.
Of embedding and head it is the logits': with more, rounding would hide all but the likeliest
tokens. Attention averages over tokens, for which its output's gain makes up."""
MOST_IN_PLACE = 1 << 27
"""Most elements that are written in place: some seconds of a core."""
ZERO_BECOMES = 0.5
"""The magnitude that the elements of a tensor of zeros get."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """The change of every tensor: signs from a seed, and a power of two."""

    seed: int
    powers: Mapping[str, int]
    """name -> k; the tensor is multiplied by 2^k."""
    zeros: frozenset[str] = frozenset()
    """Names of tensors that are zero everywhere."""
    without: str | None = None
    """A tensor that is left unchanged, to compute the log-probs of an engine in which it is
    stale."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeProof:
    """One engine's completions of the same requests with the served weights, with the canary, and
    with the served weights again."""

    before: tuple[Completion, ...]
    canary: tuple[Completion, ...]
    read: tuple[NDArray[np.float32], ...]
    """[n] log-probs that the engine gives the canary's completions when it reads them as
    prompts."""
    after: tuple[Completion, ...]
    seconds: float
    """Seconds for which it served nothing else."""


def canary_of(seed: int, squares: Mapping[str, tuple[tuple[int, ...], float]]) -> Canary:
    """The canary of a model. squares: name -> (shape of the whole tensor, sum of the squares of its
    elements). Raises ValueError with the name of a tensor whose elements are not all finite."""
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
    """name -> (shape, sum of squares) of every tensor, for `canary_of`."""
    squares = {}
    for name in tensors:
        tensor = tensors[name]
        squares[name] = (tuple(tensor.shape), float(as_tensor(tensor).double().square().sum()))
    return squares


def _scale(name: str, shape: Sequence[int]) -> float:
    """The root mean square that a tensor's elements are to have in the canary."""
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
    """Turns a served tensor into the canary's in place or, `back`, the other way round.

    rows: (first row here, rows of the whole), if `tensor` is a shard. axis: for a factor of a
    product (LoRA), `rows` applies the rows' signs only, `columns` the columns' signs and the scale.
    """
    if name == canary.without:
        return
    zero = name in canary.zeros
    if zero and not back:  # with the zeros' signs, so that it can be taken back bit for bit
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
    """As `alter`, as a new tensor; the old bytes are not touched."""
    made = as_tensor(tensor).clone()
    alter(made, name, canary, back=back)
    data = made.contiguous().view(-1).view(torch.uint8).numpy()
    return TensorBytes(dtype=tensor.dtype, shape=tensor.shape, data=data)


def written_in_place(sizes: Mapping[str, int], canary: Canary) -> list[str]:
    """The tensors that an engine writes in place when this canary is loaded, out of those (name ->
    elements) that it could. The others are loaded whole, so that both ways are proved. Writing all
    elements of a tensor is slow, so there are at most `MOST_IN_PLACE`, other ones for each seed."""
    names, chosen, left = sorted(sizes), [], MOST_IN_PLACE
    for number in np.random.default_rng([canary.seed, 2]).permutation(len(names)):
        if sizes[names[number]] <= left:
            chosen.append(names[number])
            left -= sizes[names[number]]
    return chosen


def _signs(seed: int, name: str, axis: int, count: int) -> Tensor:
    """[count] int8, 1 or -1 with equal probability, a function of seed, name and axis."""
    # crc32, as `hash` of a text differs between processes, and each makes the canary by itself
    rng = np.random.default_rng([seed, axis, zlib.crc32(name.encode())])
    return torch.from_numpy(2 * rng.integers(0, 2, count, dtype=np.int8) - 1)
