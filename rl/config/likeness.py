"""The settings with which emberl trains as verl's or TRL's defaults do. Loads no torch.

`emberl train CONFIG --dry-run --like verl` prints them for one configuration. Where a peer has no
such algorithm, or where emberl has no such setting, nothing is claimed: see the notes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .cautions import shown

if TYPE_CHECKING:
    from .load import Config

Peer = Literal["verl", "trl"]
PEERS: tuple[Peer, ...] = ("verl", "trl")


def differences(config: Config, peer: Peer) -> dict[str, tuple[Any, Any]]:
    """key -> (what the configuration says, what the peer's default is), where these differ."""
    wanted = _verl(config) if peer == "verl" else _trl(config)
    different = {}
    for key, value in wanted.items():
        group, _, name = key.partition(".")
        now = getattr(getattr(config, group), name)
        if now != value:
            different[key] = (now, value)
    return different


def overrides(config: Config, peer: Peer) -> list[str]:
    """The `key=value` overrides with which this configuration has the peer's defaults."""
    return [f"{key}={shown(value)}" for key, (_, value) in differences(config, peer).items()]


def describe(config: Config, peer: Peer) -> str:
    """The text of `--dry-run --like`: an override a line with the value that it replaces, then the
    peer's defaults that no setting reproduces."""
    different = differences(config, peer)
    lines = [f"# overrides that give {config.algorithm} the defaults of {peer}:"]
    lines += [
        f"{key}={shown(value)}  # here {shown(now)}" for key, (now, value) in different.items()
    ]
    return "\n".join([*lines, *(f"# not reproduced: {note}" for note in notes(config, peer))])


def notes(config: Config, peer: Peer) -> list[str]:
    """Lines on the defaults of a peer for which emberl has no setting."""
    lines = []
    if peer == "verl" and config.loss.kind == "dppo_tv":
        lines.append("verl truncates the ratio of dppo_tv under a stop-gradient")
    if peer == "verl" and config.algorithm in ("k1_5", "k2_5", "topr", "vapo"):
        lines.append(f"verl has no {config.algorithm}")
    if peer == "trl" and config.algorithm in (
        "k1_5",
        "k2_5",
        "topr",
        "vapo",
        "dppo_tv",
        "gpg",
        "reinforce_pp",
        "ppo",
    ):
        lines.append(f"TRL's GRPOTrainer has no {config.algorithm}")
    if config.rollout.group_size > 1 and peer == "verl":
        lines.append("verl's rollout.n is 1 by default; every recipe sets it")
    return lines


def _common(config: Config) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "offpolicy.old_logp": "recompute",
        "optim.betas": (0.9, 0.999),
        "optim.lr": 1e-6,
    }
    wanted |= {"optim.grad_clip": 1.0, "optim.warmup_steps": 0}
    if not config.filter.dynamic_sampling:
        wanted["filter.zero_variance"] = False
    return wanted


def _verl(config: Config) -> dict[str, Any]:
    """verl's ppo_trainer.yaml, actor.yaml and fsdp.yaml (August 2026)."""
    loss, wanted = config.loss, _common(config)
    wanted |= {"optim.weight_decay": 0.01, "optim.schedule": "constant", "schedule.minibatches": 4}
    if config.algorithm in ("grpo", "rloo"):
        wanted["loss.aggregation"] = "token-mean"
    if loss.kind == "reinforce" and config.algorithm == "rloo":
        wanted |= {"loss.kind": "ppo_clip"}
    if wanted.get("loss.kind", loss.kind) == "ppo_clip" and loss.ratio_level == "token":
        wanted["loss.dual_clip"] = 3.0
    if loss.kind == "cispo":
        wanted |= {"loss.clip_low": 0.2, "loss.clip_high": 0.2}
    if config.algorithm == "gpg":
        wanted |= {"advantage.rescale": "nonzero-score", "schedule.minibatches": 1}
    if config.kl.place == "reward":
        wanted["kl.estimator"] = "k1"
    if config.advantage.needs_critic:
        wanted |= {"critic.lr": 1e-5, "critic.clip": 0.5, "critic.warmup": 0}
    return wanted


def _trl(config: Config) -> dict[str, Any]:
    """TRL's GRPOConfig (loss_type=dapo, scale_rewards=group, sampling corrected by a mask over
    sequences)."""
    wanted = _common(config) | {"optim.weight_decay": 0.0, "optim.schedule": "linear"}
    if config.algorithm == "grpo":
        wanted["loss.aggregation"] = "token-mean"
    if config.advantage.std != "none":
        wanted["advantage.eps"] = 1e-4
    if config.kl.active:
        wanted["kl.bound"] = None
    wanted |= {
        "offpolicy.weight": "sequence",
        "offpolicy.mode": "mask",
        "offpolicy.low": 0.0,
        "offpolicy.high": 3.0,
    }
    return wanted
