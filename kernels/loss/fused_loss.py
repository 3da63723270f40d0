"""Log-probs and losses of an output layer without its logits in memory: the public functions.

`linear_loss` takes three matrix products where the usual four (forward, recomputed forward, two gradients) are the
time of a step with a large vocabulary; `linear_logprob` takes one without gradients. Which implementation runs follows
from device, dtype and size (`choose`), and the reason for anything unusual is logged once.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..platform import CPU, CUDA
from . import chunked, reference
from .arguments import Call, check, prepare, refuse_not_finite
from .chunked import log_once
from .head import Head, accumulator, product_dtype
from .passes import Passes, TorchPasses
from .shifted_exp import Job
from .terms import TokenLoss, TokenStats

BACKENDS = ("auto", "reference", "chunked", "triton")
CHUNK_BYTES = 384 << 20
"""So that on a CPU everything beside the weight's gradient stays below 512 MiB."""
SMALL_VOCABULARY = 128
"""Up to here plain logits are quicker than chunks, and small beside the hidden states."""


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
    active: Tensor | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-probs of `targets` under softmax(head(hidden) / T), differentiable by hidden, weight and bias.

    One matrix product without gradients, four over forward and backward with them.

    Args:
        hidden: [N, H], float64, float32, bfloat16 or float16; never longer than one row per token.
        weight: [V, H] in hidden's dtype; with `group`, this rank's slice of the vocabulary.
        targets: [N] int64 ids below V (times the group's size); may hold anything where `active` is false.
        bias: [V].
        temperature: T > 0, a number or [N].
        logit_scale, softcap: z = softcap * tanh(logit_scale * x / softcap) / T for raw logits x.
        shift: [N] an estimate of the log-probs (the behaviour log-probs). It decides how finely a bfloat16 product is
            rounded, not the result; NaN and None are allowed.
        entropy: also give the entropy, which costs no product and is differentiable.
        active: [N] bool; other tokens are left out of the products, their statistics are 0, their gradient is 0.
        chunk_bytes: size of the largest temporary, a [V, n] tile of n tokens. None: 384 MiB; on an accelerator as much as
            a float32 gradient of the weight, if that is more: up to 2 H tokens then need none, and more add to it less often.
        group: ranks that share the vocabulary in equal slices; all must call with the same hidden and targets. The
            gradient by hidden is summed over them here.
        backend: one of auto, reference, chunked, triton.

    Raises:
        ValueError: a shape, dtype or target that does not fit, or logits that are not finite, by the argument's name.
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
        active=active,
        group=group,
    )
    room = _room(call, chunk_bytes)
    backend = choose(backend, call.hidden, call.head, room)
    if backend == "reference":
        stats = reference.logprob(call.hidden, call.targets, call.head, entropy=entropy, index=call.index)
        refuse_not_finite(call, stats.logp, call.index)
        return reference.spread_stats(stats, call.index, len(hidden))
    job = _job(call, entropy, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked.logprob(job, call.index, shift=shift, chunk_bytes=room)


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
    active: Tensor | None = None,
    measured: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    grad_weight_out: Tensor | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """The total of `loss` over the active tokens, its gradients formed in the forward pass: three matrix products, two
    with a frozen head, one without gradients. Arguments not named here are those of `linear_logprob`.

    Args:
        loss: gives each token's loss and its derivative by the log-prob and the entropy. Called once per chunk, with
            no graph. Everything it needs (masks, advantages, denominators) is its own; `index` says which tokens.
        active: [N] bool, false where the gradient is known to be exactly 0 (masked; no advantage and no other term).
            Those tokens cost nothing. Denominators are the loss's, so they may still count.
        measured: [N] bool, tokens to be scored and shown to the loss although no gradient is wanted of them (one
            product); `active` tokens are measured anyway.
        sequence_ids: [N], equal for the neighbouring tokens of a sequence; needed where `loss.whole_sequences`.
        grad_weight_out: [V, H] to which the weight's gradient is added in forward; the weight then gets no gradient
            from autograd, whose hooks (FSDP, DDP) do not run, and the upstream gradient must be 1.

    Returns:
        The loss (a scalar; backward works once or, with retain_graph, more often), the statistics [N] (0 where a token
        was neither active nor measured) and the loss's metrics, each [N]; `actor/head_recomputed` among them is 1 where the
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
        active=active,
        group=group,
    )
    check("measured", measured, (len(hidden),), torch.bool, hidden.device)
    check("sequence_ids", sequence_ids, (len(hidden),), None, hidden.device)
    check("grad_weight_out", grad_weight_out, tuple(weight.shape), None, hidden.device)
    if loss.whole_sequences and sequence_ids is None:
        raise ValueError("sequence_ids is None, but the loss couples the tokens of a sequence; give one id per token")
    quiet = call.index[:0] if measured is None else call.indices(measured & ~call.active)
    room = _room(call, chunk_bytes)
    backend = choose(backend, call.hidden, call.head, room)
    grads = torch.is_grad_enabled()
    trained = weight.requires_grad or grad_weight_out is not None
    needs = (grads and hidden.requires_grad, grads and trained, grads and bias is not None and bias.requires_grad)
    if grad_weight_out is not None and backend == "reference":
        backend = "chunked"
    if backend == "reference":
        return _reference_loss(call, loss, quiet)
    job = _job(call, loss.needs_entropy, backend)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        formed = chunked.formed_loss(
            job,
            call.index,
            loss,
            needs=needs,
            measured=quiet,
            sequence_ids=sequence_ids,
            shift=shift,
            chunk_bytes=room,
            weight_out=grad_weight_out,
        )
    value = chunked.Formed.apply(  # type: ignore[no-untyped-call]
        call.hidden, call.head.weight, call.head.bias, formed, grad_weight_out is not None
    )
    return value, formed.stats, formed.metrics


def logits_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> TokenStats:
    """Statistics of finished logits [N, V] at `targets` [N], differentiable: for a model whose head is not a plain
    linear layer. All logits stay in memory, which is warned of once."""
    _warn_of_logits()
    check("targets", targets, (len(logits),), torch.int64, logits.device)
    scale = temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim else temperature
    return reference.from_logits(logits.to(accumulator(logits.dtype)) / scale, targets, entropy=entropy)


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    *,
    temperature: float | Tensor = 1.0,
    active: Tensor | None = None,
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """`linear_loss` for finished logits [N, V]: the same results, by autograd, with all logits in memory."""
    count = len(logits)
    check("active", active, (count,), torch.bool, logits.device)
    index = torch.arange(count, device=logits.device) if active is None else active.nonzero()[:, 0]
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature[index]
    stats = logits_logprob(logits[index], targets[index], temperature=temperature, entropy=loss.needs_entropy)
    return _total(stats, loss, index, count)


def _warn_of_logits() -> None:
    log_once(
        "fused loss: this model's head is not a plain linear layer, so that all its logits are held in memory and "
        "the loss takes autograd's four passes; give linear_loss the hidden states where you can"
    )


def _reference_loss(call: Call, loss: TokenLoss, quiet: Tensor) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    def over(index: Tensor) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
        stats = reference.logprob(call.hidden, call.targets, call.head, entropy=loss.needs_entropy, index=index)
        refuse_not_finite(call, stats.logp, index)
        return _total(stats, loss, index, len(call.hidden))

    value, stats, metrics = over(call.index)
    if len(quiet) == 0:
        return value, stats, metrics
    with torch.no_grad():
        more_value, more_stats, more_metrics = over(quiet)
    entropy = None if stats.entropy is None or more_stats.entropy is None else stats.entropy + more_stats.entropy
    merged = TokenStats(
        logp=stats.logp + more_stats.logp, one_minus_p=stats.one_minus_p + more_stats.one_minus_p, entropy=entropy
    )
    zeros = torch.zeros_like(merged.logp)
    names = metrics.keys() | more_metrics.keys()
    return value + more_value, merged, {n: metrics.get(n, zeros) + more_metrics.get(n, zeros) for n in names}


def _total(
    stats: TokenStats, loss: TokenLoss, index: Tensor, count: int
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """The scalar loss of differentiable stats [n], and stats and metrics without graph at their places among N."""
    if len(index) == 0:  # a loss never sees an empty chunk; the sum of nothing keeps the graph connected
        value, metrics = stats.logp.sum(), {}
    else:
        value, terms = reference.loss_of(stats, loss, index)
        metrics = dict(terms.metrics)
    with torch.no_grad():
        metrics["actor/head_recomputed"] = torch.zeros_like(stats.logp)
        return (
            value,
            reference.spread_stats(stats, index, count),
            reference.spread_metrics(metrics, index, count),
        )


def _room(call: Call, chunk_bytes: int | None) -> int:
    """`chunk_bytes`, or the default that `linear_logprob` describes."""
    if chunk_bytes is not None:
        return chunk_bytes
    return CHUNK_BYTES if call.hidden.device.type == CPU.device else max(CHUNK_BYTES, 4 * call.head.weight.numel())


def _job(call: Call, entropy: bool, backend: str) -> Job:
    if backend == "triton":
        from .triton_exp import TritonPasses  # stock Triton and triton-ascend are both optional

        passes: Passes = TritonPasses()
    else:
        passes = TorchPasses()
    tile = product_dtype(call.hidden.dtype, call.hidden.device)
    return Job(
        hidden=call.hidden, targets=call.targets, head=call.head, passes=passes, entropy=entropy, tile=tile
    )  # fmt: skip


def choose(backend: str, hidden: Tensor, head: Head, chunk_bytes: int) -> str:
    """The implementation for these operands.

    auto: the reference for float64, float16 (whose gradients need loss scaling before they are rounded) and small
    vocabularies; Triton on an accelerator that has stock Triton; torch operations everywhere else, NPUs included
    until a benchmark there shows a win.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    vocabulary, wide = head.vocabulary, accumulator(hidden.dtype)
    if head.group is None and hidden.dtype in (torch.float64, torch.float16):
        log_once(f"fused loss: {hidden.dtype} goes to the reference, which holds all logits")
        return "reference"
    logit_bytes = len(hidden) * vocabulary * wide.itemsize
    if head.group is None and vocabulary <= SMALL_VOCABULARY and logit_bytes <= chunk_bytes:
        return "reference"
    if hidden.device.type == CUDA.device and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "chunked"
