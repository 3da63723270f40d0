"""The settings of an algorithm: five orthogonal groups that a preset fills and a file overrides.
Loads no torch.

Each default is one of the places where implementations silently differ; the field says which way
was taken, and which value reproduces verl, TRL or OpenRLHF.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .base import Settings

LOSSES = ("ppo_clip", "cispo", "reinforce", "sapo", "dppo_tv", "topr", "k1_5", "k2_5")
MOST = 1e6
"""The largest coefficient: beyond it float32 does not hold the loss."""
ADVANTAGES = ("group", "return", "gae")
LOSS_PLUGINS, ADVANTAGE_PLUGINS = "emberl.losses", "emberl.advantages"

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
RatioLevel = Literal["token", "sequence", "sequence-token", "trajectory"]
Estimator = Literal["k1", "k2", "k3", "k3+"]

_LEVELS: Mapping[str, tuple[RatioLevel, ...]] = {
    "ppo_clip": ("token", "sequence", "sequence-token", "trajectory"),
    "sapo": ("token", "sequence", "sequence-token", "trajectory"),
    "cispo": ("token", "sequence", "trajectory"),
    "topr": ("token", "sequence", "trajectory"),
    "k1_5": ("trajectory",),
}


def _known(key: str, value: str, built_in: tuple[str, ...], group: str) -> str:
    """`value`, if it is built in, a path to a function, or an entry point of `group`. Raises
    ValueError with the nearest name otherwise."""
    if value in built_in or ":" in value:
        return value
    names = sorted({*built_in, *(point.name for point in entry_points(group=group))})
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, 1)
    raise ValueError(
        f"there is no {key} {value!r}{f'; did you mean {near[0]!r}?' if near else ''} (known:"
        f" {', '.join(names)}; your own: package.module:function, ./file.py:function, or an entry"
        f" point of the group {group})"
    )


class AdvantageConfig(Settings):
    """The advantage estimator: how much better than expected a completion, or a token, was."""

    kind: str = "group"
    """`group`: score minus the group's mean. `return`: the return to go of token rewards, without a
    baseline (REINFORCE++). `gae`: generalised advantage estimation with a critic (PPO, VAPO). Or a
    function of yours: `package.module:function`, `./file.py:function`, an entry point of the group
    `emberl.advantages`."""
    leave_one_out: bool = False
    """The mean is over the *other* completions of the group (RLOO): G / (G - 1) times the plain
    difference."""
    std: Literal["none", "group", "batch"] = "group"
    """What the difference is divided by: nothing (Dr.GRPO), the standard deviation of the group's
    scores (GRPO), or that of all scores of the step (LitePPO; TRL's scale_rewards=batch)."""
    std_unbiased: bool = True
    """Standard deviation with G - 1 (verl, TRL) or with G. At G = 2 this is a factor of 1.41."""
    eps: float = Field(default=1e-6, ge=0, le=1)
    """Added to the standard deviation: 1e-6 in verl, 1e-4 in TRL, 1e-9 in OpenRLHF."""
    rescale: Literal["none", "signal", "nonzero-score"] = "none"
    """GPG's factor for completions that teach nothing: B / (B - those in groups of equal scores) as
    in the paper, or B / (those with a score other than 0) as in verl. Without effect where such
    groups were filtered beforehand."""
    whiten: bool = False
    """Shift and scale to mean 0 and variance 1 over all loss tokens of the step (REINFORCE++,
    PPO)."""
    whiten_unbiased: bool = True
    """Variance with N - 1 (verl) or N (OpenRLHF); 1e-8 is added to it."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token of `return` and `gae`."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """Lambda of `gae` for the policy."""
    lam_critic: float | None = Field(default=None, ge=0, le=1)
    """Lambda of the critic's targets (VAPO: 1.0); empty: `lam`."""
    vapo_alpha: float | None = Field(default=None, gt=0)
    """VAPO's length-adaptive lambda of the policy, 1 - 1 / (alpha * length), instead of `lam`
    (paper: 0.05)."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Keywords of a function of yours."""

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known("advantage", value, ADVANTAGES, ADVANTAGE_PLUGINS)

    @model_validator(mode="after")
    def _fits(self) -> AdvantageConfig:
        if self.kind != "gae" and (self.lam_critic is not None or self.vapo_alpha is not None):
            raise ValueError(
                "advantage.lam_critic and advantage.vapo_alpha need advantage.kind=gae, not"
                f" {self.kind}"
            )
        if self.kind in ("return", "gae") and (self.leave_one_out or self.rescale != "none"):
            raise ValueError(
                "advantage.leave_one_out and advantage.rescale compare completions of a group, "
                f"advantage.kind={self.kind} does not; set advantage.kind=group"
            )
        if self.options and self.kind in ADVANTAGES:
            raise ValueError(
                f"advantage.options is for a function of yours, advantage.kind={self.kind} takes"
                " none"
            )
        return self

    @property
    def needs_critic(self) -> bool:
        return self.kind == "gae"

    @property
    def per_token(self) -> bool:
        """Whether advantages are per token: `batch_advantages` computes them from the packed batch.
        Until then an advantage of 0 does not mean that a completion has no gradient."""
        return self.kind in ("return", "gae") or self.whiten


class LossConfig(Settings):
    """The policy loss and its regularisers."""

    kind: str = "ppo_clip"
    """ppo_clip (PPO, GRPO, DAPO; GSPO with `ratio_level`), cispo, reinforce (RLOO, GPG), sapo,
    dppo_tv, topr, k1_5 or k2_5. Or a function of yours: `package.module:function`,
    `./file.py:function`, an entry point of `emberl.losses`."""
    ratio_level: RatioLevel = "token"
    """Whose probability ratio: each token's; the sequence's geometric mean (GSPO); its value with
    each token's own derivative (GSPO-token, which is what verl calls gspo); the product over the
    sequence (k1_5, TOPR as in the paper)."""
    clip_low: float = Field(default=0.2, ge=0)
    """The ratio is held above 1 - clip_low; 1.0: no lower bound. In dppo_tv: the largest fall of a
    probability."""
    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is held below 1 + clip_high. It is a distance from 1 also in cispo, where TRL's
    epsilon_high=5.0 is the bound itself: write 4.0. In dppo_tv: the largest rise of a
    probability."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound c of ppo_clip's loss where the advantage is negative: at most -c A. Empty: off, as in
    the papers and TRL; verl: 3.0."""
    tau: float = Field(default=0.0, ge=0, le=MOST)
    """Weight of the squared log-ratio in k1_5, k2_5 and dppo_tv."""
    sapo_tau_positive: float = Field(default=1.0, gt=0)
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_tau_negative: float = Field(default=1.05, gt=0)
    """Steepness of sapo's gate elsewhere."""
    aggregation: Aggregation = "token-mean"
    """How tokens add up, always over the whole step: token-mean (DAPO), seq-mean-token-mean (GRPO),
    seq-mean-token-sum, seq-mean-token-sum-norm (Dr.GRPO: that divided by `norm_const`)."""
    norm_const: float | None = Field(default=None, gt=0)
    """The constant of seq-mean-token-sum-norm; empty: rollout.max_response_length."""
    denominator: Literal["all", "kept"] = "all"
    """What a mean divides by once off-policy masks have rejected tokens: the count before (AReaL,
    TRL, OpenRLHF), or what was kept, so that kept tokens weigh more (as in code that narrows its
    loss mask first)."""
    entropy_coef: float = Field(default=0.0, ge=0, le=MOST)
    """Weight of the entropy bonus, averaged like the loss over the whole step."""
    nll_coef: float = Field(default=0.0, ge=0, le=MOST)
    """Weight of VAPO's imitation term: the mean negative log-likelihood of the tokens of correct
    answers (paper: 0.1)."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Keywords of a function of yours."""

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return _known("loss", value, LOSSES, LOSS_PLUGINS)

    @model_validator(mode="after")
    def _fits(self) -> LossConfig:
        levels = _LEVELS.get(self.kind, ("token",))
        if self.ratio_level not in levels:
            raise ValueError(
                f"loss.ratio_level={self.ratio_level} does not go with loss.kind={self.kind}; set"
                f" {' or '.join(levels)}"
            )
        if self.clip_low > 1:
            raise ValueError(
                f"loss.clip_low={self.clip_low} would let the ratio below 0; 1.0 means no lower"
                " bound"
            )
        if self.dual_clip is not None and self.kind != "ppo_clip":
            raise ValueError(
                f"loss.dual_clip={self.dual_clip} belongs to loss.kind=ppo_clip, not {self.kind};"
                " remove it"
            )
        if self.tau and self.kind not in ("k1_5", "k2_5", "dppo_tv"):
            raise ValueError(
                f"loss.tau={self.tau} belongs to k1_5, k2_5 and dppo_tv, not {self.kind}; remove it"
            )
        if self.norm_const is not None and self.aggregation != "seq-mean-token-sum-norm":
            raise ValueError(
                f"loss.norm_const={self.norm_const} needs loss.aggregation=seq-mean-token-sum-norm"
            )
        if self.denominator == "kept" and not self.aggregation.endswith("-mean"):
            raise ValueError(
                "loss.denominator=kept needs a mean over tokens; with"
                f" loss.aggregation={self.aggregation} set it to all"
            )
        if self.options and self.kind in LOSSES:
            raise ValueError(
                f"loss.options is for a function of yours, loss.kind={self.kind} takes none"
            )
        return self


class KLConfig(Settings):
    """A penalty for moving away from a frozen reference policy. No preset sets it: a reference
    costs a model's memory and a pass, and recipes for reasoning mostly do without."""

    place: Literal["none", "loss", "reward"] = "none"
    """In the loss (GRPO), or in the rewards of tokens (PPO, REINFORCE++; with advantage.kind=return
    or gae)."""
    estimator: Estimator = "k3"
    """Of l = log(policy / reference): k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l (GRPO); `k3+`
    (verl) has the value of k3 and the derivative of k2. As a loss k1 has a gradient of mean 0
    unless `unbiased` is set. In the reward verl and OpenRLHF take k1."""
    bound: float | None = Field(default=10.0, gt=0)
    """k3 and k3+ of a token are at most this, and k3 has no gradient beyond (verl, AReaL, NeMo-RL:
    10, which is reached where the reference gives a token 13.6 times the policy's probability).
    Empty: free, as in TRL, but for l within +-20."""
    coef: float = Field(default=0.001, ge=0, le=MOST)
    """Weight of the penalty."""
    unbiased: bool = False
    """Multiplies the estimate by policy / old policy and differentiates that too (DeepSeek-V3.2):
    the gradient is then right for tokens of an older policy also."""
    ref_refresh_steps: int = Field(default=0, ge=0)
    """The reference becomes the policy every so many steps (R1-Zero: 400); 0: never."""

    @model_validator(mode="after")
    def _fits(self) -> KLConfig:
        if self.unbiased and (self.place != "loss" or self.estimator == "k3+"):
            raise ValueError(
                "kl.unbiased=true needs kl.place=loss and kl.estimator=k1, k2 or k3; "
                f"here they are {self.place} and {self.estimator}"
            )
        return self

    @property
    def active(self) -> bool:
        return self.place != "none" and self.coef > 0


class OffPolicyConfig(Settings):
    """Off-policy correction for tokens that another policy than the learner's sampled: an older
    one, or another engine's rounding. The importance weight w = exp(old log-prob - rollout
    log-prob) multiplies the policy-gradient term, never KL or entropy."""

    old_logp: Literal["rollout", "recompute"] = "rollout"
    """The old policy of the ratio: the engine's log-probs (verl's bypass), or one more pass of the
    learner, in which case w corrects for the engine (decoupled PPO with `weight: token`)."""
    weight: Literal["none", "token", "sequence", "geometric"] = "none"
    """w of each token; the product over its sequence; the geometric mean of its sequence."""
    mode: Literal["truncate", "mask"] = "truncate"
    """A weight outside [low, high] is cut to it (TIS), or becomes 0 (MIS; IcePop: token, 0.5,
    5.0)."""
    low: float = Field(default=0.0, ge=0)
    """The smallest weight, or the smallest that is not masked (OpenRLHF: 0.5)."""
    high: float = Field(default=2.0, gt=0)
    """The largest weight, or the largest that is not masked (verl: 2.0; IcePop: 5.0)."""
    seq_mask_low: float | None = Field(default=None, ge=0)
    """A sequence whose geometric mean of w is outside [seq_mask_low, seq_mask_high] is dropped;
    empty: no bound."""
    seq_mask_high: float | None = Field(default=None, gt=0)
    """The upper bound of the same."""
    opsm_delta: float | None = Field(default=None, gt=0)
    """DeepSeek-V3.2's off-policy sequence mask: a sequence of negative advantage is dropped once
    the mean of log(rollout / policy) over its tokens exceeds this (TRL suggests 0.5)."""

    @model_validator(mode="after")
    def _fits(self) -> OffPolicyConfig:
        if self.low > self.high:
            raise ValueError(
                f"offpolicy.low={self.low} is above offpolicy.high={self.high}; exchange them"
            )
        low, high = self.seq_mask_low, self.seq_mask_high
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"offpolicy.seq_mask_low={low} is above offpolicy.seq_mask_high={high}; exchange"
                " them"
            )
        if self.old_logp == "rollout" and (
            self.weight != "none" or low is not None or high is not None
        ):
            raise ValueError(
                "offpolicy.weight and offpolicy.seq_mask_* compare the old policy with the"
                " rollouts', which are the same with offpolicy.old_logp=rollout (the ratio already"
                " corrects); set offpolicy.old_logp=recompute"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether `correction` returns anything but ones."""
        return (
            self.weight != "none" or self.seq_mask_low is not None or self.seq_mask_high is not None
        )


class FilterConfig(Settings):
    """Selection of the samples that train."""

    zero_variance: bool = True
    """Drop groups whose scores are all equal: group-relative advantages are 0 there, and the mean
    is then over groups that have a signal."""
    dynamic_sampling: bool = False
    """Ask for further prompts until `schedule.prompts_per_step` groups with a signal are there
    (DAPO)."""
    max_rounds: int = Field(default=10, ge=1)
    """With dynamic_sampling: how often to ask before the step goes on with what there is."""
    overlong_share: float = Field(default=0.0, ge=0, lt=1)
    """DAPO's soft punishment: the score falls by up to `overlong_penalty` over this last share of
    rollout.max_response_length (paper: 4096 of 20480, 0.2); 0: off."""
    overlong_penalty: float = Field(default=1.0, gt=0, le=MOST)
    """The largest punishment."""
    overlong_mask: bool = False
    """A completion that was cut at max_response_length does not train (its score still counts in
    the baseline), nor does it count among the sequences of seq-mean aggregations, whose mean is
    over those that train; TRL and verl count it, so that with one of seven cut their loss is 6/7 of
    ours."""

    @model_validator(mode="after")
    def _fits(self) -> FilterConfig:
        if self.dynamic_sampling and not self.zero_variance:
            raise ValueError(
                "filter.dynamic_sampling=true replaces dropped groups; it needs"
                " filter.zero_variance=true"
            )
        return self


def check_algorithm(advantage: AdvantageConfig, kl: KLConfig, filter: FilterConfig) -> None:
    """Checks the constraints between these groups. Raises ValueError with the keys and the fix."""
    if kl.active and kl.place == "reward" and advantage.kind not in ("return", "gae"):
        raise ValueError(
            f"kl.place=reward needs token rewards, which advantage.kind={advantage.kind} has not; "
            "set kl.place=loss, or advantage.kind=return or gae"
        )
    if filter.zero_variance and advantage.kind in ("return", "gae"):
        raise ValueError(
            "filter.zero_variance=true drops groups of equal scores, which do train with"
            f" advantage.kind={advantage.kind}; set filter.zero_variance=false"
        )
