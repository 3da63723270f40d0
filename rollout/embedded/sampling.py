"""Sampling of tokens: the distribution after all sampling parameters, log-probs under it, and
uniform draws that depend on seed, prompt, sample and position alone.

Shape legend: n sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ..samples import Prompt, Sampling


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for the first value that cannot be served."""
    if sampling.max_tokens < 1:
        raise ValueError(f"sampling.max_tokens={sampling.max_tokens}: at least 1 token is needed")
    if not sampling.temperature >= 0:
        raise ValueError(
            f"sampling.temperature={sampling.temperature}: give 0 for greedy, or a positive number"
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"sampling.top_p={sampling.top_p}: must be above 0 and at most 1 (1 means all)"
        )
    if sampling.top_k < 0:
        raise ValueError(f"sampling.top_k={sampling.top_k}: must be at least 0 (0 means all)")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"sampling.min_p={sampling.min_p}: must be from 0 (which means all) to 1")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(
            f"sampling.repetition_penalty={sampling.repetition_penalty}: must be a positive number"
            " (1 means none)"
        )
    if not all(sampling.stop):
        raise ValueError(
            f"sampling.stop={sampling.stop}: an empty string would end every answer; leave it out"
        )


def check_request(
    prompt: Prompt, n: int, sampling: Sampling, *, max_model_len: int, vocab_size: int
) -> None:
    """Raises ValueError if an engine with this maximum length and vocabulary cannot serve n samples
    of `prompt`."""
    check_sampling(sampling)
    if n < 1:
        raise ValueError(f"prompt {prompt.id}: n={n}, at least one sample is needed")
    length = len(prompt.token_ids)
    if length == 0:
        raise ValueError(f"prompt {prompt.id} has no tokens")
    if length + sampling.max_tokens > max_model_len:
        raise ValueError(
            f"prompt {prompt.id}: {length} prompt tokens + max_tokens={sampling.max_tokens} is "
            f"{length + sampling.max_tokens}, above max_model_len={max_model_len}"
        )
    bad = [token for token in prompt.token_ids if not 0 <= token < vocab_size]
    if bad:
        raise ValueError(
            f"prompt {prompt.id}: token {bad[0]} is outside the vocabulary of the model"
        )


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key of one sample's stream of draws."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{sample}/{prompt_id}".encode())


def uniforms(keys: NDArray[np.uint64], start: int, stop: int) -> NDArray[np.float64]:
    """[n] keys -> [n, stop - start] uniforms in [0, 1) for positions start..stop-1, each a function
    of (key, position).

    SplitMix64 (Steele, Lea and Flood, 2014) with the position as its counter: a draw costs no
    state, so it cannot depend on the batch. 52 bits, so that u * total stays below total in
    float64.
    """
    position = np.arange(start + 1, stop + 1, dtype=np.uint64)
    z = keys[:, None] + position * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    draws: NDArray[np.float64] = (z >> np.uint64(12)) * np.float64(2.0**-52)
    return draws


@dataclass(slots=True, kw_only=True)
class SlotSampling:
    """Per-sequence sampling parameters as tensors, and whether any sequence uses each of them
    (those unused cost nothing)."""

    temperature: Tensor
    """[n] 1 where greedy."""
    greedy: Tensor
    """[n] bool"""
    top_k: Tensor
    """[n] int64, V where all."""
    top_p: Tensor
    """[n]"""
    min_p: Tensor
    """[n]"""
    penalty: Tensor
    """[n]"""
    any_temperature: bool = False
    any_greedy: bool = False
    any_cut: bool = False
    any_penalty: bool = False

    @classmethod
    def empty(cls, slots: int, dtype: torch.dtype, device: torch.device) -> SlotSampling:
        def zeros(kind: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=kind, device=device)

        return cls(
            temperature=zeros(dtype),
            greedy=zeros(torch.bool),
            top_k=zeros(torch.int64),
            top_p=zeros(dtype),
            min_p=zeros(dtype),
            penalty=zeros(dtype),
        )

    def fill(self, start: int, stop: int, sampling: Sampling, vocab_size: int) -> None:
        self.temperature[start:stop] = sampling.temperature or 1.0
        self.greedy[start:stop] = sampling.temperature == 0
        self.top_k[start:stop] = sampling.top_k or vocab_size
        self.top_p[start:stop] = sampling.top_p
        self.min_p[start:stop] = sampling.min_p
        self.penalty[start:stop] = sampling.repetition_penalty

    def move(self, source: int, target: int) -> None:
        for held in self._tensors().values():
            held[target] = held[source]

    def note(self, used: Iterable[Sampling]) -> None:
        """Records which parameters the sequences in use have set."""
        settings = set(used)
        self.any_temperature = any(s.temperature not in (0, 1) for s in settings)
        self.any_greedy = any(s.temperature == 0 for s in settings)
        self.any_cut = any(s.top_p < 1 or s.top_k > 0 or s.min_p > 0 for s in settings)
        self.any_penalty = any(s.repetition_penalty != 1 for s in settings)

    def slots(self, start: int, stop: int) -> SlotSampling:
        """A view of slots start..stop-1."""
        return replace(
            self, **{name: tensor[start:stop] for name, tensor in self._tensors().items()}
        )

    def _tensors(self) -> dict[str, Any]:
        named = {held.name: getattr(self, held.name) for held in fields(self)}
        return {name: held for name, held in named.items() if isinstance(held, Tensor)}


def sample(logits: Tensor, uniform: Tensor, settings: SlotSampling) -> tuple[Tensor, Tensor]:
    """logits [n, V], uniform [n] float64 in [0, 1) -> (tokens [n] int64, log-probs [n] of the
    temperature's dtype).

    The log-prob is of the distribution drawn from: after temperature, min-p, top-k and then top-p,
    renormalised. A greedy token (temperature 0) is the argmax, and its log-prob is that of the
    untempered, uncut logits.
    """
    logits = logits.to(settings.temperature.dtype)
    if settings.any_temperature:
        logits = logits / settings.temperature[:, None]
    logp = torch.log_softmax(logits, -1)
    drawn = _cut(logp, settings) if settings.any_cut else logp
    mass = drawn.exp().cumsum(-1, dtype=torch.float64)
    # the last sum is 1 up to rounding only, and a draw above it would be no token
    tokens = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    if settings.any_greedy:
        greedy = settings.greedy[:, None]
        tokens = torch.where(greedy, logp.argmax(-1, keepdim=True), tokens)
        drawn = torch.where(greedy, logp, drawn)
    return tokens.squeeze(1), drawn.gather(1, tokens).squeeze(1)


def penalised(logits: Tensor, seen: Tensor, settings: SlotSampling) -> Tensor:
    """Logits [n, V], in the temperature's dtype, with the repetition penalty applied to the tokens
    of the mask `seen` [n, V]."""
    logits = logits.to(settings.temperature.dtype)
    penalty = settings.penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _cut(logp: Tensor, settings: SlotSampling) -> Tensor:
    """Log-probs [n, V] after min-p, top-k and top-p in this order, renormalised; -inf for a token
    that is excluded. Top-p keeps the fewest of the likeliest tokens whose mass reaches it."""
    top_p = settings.top_p
    ordered, order = logp.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logp.shape[1], device=logp.device)
    unlikely = (ordered - ordered[:, :1]).exp() < settings.min_p[:, None]
    ordered = ordered.masked_fill((rank >= settings.top_k[:, None]) | unlikely, -torch.inf)
    ordered = torch.log_softmax(ordered, -1)
    mass = ordered.exp()
    before = mass.cumsum(-1) - mass
    # A sum that should be exactly top_p may round below it; top_p = 1 must keep everything.
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    ordered = torch.log_softmax(ordered.masked_fill(~keep, -torch.inf), -1)
    return torch.empty_like(logp).scatter_(1, order, ordered)
