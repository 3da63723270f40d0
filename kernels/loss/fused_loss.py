"""Log-probs and losses of an output layer without its logits in memory: the public functions.

`linear_loss` takes three matrix products where the usual four (forward, recomputed forward, two
gradients) are the time of a step with a large vocabulary; `linear_logprob` takes one without
gradients. Which implementation runs follows from device, dtype and size (`choose`), and the reason
for anything unusual is logged once.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..platform import CPU, CUDA
from . import chunked, reference
from .chunked import log_once
from .head import Call, accumulator, check, prepare, product_dtype, refuse_not_finite
from .passes import Passes, TorchPasses
from .shifted_exp import Job
from .terms import TokenLoss, TokenStats

CHUNK_BYTES = 384 << 20
"""Bytes of the largest temporary on a CPU: all memory besides the weight's gradient then stays
below 512 MiB."""
SMALL_VOCABULARY = 128
"""Entries up to which plain logits are quicker than chunks, and small beside the hidden states."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: Tensor | None = None,
    entropy: bool = False,
) -> TokenStats:
    """Log-probs of `targets` under softmax(head(hidden) / T), differentiable by hidden, weight and
    bias.

    One matrix product without gradients, four over forward and backward with them.

    Args:
        hidden: [N, H], float64, float32, bfloat16 or float16; never longer than one row per token.
        weight: [V, H] in hidden's dtype.
        targets: [N] int64 ids below V.
        bias: [V].
        temperature: T > 0, a number or [N].
        logit_scale, softcap: z = softcap * tanh(logit_scale * x / softcap) / T for raw logits x.
        shift: [N] an estimate of the log-probs (the behaviour log-probs). It decides how finely a
            bfloat16 product is rounded, not the result; NaN and None are allowed.
        entropy: also give the entropy, which costs no product and is differentiable.

    Raises:
        ValueError: a shape, dtype or target that does not fit, or logits that are not finite, by
            the argument's name.
    """
    call = prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
    )
    size = chunk_bytes(call)
    backend = choose(call, size)
    if backend == "reference":
        return _by_reference(call, entropy)
    job = _job(call, entropy, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked.logprob(job, call.index, shift=shift, chunk_bytes=size)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """The total of `loss` over the tokens, its gradients formed in the forward pass: three matrix
    products, two with a frozen head, one without gradients.

    Args, where they are not those of `linear_logprob`:
        loss: gives each token's loss and its derivative by the log-prob and the entropy. Called
            once per chunk, with no graph. Everything it needs (masks, advantages, denominators) is
            its own; `index` says which tokens.
        sequence_ids: [N], equal for the neighbouring tokens of a sequence; needed where
            `loss.whole_sequences`.

    Returns:
        The loss (a scalar; backward works once or, with retain_graph, more often), the statistics
        [N] and the loss's metrics, each [N]; `actor/head_recomputed` among them is 1 where the
        shift was unusable.
    """
    call = prepare(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
    )
    _check_sequences(sequence_ids, loss, hidden)
    size = chunk_bytes(call)
    backend = choose(call, size)
    if backend == "reference":
        return _total(_by_reference(call, loss.needs_entropy), loss)
    job = _job(call, loss.needs_entropy, backend)
    needs = (_trains(hidden), _trains(weight), _trains(bias))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        formed = chunked.formed_loss(
            job,
            call.index,
            loss,
            needs=needs,
            sequence_ids=sequence_ids,
            shift=shift,
            chunk_bytes=size,
        )
    value = chunked.Formed.apply(  # type: ignore[no-untyped-call]
        call.hidden, call.head.weight, call.head.bias, formed
    )
    return value, formed.stats, formed.metrics


def _check_sequences(sequence_ids: Tensor | None, loss: TokenLoss, hidden: Tensor) -> None:
    check("sequence_ids", sequence_ids, (len(hidden),), None, hidden.device)
    if loss.whole_sequences and sequence_ids is None:
        raise ValueError(
            "sequence_ids is None, but the loss couples the tokens of a sequence; give one id per"
            " token"
        )


def _by_reference(call: Call, entropy: bool) -> TokenStats:
    stats = reference.logprob(call.hidden, call.targets, call.head, entropy=entropy)
    refuse_not_finite(call, stats.logp)
    return stats


def _trains(tensor: Tensor | None) -> bool:
    """Whether a gradient of it is wanted."""
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def logits_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> TokenStats:
    """Statistics of finished logits [N, V] at `targets` [N], differentiable: for a model whose head
    is not a plain linear layer. All logits stay in memory, which is warned of once."""
    _warn_of_logits()
    check("targets", targets, (len(logits),), torch.int64, logits.device)
    scale = (
        temperature[:, None]
        if isinstance(temperature, Tensor) and temperature.ndim
        else temperature
    )
    return reference.from_logits(
        logits.to(accumulator(logits.dtype)) / scale, targets, entropy=entropy
    )


def logits_loss(
    logits: Tensor, targets: Tensor, loss: TokenLoss, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """`linear_loss` for finished logits [N, V]: the same results, by autograd, with all logits in
    memory."""
    stats = logits_logprob(logits, targets, temperature=temperature, entropy=loss.needs_entropy)
    return _total(stats, loss)


def _warn_of_logits() -> None:
    log_once(
        "fused loss: this model's head is not a plain linear layer, so that all its logits are held"
        " in memory and the loss takes autograd's four passes; give linear_loss the hidden states"
        " where you can"
    )


def _total(stats: TokenStats, loss: TokenLoss) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """The scalar loss of differentiable stats [N], and stats and metrics without their graph."""
    count = len(stats.logp)
    if count == 0:  # a loss never sees an empty chunk; the sum of nothing keeps the graph connected
        value = stats.logp.sum()
        metrics: dict[str, Tensor] = {}
    else:
        index = torch.arange(count, device=stats.logp.device)
        value, terms = reference.loss_of(stats, loss, index)
        metrics = {name: values.detach() for name, values in terms.metrics.items()}
    metrics["actor/head_recomputed"] = torch.zeros_like(stats.logp, requires_grad=False)
    entropy = None if stats.entropy is None else stats.entropy.detach()
    held = TokenStats(logp=stats.logp.detach(), one_minus_p=stats.one_minus_p, entropy=entropy)
    return value, held, metrics


def chunk_bytes(call: Call) -> int:
    """Size of the largest temporary, a [V, n] tile of n tokens: 384 MiB; on an accelerator as much
    as a float32 gradient of the weight, if that is more: up to 2 H tokens then need no second
    chunk, and more add to the gradient less often."""
    if call.hidden.device.type == CPU.device:
        return CHUNK_BYTES
    return max(CHUNK_BYTES, 4 * call.head.weight.numel())


def _job(call: Call, entropy: bool, backend: str) -> Job:
    if backend == "triton":
        from .triton_exp import TritonPasses  # stock Triton and triton-ascend are both optional

        passes: Passes = TritonPasses()
    else:
        passes = TorchPasses()
    tile = product_dtype(call.hidden.dtype, call.hidden.device)
    return Job(
        hidden=call.hidden,
        targets=call.targets,
        head=call.head,
        passes=passes,
        entropy=entropy,
        tile=tile,
    )


def choose(call: Call, chunk_bytes: int) -> str:
    """The implementation for these operands: `reference` for float64, float16 (whose gradients need
    loss scaling before they are rounded) and small vocabularies; `triton` on an accelerator that
    has stock Triton; `chunked` everywhere else, NPUs included until a benchmark there shows a win.
    """
    dtype = call.hidden.dtype
    if dtype in (torch.float64, torch.float16):
        log_once(f"fused loss: {dtype} goes to the reference, which holds all logits")
        return "reference"
    vocabulary = len(call.head.weight)
    logit_bytes = len(call.hidden) * vocabulary * accumulator(dtype).itemsize
    if vocabulary <= SMALL_VOCABULARY and logit_bytes <= chunk_bytes:
        return "reference"
    if call.hidden.device.type == CUDA.device and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "chunked"
