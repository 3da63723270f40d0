"""A small head, three small losses and their independent float64 oracle, which every kernel is held
against."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from emberl.kernels.loss import fused_loss
from emberl.kernels.loss.terms import TokenStats, TokenTerms
from torch import Tensor

torch.set_num_threads(1)


def forced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the backend and the size of a chunk as arguments, which it chooses itself."""

    def call(
        *arguments: Any, backend: str = "auto", chunk_bytes: int | None = None, **named: Any
    ) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if backend != "auto":
                patch.setattr(fused_loss, "choose", lambda *_: backend)
            if chunk_bytes is not None:
                patch.setattr(fused_loss, "chunk_bytes", lambda _: chunk_bytes)
            return function(*arguments, **named)

    return call


linear_logprob = forced(fused_loss.linear_logprob)
linear_loss = forced(fused_loss.linear_loss)
forced_loss: Any = ModuleType("forced_loss")
forced_loss.linear_logprob = linear_logprob
forced_loss.linear_loss = linear_loss
sys.modules["forced_loss"] = forced_loss


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """PPO-clip with weights and an optional entropy bonus; `formula` says the same for autograd."""

    old: Tensor
    advantage: Tensor
    weight: Tensor
    bonus: float = 0.0
    clip: float = 0.2
    whole_sequences: bool = False

    @property
    def needs_entropy(self) -> bool:
        return self.bonus != 0

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        advantage, weight = self.advantage[index], self.weight[index]
        ratio = torch.exp(stats.logp - self.old[index])
        bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
        taken = ratio * advantage <= bounded * advantage
        loss = -torch.minimum(ratio * advantage, bounded * advantage) * weight
        dlogp = torch.where(taken, -ratio * advantage * weight, 0.0)
        dentropy = None
        if stats.entropy is not None:
            loss = loss - self.bonus * stats.entropy * weight
            dentropy = -self.bonus * weight
        return TokenTerms(
            loss=loss, dlogp=dlogp, dentropy=dentropy, metrics={"clipped": (~taken).to(loss.dtype)}
        )

    def formula(self, logp: Tensor, entropy: Tensor) -> Tensor:
        ratio = torch.exp(logp - self.old)
        bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
        surrogate = torch.minimum(ratio * self.advantage, bounded * self.advantage)
        return -((surrogate + self.bonus * entropy) * self.weight).sum()


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """-A exp(mean over the sequence of log-ratios), the sum over sequences: all tokens of a
    sequence are coupled."""

    old: Tensor
    advantage: Tensor
    """[S]"""
    ids: Tensor
    """[N]"""
    whole_sequences: bool = True
    needs_entropy: bool = False
    sizes: list[int] = field(default_factory=list)
    """lengths of the chunks that this loss was shown"""

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        self.sizes.append(len(index))
        ids, seq = torch.unique_consecutive(self.ids[index], return_inverse=True)
        count = torch.zeros(len(ids), dtype=stats.logp.dtype).index_add_(
            0, seq, torch.ones_like(stats.logp)
        )
        log_ratio = torch.zeros_like(count).index_add_(0, seq, stats.logp - self.old[index]) / count
        value = -self.advantage[ids] * torch.exp(log_ratio)
        share = (value / count)[seq]
        return TokenTerms(loss=share, dlogp=share)

    def formula(self, logp: Tensor, entropy: Tensor) -> Tensor:
        total = logp.new_zeros(())
        for number in self.ids.unique().tolist():
            mine = self.ids == number
            total = total - self.advantage[number] * torch.exp((logp - self.old)[mine].mean())
        return total


@dataclass(frozen=True, kw_only=True)
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def on(self, device: torch.device) -> Case:
        return moved(self, device, options={k: _moved(v, device) for k, v in self.options.items()})

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh leaves that require gradients."""
        hidden, weight = self.hidden.detach().clone(), self.weight.detach().clone()
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return hidden.requires_grad_(), weight.requires_grad_(), bias


def make(
    n: int = 23, h: int = 8, v: int = 37, *, bias: bool = False, seed: int = 0, **options: Any
) -> Case:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) * 0.7
    targets = torch.randint(0, v, (n,), generator=g)
    if n > 3:
        targets[:4] = torch.tensor([0, v - 1, 0, v - 1])
    b = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    return Case(hidden=hidden, weight=weight, targets=targets, bias=b, options=options)


def oracle(
    case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] in float64, written apart from the package."""
    raw = hidden.double() @ weight.double().T
    raw = raw if bias is None else raw + bias.double()
    raw = raw * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    raw = raw if cap is None else cap * torch.tanh(raw / cap)
    temperature = case.options.get("temperature", 1.0)
    raw = raw / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    logs = torch.log_softmax(raw, -1)
    return logs[torch.arange(len(logs)), case.targets], -(logs.exp() * logs).sum(-1)


def clipped(case: Case, *, bonus: float = 0.0, noise: float = 0.2, seed: int = 1) -> Clipped:
    """A loss whose old log-probs lie `noise` around the true ones, so that some tokens are
    clipped."""
    g = torch.Generator().manual_seed(seed)
    logp, _ = oracle(case, case.hidden, case.weight, case.bias)
    n = len(logp)
    old = (logp + noise * torch.randn(n, generator=g, dtype=torch.float64)).clamp(max=0)
    advantage = torch.randn(n, generator=g, dtype=torch.float64)
    weight = torch.rand(n, generator=g, dtype=torch.float64) / max(n, 1)
    return Clipped(old=old, advantage=advantage, weight=weight, bonus=bonus)


def oracle_gradients(case: Case, loss: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients by hidden, weight (and bias) in float64."""
    hidden, weight, bias = (
        None if x is None else x.detach().double().requires_grad_()
        for x in (case.hidden, case.weight, case.bias)
    )
    value = loss.formula(*oracle(case, hidden, weight, bias))
    return value, list(
        torch.autograd.grad(value, [x for x in (hidden, weight, bias) if x is not None])
    )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def moved(thing: Any, device: torch.device, **change: Any) -> Any:
    """A dataclass whose tensors are on `device`."""
    return replace(
        thing, **{f.name: _moved(getattr(thing, f.name), device) for f in fields(thing)} | change
    )


def check_float32(case: Case, bonus: float, device: torch.device, **options: Any) -> None:
    """The whole loss in float32 on `device` against the oracle."""
    loss = clipped(case, bonus=bonus)
    value, grads = oracle_gradients(case, loss)
    there = case.to(torch.float32).on(device)
    hidden, weight, bias = there.operands()
    got, stats, _ = linear_loss(
        hidden,
        weight,
        there.targets,
        moved(loss, device),
        bias=bias,
        shift=loss.old.to(device),
        **options,
        **there.options,
    )
    got.backward()
    assert abs(got.detach().cpu() - value) < 1e-5 and stats.logp.max() <= 0
    for mine, theirs in zip((hidden, weight, bias), grads, strict=False):
        assert (mine.grad.cpu() - theirs).norm() < 2e-5 * theirs.norm()


HEADS = {
    "plain": lambda n: {},
    "bias and temperature": lambda n: {"bias": True, "temperature": 0.7},
    "softcap": lambda n: {"softcap": 3.0, "logit_scale": 1.5},
    "temperature per token": lambda n: {"temperature": torch.linspace(0.5, 2, n)},
}


@pytest.fixture(params=HEADS.values(), ids=HEADS.keys())
def head_options(request: pytest.FixtureRequest) -> Any:
    """head_options(tokens) -> what `make` takes for one kind of head after the other."""
    return request.param


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        make=make,
        moved=moved,
        check_float32=check_float32,
        clipped=clipped,
        oracle=oracle,
        oracle_gradients=oracle_gradients,
        Sequences=Sequences,
        Clipped=Clipped,
    )
