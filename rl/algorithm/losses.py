"""From resolved settings and a batch to the `TokenLoss` of a step.

The mathematics stands in `surrogates`; here it gets its ratio level, the weights of `aggregation`
and `offpolicy`, the KL penalty and the entropy bonus. The total is the plain sum over tokens:
nothing is divided here.

Shape legend: n tokens of a chunk, T tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.loss.terms import TokenStats, TokenTerms
from ..config.algorithm import LOSSES, KLConfig, LossConfig, OffPolicyConfig
from ..groups import Batch
from .kinds import KINDS, weighted
from .offpolicy import correction, renormalised
from .plugins import UserLoss, load_loss
from .surrogates import (
    TAU_TERM,
    bounded,
    kl_penalty,
    nll,
    off_policy_sequences,
)
from .token_batch import TokenBatch

Array = NDArray[Any]

PARTS = ("actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/nll_loss", TAU_TERM)
"""Metrics of `BatchLoss` that hold weights, so that their sum is the figure: the terms of the loss,
before their coefficients. The others are means over the tokens of `COUNTED`."""
COUNTED = "tokens"
"""1 for a token that trains, 0 for one whose log-probs are not finite."""
CLIPPED = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Everything that fixes the loss of a step besides the batch."""

    loss: LossConfig | None
    """None: the negative log-likelihood of supervised fine-tuning."""
    kl: KLConfig = field(default_factory=KLConfig)
    offpolicy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    temperature: float = 1.0
    """That of sampling: log-probs are compared under the same one."""

    @staticmethod
    def of(
        loss: LossConfig, kl: KLConfig, offpolicy: OffPolicyConfig, *, temperature: float = 1.0
    ) -> Objective:
        """Checks a user's own loss on a tiny batch at once, so that a run ends before it samples
        anything."""
        if loss.kind not in LOSSES:
            load_loss(loss.kind, loss.options)
        return Objective(loss=loss, kl=kl, offpolicy=offpolicy, temperature=temperature)

    @staticmethod
    def sft() -> Objective:
        return Objective(loss=None)

    @property
    def on_samples(self) -> bool:
        """Whether the batch's behaviour log-probs mean anything."""
        return self.loss is not None

    @property
    def needs_old_logp(self) -> bool:
        """Whether the learner's own log-probs of the batch must be computed before the step."""
        return self.on_samples and self.offpolicy.old_logp == "recompute"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the reference's log-probs."""
        return self.on_samples and self.kl.active and self.kl.place == "loss"

    @property
    def needs_all_tokens(self) -> bool:
        """Whether a token of advantage 0 still has a gradient."""
        if self.loss is None or self.loss.kind not in LOSSES:
            return True
        return bool(
            self.needs_reference or self.loss.entropy_coef or self.loss.tau or self.loss.nll_coef
        )


def token_loss(
    objective: Objective,
    batch: Batch,
    device: torch.device,
    *,
    old_logp: Array | None = None,
    reference_logp: Array | None = None,
) -> BatchLoss:
    """The loss of the whole batch, to be called chunk by chunk.

    A loss token whose behaviour, old or reference log-prob is not finite does not train: its share
    is `actor/nonfinite_logp` and keeps its place in the denominators. Where tokens of a sequence
    are coupled its whole sequence does not train.

    Args:
        old_logp: [T] the learner's log-probs under the old policy; required if
            `objective.needs_old_logp`.
        reference_logp: [T] those of the reference; required if `objective.needs_reference`.

    Raises:
        ValueError: an advantage of a loss token that is not finite.
    """
    assert not objective.needs_old_logp or old_logp is not None, (
        "offpolicy.old_logp=recompute, but none were computed"
    )
    assert not objective.needs_reference or reference_logp is not None, (
        "kl.place=loss, but there is no reference"
    )
    mask, behaviour = batch.loss_mask_T, batch.behaviour_logp_T
    if objective.on_samples and not np.isfinite(batch.advantages_T[mask]).all():
        count = int((~np.isfinite(batch.advantages_T[mask])).sum())
        raise ValueError(
            f"{count} of {mask.sum()} loss tokens have an advantage that is not finite; check the"
            " size of the rewards, and with a critic its values (critic/values/*,"
            " critic/grad_norm)"
        )
    old = behaviour if old_logp is None or not objective.needs_old_logp else old_logp
    weights = importance = batch.weights_T
    metrics: dict[str, float] = {}
    if objective.on_samples and objective.offpolicy.active:
        found = correction(old, behaviour, mask, batch.sequence_ids_T, objective.offpolicy)
        metrics = found.metrics
        if objective.loss is not None and objective.loss.denominator == "kept":
            weights = renormalised(weights, found.kept)
        importance = weights * found.weights
    rows = {"old_logp": old, "behaviour_logp": behaviour}
    if objective.needs_reference and reference_logp is not None:
        rows["reference_logp"] = reference_logp
    trains = mask.copy()
    if objective.on_samples:
        for row in rows.values():
            trains &= np.isfinite(row)
    ids = batch.sequence_ids_T
    rows |= {"advantages": batch.advantages_T, "weights": weights, "importance": importance}
    if objective.loss is not None and objective.loss.nll_coef:
        assert batch.correct_T is not None, (
            "loss.nll_coef, but nobody said which answers are correct"
        )
        shown = mask & batch.correct_T
        rows["imitation"] = objective.loss.nll_coef * shown / max(1, int(shown.sum()))
    # what is masked may hold anything
    rows = {name: np.where(trains, row, 0.0) for name, row in rows.items()}
    rows["length"] = (
        np.maximum(np.bincount(ids, weights=mask), 1.0)[ids] if len(ids) else np.zeros(0)
    )
    return BatchLoss(objective, rows, mask, trains, ids, device, metrics)


class BatchLoss:
    """The loss of one batch; `metrics` holds the figures that were known before any pass."""

    def __init__(
        self,
        objective: Objective,
        rows: dict[str, Array],
        mask: NDArray[np.bool_],
        trains: NDArray[np.bool_],
        sequence_ids: Array,
        device: torch.device,
        metrics: dict[str, float],
    ) -> None:
        self.objective = objective
        self.metrics = metrics
        loss = objective.loss
        self._user: UserLoss | None = None
        if loss is not None and loss.kind not in LOSSES:
            self._user = load_loss(loss.kind, loss.options)
        coupled = loss is not None and (
            loss.ratio_level != "token" or objective.offpolicy.opsm_delta is not None
        )
        self.whole_sequences = coupled or (self._user is not None and self._user.whole_sequences)
        self.needs_entropy = loss is not None
        """Always logged, since it costs no product; whether it is also trained says
        `loss.entropy_coef`."""
        self.clips_by_advantage = loss is not None and loss.kind == "ppo_clip"
        """Whether a token of advantage 0 is never clipped, so that those left out of the passes are
        known not to be."""
        self._rows = rows
        self._device = device
        self._on_device: dict[torch.dtype, dict[str, Tensor]] = {}
        self._mask = torch.from_numpy(np.ascontiguousarray(mask)).to(device)
        self._trains = torch.from_numpy(np.ascontiguousarray(trains)).to(device)
        self._sequence = torch.from_numpy(np.ascontiguousarray(sequence_ids).astype(np.int64)).to(
            device
        )

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        rows = {name: row[index] for name, row in self._tensors(stats.logp.dtype).items()}
        sequence = self._sequence[index]
        trains = self._trains[index] & torch.isfinite(stats.logp)
        bad = (self._mask[index] & ~trains).to(stats.logp.dtype)
        if self.whole_sequences and len(sequence):
            broken = bad.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, bad)
            trains = trains & (broken[sequence] == 0)
        logp = torch.where(trains, stats.logp, rows["old_logp"])
        weights = torch.where(trains, rows.pop("weights"), 0.0)
        importance = torch.where(trains, rows.pop("importance"), 0.0)
        imitation = torch.where(trains, rows.pop("imitation"), 0.0) if "imitation" in rows else None
        batch = TokenBatch(sequence=sequence, entropy=stats.entropy, **rows)
        if self.objective.loss is None:
            return weighted(nll(logp), weights)
        terms = self._policy_terms(logp, batch, importance, self.objective.loss)
        terms = self._with_kl(terms, logp, batch, weights)
        if imitation is not None:
            terms = _plus(terms, weighted(nll(logp), imitation))
            terms = _shown(
                terms, "actor/nll_loss", imitation * -logp / self.objective.loss.nll_coef
            )
        terms = self._with_entropy(terms, stats.entropy, trains, weights)
        metrics = {"actor/ppo_kl": bounded(batch.old_logp - logp)[0], **terms.metrics}
        metrics = {name: torch.where(trains, value, 0.0) for name, value in metrics.items()}
        metrics |= {"actor/nonfinite_logp": bad, COUNTED: trains.to(bad.dtype)}
        # what a sequence shares out reaches its masked tokens too
        dlogp = torch.where(trains, terms.dlogp, 0.0)
        return TokenTerms(loss=terms.loss, dlogp=dlogp, dentropy=terms.dentropy, metrics=metrics)

    def _tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The batch's arrays in the dtype of the head's log-probs, which only its first call
        shows."""
        if dtype not in self._on_device:
            self._on_device[dtype] = {
                name: torch.from_numpy(np.ascontiguousarray(row)).to(dtype).to(self._device)
                for name, row in self._rows.items()
            }
        return self._on_device[dtype]

    def _policy_terms(
        self, logp: Tensor, batch: TokenBatch, weights: Tensor, loss: LossConfig
    ) -> TokenTerms:
        delta = self.objective.offpolicy.opsm_delta
        metrics: dict[str, Tensor] = {}
        if delta is not None:
            dropped = off_policy_sequences(
                batch.means(batch.behaviour_logp - logp), batch.advantages, delta
            )
            weights = torch.where(dropped, 0.0, weights)
            metrics["rollout_corr/opsm_masked_fraction"] = dropped.to(logp.dtype)
        if self._user is not None:
            value, slope = self._user(logp, batch, weights)
            terms = TokenTerms(loss=torch.where(weights != 0, value * weights, 0.0), dlogp=slope)
        else:
            terms = KINDS[loss.kind](logp, batch, weights, loss)
        metrics["actor/pg_loss"] = terms.loss
        if TAU_TERM in terms.metrics:
            metrics[TAU_TERM] = weights * terms.metrics[TAU_TERM]
            metrics["actor/pg_loss"] = terms.loss - loss.tau * metrics[TAU_TERM]
        return TokenTerms(loss=terms.loss, dlogp=terms.dlogp, metrics={**terms.metrics, **metrics})

    def _with_kl(
        self, terms: TokenTerms, logp: Tensor, batch: TokenBatch, weights: Tensor
    ) -> TokenTerms:
        kl = self.objective.kl
        if batch.reference_logp is None:
            return terms
        old_logp = batch.old_logp if kl.unbiased else None
        found = kl_penalty(
            logp, batch.reference_logp, kl.estimator, old_logp=old_logp, bound=kl.bound
        )
        penalty = weighted(found, weights)
        scaled = TokenTerms(loss=kl.coef * penalty.loss, dlogp=kl.coef * penalty.dlogp)
        return _shown(_plus(terms, scaled), "actor/kl_loss", penalty.loss)

    def _with_entropy(
        self, terms: TokenTerms, entropy: Tensor | None, trains: Tensor, weights: Tensor
    ) -> TokenTerms:
        if entropy is None:  # a caller that has no need of the figure
            assert self.objective.loss is None or not self.objective.loss.entropy_coef
            return terms
        entropy = torch.where(trains, entropy, 0.0)
        terms = _shown(terms, "actor/entropy", weights * entropy)
        terms = _shown(terms, "actor/entropy_per_token", entropy)
        assert self.objective.loss is not None
        if not self.objective.loss.entropy_coef:
            return terms
        slope = -self.objective.loss.entropy_coef * weights
        return TokenTerms(
            loss=terms.loss + slope * entropy,
            dlogp=terms.dlogp,
            dentropy=slope,
            metrics=terms.metrics,
        )


def _plus(terms: TokenTerms, more: TokenTerms) -> TokenTerms:
    return TokenTerms(
        loss=terms.loss + more.loss, dlogp=terms.dlogp + more.dlogp, metrics=terms.metrics
    )


def _shown(terms: TokenTerms, name: str, values: Tensor) -> TokenTerms:
    """The terms with one more figure."""
    return TokenTerms(
        loss=terms.loss,
        dlogp=terms.dlogp,
        dentropy=terms.dentropy,
        metrics={**terms.metrics, name: values},
    )
