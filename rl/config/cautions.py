"""Consequences of a configuration that its reader may not expect: errors for settings that cannot
train, warnings for doubtful ones, and notes on the preset's values that a file overrides. Loads no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .algorithm import (
    ADVANTAGES,
    LOSSES,
    AdvantageConfig,
    FilterConfig,
    KLConfig,
    LossConfig,
    OffPolicyConfig,
)
from .base import Settings
from .experiment import Experiment
from .presets import PAPERS, PRESETS, preset

GREEDY = 0.01
"""Temperatures below this sample one answer again and again."""
_GROUPS: Mapping[str, type[Settings]] = {
    "advantage": AdvantageConfig,
    "loss": LossConfig,
    "kl": KLConfig,
    "offpolicy": OffPolicyConfig,
    "filter": FilterConfig,
}


def trains_rl(config: Experiment) -> bool:
    """Whether the run has any RL step."""
    return "rl" in config.stages and (
        config.schedule.steps > 0 or config.schedule.passes is not None
    )


def changes(config: Experiment) -> list[str]:
    """A line for each setting of the algorithm that is not what its preset makes it, e.g.
    `loss.aggregation=token-mean overrides gspo's seq-mean-token-mean`."""
    tree = preset(config.algorithm)
    lines = []
    for group in [*_GROUPS, *(name for name in tree if name not in _GROUPS)]:
        given = getattr(config, group)
        values = tree.get(group, {})
        if group in _GROUPS:
            meant = _GROUPS[group].model_validate(values)
            values = {key: getattr(meant, key) for key in _GROUPS[group].model_fields}
        for key, value in values.items():
            now = getattr(given, key)
            if now != value:
                lines.append(
                    f"{group}.{key}={shown(now)} overrides {config.algorithm}'s {shown(value)}"
                )
    return lines


def describe_presets() -> list[str]:
    """Two lines for each preset: its name with its paper, and the overrides that it stands for."""
    lines = []
    for name, tree in PRESETS.items():
        values = [
            f"{group}.{key}={shown(value)}"
            for group, keys in tree.items()
            for key, value in keys.items()
        ]
        lines += [f"{name}  # {PAPERS[name]}", f"    {' '.join(values)}"]
    return lines


def said_at_start(config: Experiment) -> list[str]:
    """Lines that `--dry-run` and the start of a run print for a person."""
    notes = changes(config)
    if config.schedule.passes is not None:
        notes.append(
            f"schedule.passes={shown(config.schedule.passes)} decides schedule.steps once the data"
            " are counted"
        )
    return [
        *(f"note: {line}" for line in notes),
        *(f"warning: {line}" for line in cautions(config)),
    ]


def shown(value: Any) -> str:
    """A value as one writes it in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(part) for part in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else json.dumps(dict(value))


def refuse_what_cannot_train(config: Experiment) -> None:
    """Raises ValueError for settings with which no weight would ever move, or with which the loss
    would not be the one that it is named after."""
    for check in (_stages, _signal, _critic, _old_policy, _ratio, _masks):
        check(config)


def _stages(config: Experiment) -> None:
    stages = config.stages
    if not stages or len(set(stages)) < len(stages):
        raise ValueError(
            f"stages={shown(stages)} must name sft, rl or both, each once, e.g. stages=[sft,rl]"
        )
    if "reject" in stages and len(stages) > 1:
        raise ValueError(
            f"stages={shown(stages)}: reject goes alone, or as a named stage of a recipe, which"
            " hands its samples on"
        )


def _signal(config: Experiment) -> None:
    """Refuses groups of one answer, which has no baseline, and greedy rollouts, whose answers are
    all the same."""
    if not trains_rl(config):
        return
    rollout, kind = config.rollout, config.advantage.kind
    compares = kind not in ("return", "gae") and not config.distill.active
    if rollout.group_size == 1 and compares:
        raise ValueError(
            "rollout.group_size=1 leaves an answer nothing to be compared with"
            f" (advantage.kind={kind}): every advantage is 0 and nothing trains; set"
            " rollout.group_size=8, or an algorithm without groups, e.g. reinforce_pp or ppo"
        )
    if rollout.temperature < GREEDY:
        raise ValueError(
            f"rollout.temperature={rollout.temperature:g} draws the same answer every time, so"
            " there is nothing to learn from; set rollout.temperature=1.0 (eval.temperature is"
            " that of evaluations)"
        )


def _critic(config: Experiment) -> None:
    warmup, steps = config.critic.warmup, config.schedule.steps
    known = config.schedule.passes is None
    if known and trains_rl(config) and config.advantage.needs_critic and warmup >= steps:
        raise ValueError(
            f"critic.warmup={warmup} trains the critic alone for all of schedule.steps={steps}: the"
            f" policy would never move; set critic.warmup={steps // 10} or more steps"
        )


def _old_policy(config: Experiment) -> None:
    """Refuses the engine's log-probs as the old policy where top_p and the like changed the
    distribution: the learner's log-probs are of the model's own."""
    changed, offpolicy = config.rollout.changed, config.offpolicy
    if not trains_rl(config) or not changed:
        return
    keys = ", ".join(f"rollout.{key}={value:g}" for key, value in changed.items())
    fix = "leave " + ", ".join(f"rollout.{key}" for key in changed) + " out"
    if offpolicy.old_logp == "rollout" and config.loss.kind != "reinforce":
        raise ValueError(
            f"{keys}: the engine samples from a changed distribution, and its log-probs are of that"
            " one, while the learner's are of the model's own: no ratio between them would be"
            " right. Set offpolicy.old_logp=recompute, or " + fix
        )
    if offpolicy.active or offpolicy.opsm_delta is not None:
        raise ValueError(
            f"{keys}: the engine samples from a changed distribution, so that offpolicy.weight,"
            f" seq_mask_* and opsm_delta would take the change for a difference of policies; {fix},"
            " or leave these out"
        )


def _ratio(config: Experiment) -> None:
    """Refuses REINFORCE on tokens of an older policy: it has no ratio, so only importance weights
    could correct for them."""
    schedule, offpolicy = config.schedule, config.offpolicy
    if config.loss.kind != "reinforce" or not trains_rl(config):
        return
    again = {"schedule.epochs": schedule.epochs, "schedule.minibatches": schedule.minibatches}
    stale = (
        {"schedule.max_staleness": schedule.max_staleness + 1} if offpolicy.weight == "none" else {}
    )
    moved = [
        f"{key}={count - (key == 'schedule.max_staleness')}"
        for key, count in (again | stale).items()
        if count > 1
    ]
    if moved:
        raise ValueError(
            f"loss.kind=reinforce (algorithm={config.algorithm}) has no ratio between the policy"
            f" and the one that sampled, but with {', '.join(moved)} the two differ; set"
            " loss.kind=ppo_clip, which is how verl and OpenRLHF run RLOO, or train each answer"
            " once with the weights that sampled it"
        )


def _masks(config: Experiment) -> None:
    """Refuses masks that reject w = 1, i.e. tokens on which engine and learner agree."""
    offpolicy = config.offpolicy
    if (
        offpolicy.weight != "none"
        and offpolicy.mode == "mask"
        and not offpolicy.low <= 1 <= offpolicy.high
    ):
        raise ValueError(
            f"offpolicy.low={offpolicy.low:g} and offpolicy.high={offpolicy.high:g} reject tokens"
            " on which engine and learner agree (w = 1); set bounds around 1, e.g. 0.5 and 5"
        )
    low, high = offpolicy.seq_mask_low, offpolicy.seq_mask_high
    if (low is not None and low > 1) or (high is not None and high < 1):
        raise ValueError(
            f"offpolicy.seq_mask_low={shown(low)} and offpolicy.seq_mask_high={shown(high)} reject"
            " sequences on which engine and learner agree (w = 1); set bounds around 1"
        )


def cautions(config: Experiment) -> list[str]:
    """Warnings, a line each, on settings that train less, or something else, than one may think."""
    lines = [*_cautions_of_schedule(config), *_cautions_of_algorithm(config)]
    sft = config.sft
    known = sft.epochs is None
    if "sft" in config.stages and known and sft.warmup_steps >= sft.steps:
        lines.append(
            f"sft.warmup_steps={sft.warmup_steps} is the whole of sft.steps={sft.steps}: the"
            " learning rate never reaches sft.lr"
        )
    return lines


def _cautions_of_schedule(config: Experiment) -> list[str]:
    if not trains_rl(config):
        return []
    schedule, optim, lines = config.schedule, config.optim, []
    warmup = config.critic.warmup if config.advantage.needs_critic else 0
    known = schedule.passes is None
    if known and 2 * warmup > schedule.steps:
        lines.append(
            f"critic.warmup={warmup} leaves the policy {schedule.steps - warmup} of"
            f" schedule.steps={schedule.steps} to train"
        )
    updates = config.updates - warmup * schedule.minibatches * schedule.epochs
    if known and updates <= optim.warmup_steps:
        lines.append(
            f"optim.warmup_steps={optim.warmup_steps} is the whole of the {updates} updates: the"
            " learning rate never reaches optim.lr"
            + (", and the only update has the rate 0" if updates == 1 else "")
        )
    if optim.lr < 1e-10:
        lines.append(f"optim.lr={optim.lr:g} is too small to move a float32 weight")
    if schedule.minibatches > schedule.prompts_per_step:
        lines.append(
            f"schedule.minibatches={schedule.minibatches} is more than"
            f" schedule.prompts_per_step={schedule.prompts_per_step}: a part holds whole groups, so"
            " there will be fewer updates"
        )
    stale = schedule.max_staleness
    if stale and config.offpolicy.old_logp == "recompute" and config.offpolicy.weight == "none":
        lines.append(
            f"schedule.max_staleness={stale} with offpolicy.old_logp=recompute takes the newest"
            " weights for the policy that sampled; set offpolicy.weight=token to correct for the"
            " older ones"
        )
    return lines


def _cautions_of_algorithm(config: Experiment) -> list[str]:
    if not trains_rl(config):
        return []
    kl, loss, lines = config.kl, config.loss, []
    if config.algorithm == "opd" and not config.distill.active:
        lines.append(
            "algorithm=opd without distill.teachers learns from rewards alone; name a teacher, e.g."
            " distill.teachers.large.path=runs/large/model"
        )
    if kl.place != "none" and kl.coef == 0:
        lines.append(f"kl.place={kl.place} with kl.coef=0 penalises nothing")
    if kl.ref_refresh_steps and not kl.active:
        lines.append(
            f"kl.ref_refresh_steps={kl.ref_refresh_steps} without a KL penalty refreshes nothing"
        )
    once = (
        config.schedule.minibatches == config.schedule.epochs == 1
        and config.schedule.max_staleness == 0
    )
    narrow = loss.kind == "ppo_clip" and loss.ratio_level != "token" and loss.clip_high < 0.01
    if narrow and config.offpolicy.old_logp == "rollout":
        lines.append(
            f"loss.clip_high={loss.clip_high:g} at loss.ratio_level={loss.ratio_level} is narrower"
            " than an engine's rounding: many sequences are clipped before the policy has moved;"
            " set offpolicy.old_logp=recompute"
        )
    elif narrow and once:
        lines.append(
            "one update a step: the policy is the one that sampled, so that no sequence is ever"
            " clipped; GSPO's paper has schedule.minibatches=4"
        )
    unknown = config.advantage.kind not in ADVANTAGES or loss.kind not in LOSSES
    if (
        not unknown
        and loss.kind == "ppo_clip"
        and loss.clip_low == loss.clip_high == 0
        and not once
    ):
        lines.append(
            "loss.clip_low=0 and loss.clip_high=0 clip whatever moves away from the old policy at"
            " once"
        )
    return lines
