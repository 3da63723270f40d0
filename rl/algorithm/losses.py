"""The `TokenLoss` of a step, made of resolved settings and a batch.

A loss is a sum of parts per token: the policy gradient, cross entropy, the KL to a named model, the
entropy bonus. Supervised learning is cross entropy alone, RL a policy gradient and what its
settings add, distillation either of these with a teacher as the named model. The formulas are in
`surrogates`; here they get their ratio level and the weights of `batch.token_weights` and
`offpolicy`. The total is the plain sum over tokens: nothing is divided here.

Shape legend: n tokens of a chunk, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.loss.terms import TokenStats, TokenTerms
from ...rewards.plugins.loading import PluginFile
from ..config.algorithm import LOSSES, KLConfig, LossConfig, OffPolicyConfig
from ..config.distill import DistillConfig
from ..groups import Batch
from .offpolicy import correction, renormalised
from .plugins import UserLoss, load_loss
from .surrogates import (
    KINDS,
    TAU_TERM,
    bounded,
    kl_penalty,
    nll,
    off_policy_sequences,
    weighted,
)
from .token_batch import TokenBatch

Array = NDArray[Any]

DISTILL_TERM = "actor/distill_loss"
POLICY_TERMS = ("actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/nll_loss")
PARTS = (*POLICY_TERMS, DISTILL_TERM, TAU_TERM)
"""Metrics of `BatchLoss` with the tokens' weights multiplied in, to be summed: the terms of the
loss without their coefficients. Other metrics are means over the tokens of `COUNTED`."""
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
    distill: DistillConfig = field(default_factory=DistillConfig)
    temperature: float = 1.0
    """The sampling temperature: log-probs are compared under the same one."""
    file: PluginFile | None = None
    """The source file of `loss.kind`, sent along since learners run in other folders and on other
    machines; None for other kinds."""

    @staticmethod
    def of(
        loss: LossConfig,
        kl: KLConfig,
        offpolicy: OffPolicyConfig,
        *,
        distill: DistillConfig | None = None,
        temperature: float = 1.0,
    ) -> Objective:
        """An objective with a policy gradient; a user's own loss is checked on a tiny batch."""
        file = PluginFile.of(loss.kind)
        if loss.kind not in LOSSES:
            load_loss(loss.kind, loss.options, file)
        return Objective(
            loss=loss,
            kl=kl,
            offpolicy=offpolicy,
            distill=distill or DistillConfig(),
            temperature=temperature,
            file=file,
        )

    @staticmethod
    def sft() -> Objective:
        return Objective(loss=None)

    @property
    def on_samples(self) -> bool:
        """Whether the tokens were sampled, so that the batch has behaviour log-probs."""
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
            self.needs_reference
            or self.distill.on_distributions
            or self.loss.entropy_coef
            or self.loss.tau
            or self.loss.nll_coef
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
    if objective.on_samples:
        _refuse_infinite_advantages(batch)
    old = behaviour if old_logp is None or not objective.needs_old_logp else old_logp
    weights, importance, metrics = _corrected_weights(objective, batch, old)
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
    # masked tokens may have any value, NaN included, and 0 * NaN would spread
    rows = {name: np.where(trains, row, 0.0) for name, row in rows.items()}
    rows["length"] = (
        np.maximum(np.bincount(ids, weights=mask), 1.0)[ids] if len(ids) else np.zeros(0)
    )
    return BatchLoss(objective, rows, mask, trains, ids, device, metrics)


def _refuse_infinite_advantages(batch: Batch) -> None:
    advantages = batch.advantages_T[batch.loss_mask_T]
    if count := int((~np.isfinite(advantages)).sum()):
        raise ValueError(
            f"{count} of {len(advantages)} loss tokens have an advantage that is not finite; check"
            " the size of the rewards, and with a critic its values (critic/values/*,"
            " critic/grad_norm)"
        )


def _corrected_weights(
    objective: Objective, batch: Batch, old: Array
) -> tuple[Array, Array, dict[str, float]]:
    """The tokens' weights [T], the same times the off-policy correction [T], and the correction's
    metrics. old: [T] log-probs under the old policy."""
    if not (objective.on_samples and objective.offpolicy.active):
        return batch.weights_T, batch.weights_T, {}
    corrected = correction(
        old,
        batch.behaviour_logp_T,
        batch.loss_mask_T,
        batch.sequence_ids_T,
        objective.offpolicy,
    )
    weights = batch.weights_T
    if objective.loss is not None and objective.loss.denominator == "kept":
        weights = renormalised(weights, corrected.kept)
    return weights, weights * corrected.weights, corrected.metrics


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Chunk:
    """The inputs of a loss's parts for n tokens; weights are 0 where a token does not train."""

    logp: Tensor
    batch: TokenBatch
    trains: Tensor
    weights: Tensor
    importance: Tensor
    """The weights times the off-policy correction: those of the policy gradient."""
    imitation: Tensor | None
    """The weights of cross entropy on correct answers; None without that part."""

    def where_trained(self, values: Tensor) -> Tensor:
        return torch.where(self.trains, values, 0.0)


Part = Callable[[_Chunk], TokenTerms]


class BatchLoss:
    """The loss of one batch; `metrics` has those that are known before any pass."""

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
            self._user = load_loss(loss.kind, loss.options, objective.file)
        coupled = loss is not None and (
            loss.ratio_level != "token" or objective.offpolicy.opsm_delta is not None
        )
        self.whole_sequences = coupled or (self._user is not None and self._user.whole_sequences)
        self.needs_entropy = loss is not None
        """True for RL: the entropy is always logged, since it costs no product;
        `loss.entropy_coef` says whether it is also trained."""
        self.clips_by_advantage = loss is not None and loss.kind == "ppo_clip"
        """Whether a token of advantage 0 is never clipped, which is then known also of tokens left
        out of the passes."""
        self._parts = self._parts_of(loss, rows)
        self._rows = rows
        self._device = device
        self._on_device: dict[torch.dtype, dict[str, Tensor]] = {}
        self._mask = torch.from_numpy(np.ascontiguousarray(mask)).to(device)
        self._trains = torch.from_numpy(np.ascontiguousarray(trains)).to(device)
        self._sequence = torch.from_numpy(np.ascontiguousarray(sequence_ids).astype(np.int64)).to(
            device
        )

    def _parts_of(self, loss: LossConfig | None, rows: dict[str, Array]) -> list[Part]:
        """The parts of the loss. A KL to the teachers' whole distributions is not among them: it
        needs logits, and `Policy` adds it."""
        if loss is None:
            return [lambda chunk: weighted(nll(chunk.logp), chunk.weights)]
        parts: list[Part] = [partial(self._policy_gradient, loss)]
        if "reference_logp" in rows:
            parts.append(partial(_kl_to_reference, self.objective.kl))
        if "imitation" in rows:
            parts.append(partial(_imitation, loss.nll_coef))
        return [*parts, partial(_entropy_bonus, loss.entropy_coef)]

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        chunk, bad = self._chunk(stats, index)
        terms = reduce(_plus, [part(chunk) for part in self._parts])
        metrics = {name: chunk.where_trained(value) for name, value in terms.metrics.items()}
        metrics |= {"actor/nonfinite_logp": bad, COUNTED: chunk.trains.to(bad.dtype)}
        # a sequence-level ratio gives its masked tokens a derivative, too
        dlogp = chunk.where_trained(terms.dlogp)
        return TokenTerms(loss=terms.loss, dlogp=dlogp, dentropy=terms.dentropy, metrics=metrics)

    def _chunk(self, stats: TokenStats, index: Tensor) -> tuple[_Chunk, Tensor]:
        """The chunk of these tokens, and 1 for each [n] whose log-prob is not finite."""
        rows = {name: row[index] for name, row in self._tensors(stats.logp.dtype).items()}
        sequence = self._sequence[index]
        trains = self._trains[index] & torch.isfinite(stats.logp)
        bad = (self._mask[index] & ~trains).to(stats.logp.dtype)
        if self.whole_sequences and len(sequence):
            broken = bad.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, bad)
            trains = trains & (broken[sequence] == 0)

        def weights(name: str) -> Tensor:
            return torch.where(trains, rows.pop(name), 0.0)

        shares = weights("weights"), weights("importance")
        imitation = weights("imitation") if "imitation" in rows else None
        chunk = _Chunk(
            logp=torch.where(trains, stats.logp, rows["old_logp"]),
            batch=TokenBatch(sequence=sequence, entropy=stats.entropy, **rows),
            trains=trains,
            weights=shares[0],
            importance=shares[1],
            imitation=imitation,
        )
        return chunk, bad

    def _tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The batch's arrays on the device, in the dtype of the head's log-probs, which is not
        known before the first call."""
        if dtype not in self._on_device:
            self._on_device[dtype] = {
                name: torch.from_numpy(np.ascontiguousarray(row)).to(dtype).to(self._device)
                for name, row in self._rows.items()
            }
        return self._on_device[dtype]

    def _policy_gradient(self, loss: LossConfig, chunk: _Chunk) -> TokenTerms:
        logp, batch, weights = chunk.logp, chunk.batch, chunk.importance
        delta = self.objective.offpolicy.opsm_delta
        metrics = {"actor/ppo_kl": bounded(batch.old_logp - logp)[0]}
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


def _kl_to_reference(kl: KLConfig, chunk: _Chunk) -> TokenTerms:
    batch = chunk.batch
    assert batch.reference_logp is not None
    old_logp = batch.old_logp if kl.unbiased else None
    estimate = kl_penalty(
        chunk.logp, batch.reference_logp, kl.estimator, old_logp=old_logp, bound=kl.bound
    )
    penalty = weighted(estimate, chunk.weights)
    return TokenTerms(
        loss=kl.coef * penalty.loss,
        dlogp=kl.coef * penalty.dlogp,
        metrics={"actor/kl_loss": penalty.loss},
    )


def _imitation(coef: float, chunk: _Chunk) -> TokenTerms:
    """Cross entropy on correct answers; `coef` is in its weights already."""
    assert chunk.imitation is not None
    terms = weighted(nll(chunk.logp), chunk.imitation)
    return TokenTerms(
        loss=terms.loss, dlogp=terms.dlogp, metrics={"actor/nll_loss": terms.loss / coef}
    )


def _entropy_bonus(coef: float, chunk: _Chunk) -> TokenTerms:
    """-coef times the entropy; with a coefficient of 0 only its metrics, and without an entropy not
    even these."""
    nothing = torch.zeros_like(chunk.logp)
    if chunk.batch.entropy is None:
        assert not coef
        return TokenTerms(loss=nothing, dlogp=nothing)
    entropy = chunk.where_trained(chunk.batch.entropy)
    slope = -coef * chunk.weights
    return TokenTerms(
        loss=slope * entropy if coef else nothing,
        dlogp=nothing,
        dentropy=slope if coef else None,
        metrics={
            "actor/entropy": chunk.weights * entropy,
            "actor/entropy_per_token": entropy,
        },
    )


def _plus(terms: TokenTerms, more: TokenTerms) -> TokenTerms:
    return TokenTerms(
        loss=terms.loss + more.loss,
        dlogp=terms.dlogp + more.dlogp,
        dentropy=terms.dentropy if more.dentropy is None else more.dentropy,
        metrics={**terms.metrics, **more.metrics},
    )
