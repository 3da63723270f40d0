"""A user's own losses and advantages: found by path or entry point, tried on a tiny batch, and
wrapped for the learner.

A loss is `f(logp, batch, **options)`, differentiated by autograd, or giving its derivative itself:

    def my_loss(logp, batch):                                   # [n] -> [n]; batch is a TokenBatch
        ratio = (logp - batch.old_logp).exp()
        return -batch.advantages * ratio.clamp(max=2.0)

It returns each token's loss and must not average: masks, weights and means are applied outside. A
loss that couples the tokens of a sequence sets `my_loss.whole_sequences = True`. One that returns
(loss, dlogp) is in closed form; if its dlogp is on purpose not the derivative of its loss (a
stop-gradient), it sets `my_loss.stop_gradient = True`.

An advantage is `f(scores, **options)`: a list of [G] arrays in, NaN for no verdict, a list of [G]
arrays out.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...rewards.plugins.loading import PluginFile, describe, import_function, load_function
from ..config.algorithm import ADVANTAGE_PLUGINS, LOSS_PLUGINS

if TYPE_CHECKING:  # an advantage needs no torch
    from torch import Tensor

    from .token_batch import TokenBatch

Floats = NDArray[np.float64]
AdvantageFunction = Callable[[Sequence[Floats]], list[Floats]]
TOLERANCE = 1e-5
"""Largest difference, absolute plus relative, between a stated and a numerical derivative."""
STEP = 1e-6
"""Step of the central difference: in float64 its rounding error is about 1e-10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserLoss:
    """A user's loss, callable as (logp, batch, weights)."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]

    @property
    def whole_sequences(self) -> bool:
        return bool(getattr(self.function, "whole_sequences", False))

    def __call__(self, logp: Tensor, batch: TokenBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's loss [n], and the derivative [n] of sum(weights * loss) by its log-prob."""
        import torch

        with torch.enable_grad():
            leaf = logp.detach().clone().requires_grad_(True)
            given = self.function(leaf, batch, **self.options)
            if isinstance(given, tuple) and len(given) == 2:
                loss, slope = (self._checked(part, logp) for part in given)
                return loss.detach(), weights * slope.detach()
            loss = self._checked(given, logp)
            if not loss.requires_grad:
                return loss.detach(), torch.zeros_like(logp)
            (slope,) = torch.autograd.grad((weights * loss).sum(), leaf)
        return loss.detach(), slope

    def _checked(self, part: Any, logp: Tensor) -> Tensor:
        import torch

        if not isinstance(part, torch.Tensor) or part.shape != logp.shape:
            shape = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
            raise ValueError(
                f"loss.kind={self.name!r} returned {shape} for {len(logp)} tokens; return one loss"
                f" per token, shape [{len(logp)}], without sum or mean, or the pair (loss, dlogp)"
                " of that shape"
            )
        return part


def load_loss(kind: str, options: Mapping[str, Any], file: PluginFile | None = None) -> UserLoss:
    """The loss that `kind` names, after `check_loss`. Raises ValueError if it cannot be loaded or
    fails the check. file: the source file that `kind` names, read where the run was started."""
    return _load_loss(kind, json.dumps(dict(options), sort_keys=True), file)


@functools.lru_cache(maxsize=8)
def _load_loss(kind: str, options: str, file: PluginFile | None) -> UserLoss:
    function = _find(kind, LOSS_PLUGINS, file)
    loss = UserLoss(name=kind, function=function, options=json.loads(options))
    check_loss(loss)
    return loss


def load_advantage(kind: str, options: Mapping[str, Any]) -> AdvantageFunction:
    """The advantage function that `kind` names, after a trial. Every call checks shapes and values
    (ValueError) and gives NaN scores the advantage 0."""
    return _load_advantage(kind, json.dumps(dict(options), sort_keys=True))


@functools.lru_cache(maxsize=8)
def _load_advantage(kind: str, options: str) -> AdvantageFunction:
    function, keywords = _find(kind, ADVANTAGE_PLUGINS), json.loads(options)

    def checked(scores: Sequence[Floats]) -> list[Floats]:
        given = function([s.copy() for s in scores], **keywords)
        shapes = [np.shape(s) for s in scores]
        if not isinstance(given, list | tuple) or [np.shape(a) for a in given] != shapes:
            got = (
                [np.shape(a) for a in given]
                if isinstance(given, list | tuple)
                else type(given).__name__
            )
            raise ValueError(
                f"advantage.kind={kind!r} returned {got} for groups of {shapes}; return a list of"
                " these shapes"
            )
        advantages = [
            np.where(np.isnan(s), 0.0, np.asarray(a, np.float64))
            for s, a in zip(scores, given, strict=True)
        ]
        bad = next((i for i, a in enumerate(advantages) if not np.isfinite(a).all()), None)
        if bad is not None:
            raise ValueError(
                f"advantage.kind={kind!r} gave {advantages[bad]} for the scores {scores[bad]}; all"
                " must be finite"
            )
        return advantages

    trial = [np.array(s) for s in ([1.0, 0.0, 0.5, np.nan], [1.0, 1.0], [0.25], [np.nan])]
    with warnings.catch_warnings():
        # numpy warns, for example, of the mean of a group without any verdict
        warnings.simplefilter("ignore", RuntimeWarning)
        _run(lambda: checked(trial), f"advantage.kind={kind!r}")
    return checked


def check_loss(loss: UserLoss) -> None:
    """Tries a loss on three sequences in float64. Raises ValueError unless it gives one finite loss
    per token, independent of the other tokens (with whole_sequences, of the other sequences), and a
    stated derivative equals the numerical one."""
    import torch

    from .token_batch import tiny_batch

    logp, batch = tiny_batch()
    name = f"loss.kind={loss.name!r}"
    ones = torch.ones_like(logp)
    value, slope = _run(lambda: loss(logp, batch, ones), name)
    for what, tensor in (("loss", value), ("dlogp", slope)):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} gave a {what} that is not finite on a tiny batch of ordinary log-probs:"
                f" {tensor}"
            )
    parts = [[i] for i in range(len(logp))]
    if loss.whole_sequences:
        parts = [
            (batch.sequence == s).nonzero()[:, 0].tolist()
            for s in sorted(set(batch.sequence.tolist()))
        ]
    for part in parts:
        alone, slope_alone = _run(
            functools.partial(loss, logp[part], batch.select(part), ones[part]), name
        )
        if not (torch.allclose(alone, value[part]) and torch.allclose(slope_alone, slope[part])):
            advice = (
                "sum and average only within batch.sequence"
                if loss.whole_sequences
                else (
                    "do not sum, average or normalise over tokens; if the tokens of a sequence are"
                    " coupled on purpose, set whole_sequences = True on the function"
                )
            )
            raise ValueError(
                f"{name}: a token's loss changes with the tokens beside it, so micro-batches would"
                f" too; {advice}"
            )
    if not getattr(loss.function, "stop_gradient", False) and _states_derivative(loss, logp, batch):
        numerical = torch.stack([_numerical(loss, logp, batch, i) for i in range(len(logp))])
        if not torch.allclose(numerical, slope, rtol=TOLERANCE, atol=TOLERANCE):
            raise ValueError(
                f"{name}: the stated dlogp {slope.tolist()} is not the numerical derivative"
                f" {numerical.tolist()}; correct it, return the loss alone (autograd differentiates"
                " it), or set stop_gradient = True if it is meant so"
            )


def _states_derivative(loss: UserLoss, logp: Tensor, batch: TokenBatch) -> bool:
    """Whether the loss returns (loss, dlogp). Autograd's derivative needs no check, and rightly
    differs from the numerical one where the loss detaches."""
    return isinstance(loss.function(logp, batch, **loss.options), tuple)


def _numerical(loss: UserLoss, logp: Tensor, batch: TokenBatch, i: int) -> Tensor:
    import torch

    moved = torch.zeros_like(logp)
    moved[i] = STEP
    ones = torch.ones_like(logp)
    above, below = (
        loss(logp + moved, batch, ones)[0].sum(),
        loss(logp - moved, batch, ones)[0].sum(),
    )
    return (above - below) / (2 * STEP)


def _run(call: Callable[[], Any], name: str) -> Any:
    """The result of a trial of a user's code. Raises ValueError for whatever it raises, with its
    name and the place in one line."""
    try:
        return call()
    except Exception as error:
        if str(error).startswith(name):  # raised by our own check of its result
            raise
        raise ValueError(f"{name} failed on a tiny batch: {describe(error)}") from error


def _find(kind: str, group: str, file: PluginFile | None = None) -> Callable[..., Any]:
    """The function of `package.module:function`, `./file.py:function` or an entry point."""
    try:
        return load_function(kind, group) if file is None else import_function(kind, file)
    except ValueError as error:
        raise ValueError(f"{kind!r}: {error}") from error
