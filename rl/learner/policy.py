"""The policy as the learner runs it: a Hugging Face model up to its last hidden states, then the
fused head and loss.

Shape legend: B sequences of a micro-batch, L their padded length (packed: 1 row of L tokens), n
loss tokens of the micro-batch, T tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...kernels import platform
from ...kernels.loss.divergence import Teaching, linear_divergence, logits_divergence
from ...kernels.loss.fused_loss import linear_logprob, linear_loss, logits_logprob, logits_loss
from ...kernels.loss.terms import TokenLoss, TokenStats, TokenTerms
from ..algorithm.losses import DISTILL_TERM
from ..groups import Batch
from .logits import linear_head, own_logits
from .shared_prompts import SharedRows, sharing_sequences


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatchTensors:
    """One micro-batch on the device, padded or packed. Padded sequences stand at the left, so that
    the causal mask alone keeps padding out; packed ones stand one behind the other in a single row,
    and `layout` keeps them apart."""

    token_ids_BL: Tensor
    rows_n: Tensor
    """Index of each loss token's prediction in the flattened [B * L] hidden states: that of the
    position before the token."""
    targets_n: Tensor
    index_n: Tensor
    """Index of each loss token among the batch's T tokens."""
    sequence_ids_n: Tensor
    positions_BL: Tensor | None = None
    """Positions in a packed row, from 0 for every sequence; None: padded."""
    borders: Tensor | None = None
    """[sequences + 1] int32: each sequence's start in the packed row, and the row's length."""
    longest: int = 0
    """Tokens of the longest packed sequence."""
    ends: tuple[int, ...] | None = None
    """`borders` without the first as Python integers, if the device's attention reads them on the
    host: made once for all layers."""
    shared: SharedRows | None = None
    """The layout of a packed row that has each prompt once; `borders`, `longest` and `ends` are
    then those of the sequences with their prompts repeated, as attention sees them."""

    def layout(self) -> dict[str, Any]:
        """Arguments of the model's body besides the token ids. transformers makes a block-diagonal
        mask of the positions for eager, sdpa and flex attention; its variable-length kernels take
        the borders, which they would otherwise compute in every layer, each time waiting for the
        device."""
        if self.positions_BL is None:
            return {}
        ends = {} if self.ends is None else {"ends": self.ends}
        shared = {} if self.shared is None else {"shared": self.shared}
        return {
            **ends,
            **shared,
            "position_ids": self.positions_BL,
            "cu_seq_lens_q": self.borders,
            "cu_seq_lens_k": self.borders,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


HEIGHT, WIDTH, PACKED = 8, 8, 128
"""Padded sizes, and the length of a packed row, are multiples of these: libraries compile or look
up a kernel for every new shape, so few shapes pay. 128 is also flex attention's block."""


def pick_attention(target: platform.Platform, dtype: torch.dtype) -> str:
    """The `attn_implementation` for `model.attention=auto`: flash attention where it is there, else
    sdpa. On a CPU eager, which is faster at short lengths but takes its softmax in float32 whatever
    the model computes in; so not in float64."""
    if target.is_cpu:
        return "eager" if dtype != torch.float64 else "sdpa"
    from transformers.utils.import_utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    return (
        "flash_attention_2"
        if half and (target.flash_built_in or is_flash_attn_2_available())
        else "sdpa"
    )


def takes_packed(attention: str) -> bool:
    """Whether this `attn_implementation` of transformers passes over other sequences' tokens in a
    packed row, rather than multiplying them and masking the product, as eager and sdpa do: only
    then does packing save anything."""
    return any(family in attention for family in ("flash", "flex", "packed"))


def _round_up(size: int, multiple: int) -> int:
    return max(1, -(-size // multiple)) * multiple


def _packed_width(used: int, device: torch.device) -> int:
    """Tokens of a packed row that holds `used`: on accelerators a multiple of `PACKED`, on a CPU at
    most a thirty-second more."""
    if not platform.named(device.type).is_cpu:
        return _round_up(used, PACKED)
    # A CPU's products cost what their rows do, and filling is rows: of a pass of 900 tokens up to
    # an eighth. A width of its own for every pass would cost a new kernel for each product.
    return _round_up(used, max(8, 1 << max(0, used.bit_length() - 6)))


def to_tensors(
    batch: Batch,
    sequences: tuple[int, ...],
    device: torch.device,
    *,
    packed: bool = False,
    share_prompts: bool = False,
) -> MicroBatchTensors:
    """Pads these sequences of the batch, or packs them into one row whose end is filled up by a
    sequence of its own; an empty tuple gives filling and no loss, to keep step with other ranks.

    share_prompts: in a packed row a prompt that neighbours have in common stands once.
    """
    starts = np.concatenate(([0], np.cumsum(batch.sequence_lengths)))
    spans = [np.arange(starts[s], starts[s + 1]) for s in sequences] or [np.zeros(0, np.int64)]
    lengths = [len(span) for span in spans]
    if packed:
        runs = sharing_sequences(batch, sequences) if share_prompts and sequences else ()
        own = _own_tokens(lengths, [(len(run.sequences), run.prompt) for run in runs])
        rows, used = _packed_rows(lengths, own)
        height, width = 1, _packed_width(used, device)
    else:
        height, width = _round_up(len(spans), HEIGHT), _round_up(max(lengths), WIDTH)
        rows = [place * width + np.arange(n) for place, n in enumerate(lengths)]
    token_ids = np.zeros(height * width, np.int64)
    predicting, index = [], []
    for row, span in zip(rows, spans, strict=True):
        token_ids[row] = batch.token_ids_T[span]
        where = np.flatnonzero(batch.loss_mask_T[span])
        assert not len(where) or where[0] > 0, (
            "the first token of a sequence has nothing to be predicted from"
        )
        predicting.append(row[where - 1])
        index.append(span[where])
    index_n = np.concatenate(index)
    return MicroBatchTensors(
        token_ids_BL=torch.from_numpy(token_ids.reshape(height, width)).to(device),
        rows_n=torch.from_numpy(np.concatenate(predicting)).to(device),
        targets_n=torch.from_numpy(batch.token_ids_T[index_n].astype(np.int64)).to(device),
        index_n=torch.from_numpy(index_n).to(device),
        sequence_ids_n=torch.from_numpy(batch.sequence_ids_T[index_n]).to(device),
        **(_packed_layout([*rows, np.arange(used, width)], width, device) if packed else {}),
    )


def _own_tokens(lengths: list[int], runs: list[tuple[int, int]]) -> list[int]:
    """The number of row tokens that each sequence does not share with the one before it. runs:
    (number of sequences, length of their prompt)."""
    own = list(lengths)
    place = 0
    for count, prompt in runs:
        for i in range(place + 1, place + count):
            own[i] -= prompt
        place += count
    return own


def _packed_rows(lengths: list[int], own: list[int]) -> tuple[list[NDArray[np.int64]], int]:
    """The rows of each sequence's tokens, and the number of rows. A sequence with fewer `own`
    tokens than its length begins with the first rows of the sequence before it, their prompt."""
    rows: list[NDArray[np.int64]] = []
    used = 0
    for length, alone in zip(lengths, own, strict=True):
        new = np.arange(used, used + alone)
        rows.append(np.concatenate([rows[-1][: length - alone], new]) if alone < length else new)
        used += alone
    return rows, used


def _packed_layout(
    rows: list[NDArray[np.int64]], width: int, device: torch.device
) -> dict[str, Any]:
    """The packing fields of `MicroBatchTensors` for a row of `width` tokens. rows: those of every
    sequence, the filling included."""
    rows = [each for each in rows if len(each)]
    borders = np.cumsum([0, *map(len, rows)])
    positions = np.empty(width, np.int64)
    for each in rows:
        positions[each] = np.arange(len(each))
    on_host = platform.named(device.type).lengths_on_host
    return {
        "positions_BL": torch.from_numpy(positions[None]).to(device),
        "borders": torch.from_numpy(borders.astype(np.int32)).to("cpu" if on_host else device),
        "longest": max(map(len, rows)),
        "ends": tuple(map(int, borders[1:])) if on_host else None,
        "shared": SharedRows.of(rows, device) if borders[-1] > width else None,
    }


def hidden_states(body: Any, micro: MicroBatchTensors) -> Tensor:
    """The last hidden states [n, H] of `body`, a transformer without its head, at the positions
    that predict the loss tokens."""
    hidden_BLH = body(
        input_ids=micro.token_ids_BL, use_cache=False, **micro.layout()
    ).last_hidden_state
    rows: Tensor = hidden_BLH.flatten(0, 1)[micro.rows_n]
    return rows


class Policy(nn.Module):
    """Wraps a causal language model so that the whole of a pass, the head included, runs inside one
    `forward`: sharded parameters are gathered around that call and nowhere else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = linear_head(model)

    def forward(
        self,
        micro: MicroBatchTensors,
        loss: TokenLoss | None,
        shift_n: Tensor | None,
        temperature: float,
        teaching: Teaching | None = None,
    ) -> tuple[Tensor | None, TokenStats, dict[str, Tensor]]:
        """The summed loss with its graph (None without a loss), the tokens' statistics and the
        loss's per-token metrics; `teaching` adds a divergence from given distributions to it."""
        body = getattr(self.model, self.model.base_model_prefix)
        hidden_nH, targets_n = hidden_states(body, micro), micro.targets_n
        if self.head is None:
            logits_nV = own_logits(self.model, hidden_nH)
            result = self._by_logits(logits_nV, micro, loss, temperature)
            if teaching is None:
                return result
            return _plus(result, logits_divergence(logits_nV / temperature, teaching), teaching)
        head = self.model.get_output_embeddings()
        if loss is None:
            stats = linear_logprob(
                hidden_nH,
                head.weight,
                targets_n,
                bias=head.bias,
                temperature=temperature,
                logit_scale=self.head.scale,
                softcap=self.head.softcap,
                shift=shift_n,
            )
            return None, stats, {}
        result = linear_loss(
            hidden_nH,
            head.weight,
            targets_n,
            MicroBatchLoss(loss, micro.index_n),
            bias=head.bias,
            temperature=temperature,
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
            shift=shift_n,
            sequence_ids=micro.sequence_ids_n if loss.whole_sequences else None,
        )
        if teaching is None:
            return result
        more = linear_divergence(
            hidden_nH,
            head.weight,
            teaching,
            bias=head.bias,
            temperature=temperature,
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
        )
        return _plus(result, more, teaching)

    def _by_logits(
        self,
        logits_nV: Tensor,
        micro: MicroBatchTensors,
        loss: TokenLoss | None,
        temperature: float,
    ) -> tuple[Tensor | None, TokenStats, dict[str, Tensor]]:
        if loss is None:
            return None, logits_logprob(logits_nV, micro.targets_n, temperature=temperature), {}
        return logits_loss(
            logits_nV, micro.targets_n, MicroBatchLoss(loss, micro.index_n), temperature=temperature
        )


def _plus(
    result: tuple[Tensor | None, TokenStats, dict[str, Tensor]],
    more: tuple[Tensor, Tensor],
    teaching: Teaching,
) -> tuple[Tensor | None, TokenStats, dict[str, Tensor]]:
    """A loss plus a weighted divergence, given as its total and its values [n]."""
    loss, stats, metrics = result
    assert loss is not None
    total, values_n = more
    shown = {DISTILL_TERM: values_n * teaching.weights}
    return loss + teaching.coef * total.to(loss.dtype), stats, metrics | shown


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchLoss:
    """A batch's loss as a micro-batch sees it: the kernels count the rows they were given, the loss
    the batch's tokens."""

    loss: TokenLoss
    index_n: Tensor

    @property
    def whole_sequences(self) -> bool:
        return self.loss.whole_sequences

    @property
    def needs_entropy(self) -> bool:
        return self.loss.needs_entropy

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        return self.loss(stats, self.index_n[index])
