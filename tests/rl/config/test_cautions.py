"""Settings that would not train are refused, doubtful ones are said, and so is what a file changes
of its preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.cautions import cautions, changes, said_at_start
from emberl.rl.config.likeness import PEERS, Peer, describe, differences, overrides
from emberl.rl.config.load import Config, ConfigError, load_config, resolve
from emberl.rl.config.presets import PRESETS

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def config(line: str = "") -> Config:
    return load_config(QUICKSTART, line.split())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_the_quickstart_is_the_algorithm_that_it_names(name: str) -> None:
    assert changes(config(f"algorithm={name}")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "algorithm=gspo loss.aggregation=token-mean",
            ["loss.aggregation=token-mean overrides gspo's seq-mean-token-mean"],
        ),
        ("algorithm=gspo schedule.minibatches=1", ["schedule.minibatches=1 overrides gspo's 4"]),
        ("loss.dual_clip=3", ["loss.dual_clip=3 overrides grpo's null"]),
        (
            "kl.place=loss kl.coef=0.01",
            ["kl.place=loss overrides grpo's none", "kl.coef=0.01 overrides grpo's 0.001"],
        ),
        ("algorithm=vapo critic.warmup=5 critic.lr=1e-4", ["critic.warmup=5 overrides vapo's 50"]),
        (
            "algorithm=dapo filter.dynamic_sampling=no",
            ["filter.dynamic_sampling=false overrides dapo's true"],
        ),
        ("loss.clip_low=0.2 schedule.epochs=2 optim.lr=1e-3", []),
    ],
)
def test_what_a_file_changes_of_its_preset(line: str, expected: list[str]) -> None:
    assert changes(config(line)) == expected
    assert said_at_start(config(line))[: len(expected)] == [f"note: {each}" for each in expected]


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_clips_against_the_learners_own_policy(name: str) -> None:
    found = config(f"algorithm={name}")
    assert (found.offpolicy.old_logp, found.schedule.minibatches, found.updates) == (
        "recompute",
        4,
        240,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stages=[]", "stages=[] must name sft, rl or both, each once"),
        ("stages=[rl,rl]", "stages=[rl,rl] must name"),
        ("stages=[sft,rl,sft]", "stages=[sft,rl,sft] must name"),
        *(
            (
                f"algorithm={name} rollout.group_size=1",
                "rollout.group_size=1 leaves an answer nothing to be compared with",
            )
            for name in ("grpo", "rloo", "dapo", "reinforce_pp_baseline")
        ),
        ("rollout.temperature=0", "rollout.temperature=0 draws the same answer every time"),
        (
            "algorithm=ppo rollout.temperature=1e-6",
            "rollout.temperature=1e-06 draws the same answer every time",
        ),
        (
            "algorithm=vapo schedule.steps=50",
            "critic.warmup=50 trains the critic alone for all of schedule.steps=50",
        ),
        (
            "algorithm=ppo critic.warmup=60",
            "critic.warmup=60 trains the critic alone for all of schedule.steps=60",
        ),
        (
            "rollout.top_p=0.95",
            "rollout.top_p=0.95: the engine samples from a changed distribution",
        ),
        ("rollout.top_k=20", "Set offpolicy.old_logp=recompute, or leave rollout.top_k out"),
        (
            "rollout.min_p=0.1 rollout.top_k=4",
            "rollout.top_k=4, rollout.min_p=0.1: the engine samples from",
        ),
        (
            "rollout.repetition_penalty=1.1",
            "rollout.repetition_penalty=1.1: the engine samples from a changed",
        ),
        (
            "rollout.repetition_penalty=1.1 offpolicy.old_logp=recompute offpolicy.opsm_delta=0.1",
            "leave these out",
        ),
        (
            "rollout.top_p=0.95 offpolicy.old_logp=recompute offpolicy.weight=token",
            "would take the change for a difference of policies; leave rollout.top_p out",
        ),
        (
            "algorithm=rloo schedule.epochs=4",
            "with schedule.epochs=4 the two differ; set loss.kind=ppo_clip",
        ),
        ("algorithm=gpg schedule.minibatches=2", "with schedule.minibatches=2 the two differ"),
        ("algorithm=rloo schedule.max_staleness=8", "with schedule.max_staleness=8 the two differ"),
        ("reward.parts.answer.weight=0", "no part of the reward has a weight"),
        (
            (
                "offpolicy.old_logp=recompute offpolicy.weight=token offpolicy.mode=mask"
                " offpolicy.low=1.5"
            ),
            (
                "offpolicy.low=1.5 and offpolicy.high=2 reject tokens on which engine and learner"
                " agree"
            ),
        ),
        (
            "offpolicy.old_logp=recompute offpolicy.seq_mask_high=0.9",
            "reject sequences on which engine and learner agree",
        ),
    ],
)
def test_settings_that_cannot_train_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(line)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "algorithm=ppo rollout.group_size=1",
        "algorithm=reinforce_pp rollout.group_size=1",
        "rollout.top_p=0.95 offpolicy.old_logp=recompute",
        "algorithm=rloo rollout.top_p=0.95",
        "rollout.min_p=0.1 rollout.repetition_penalty=1.1 offpolicy.old_logp=recompute",
        "stages=[sft] rollout.min_p=0.1",
        "eval.top_p=0.95 eval.top_k=20 eval.min_p=0.1 eval.repetition_penalty=1.2",
        "algorithm=rloo schedule.epochs=4 loss.kind=ppo_clip",
        (
            "algorithm=rloo schedule.max_staleness=2 offpolicy.old_logp=recompute"
            " offpolicy.weight=token"
        ),
        "stages=[sft] rollout.group_size=1 rollout.temperature=0",
        "schedule.steps=0 rollout.temperature=0",
        "eval.temperature=0",
    ],
)
def test_settings_that_can_train_are_not(line: str) -> None:
    assert config(line).name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("algorithm=vapo", "critic.warmup=50 leaves the policy 10 of schedule.steps=60 to train"),
        ("schedule.steps=5", "optim.warmup_steps=5 is the whole of the 5 updates"),
        ("schedule.steps=1 optim.warmup_steps=1", "the only update has the rate 0"),
        ("sft.steps=20", "sft.warmup_steps=20 is the whole of sft.steps=20"),
        ("optim.lr=1e-12", "optim.lr=1e-12 is too small to move a float32 weight"),
        (
            "schedule.minibatches=65",
            "schedule.minibatches=65 is more than schedule.prompts_per_step=64",
        ),
        (
            "algorithm=gspo schedule.max_staleness=2",
            "takes the newest weights for the policy that sampled",
        ),
        ("kl.place=loss kl.coef=0", "kl.place=loss with kl.coef=0 penalises nothing"),
        (
            "kl.ref_refresh_steps=10",
            "kl.ref_refresh_steps=10 without a KL penalty refreshes nothing",
        ),
        (
            "algorithm=gspo offpolicy.old_logp=rollout",
            "many sequences are clipped before the policy has moved",
        ),
        ("algorithm=gspo schedule.minibatches=1", "no sequence is ever clipped"),
        (
            "loss.clip_low=0 loss.clip_high=0 schedule.epochs=2",
            "clip whatever moves away from the old policy at once",
        ),
    ],
)
def test_doubtful_settings_are_said(line: str, expected: str | None) -> None:
    found = cautions(config(line))
    assert found == [] if expected is None else [expected in each for each in found] == [True]
    assert [f"warning: {each}" for each in found] == said_at_start(config(line))[
        len(changes(config(line))) :
    ]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", PRESETS)
def test_the_overrides_that_give_a_peers_defaults_do(name: str, peer: Peer) -> None:
    """They load, and nothing is left to change."""
    start = f"algorithm={name} critic.warmup=5"
    like = overrides(config(start), peer)
    assert differences(config(" ".join([start, *like])), peer) == {}
    assert [
        line.split("  #")[0]
        for line in describe(config(start), peer).splitlines()
        if "=" in line.split("#")[0]
    ] == like


@pytest.mark.parametrize(
    ("line", "peer", "expected"),
    [
        (
            "",
            "verl",
            {"loss.dual_clip": 3.0, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.01},
        ),
        (
            "",
            "verl",
            {
                "offpolicy.old_logp": "recompute",
                "schedule.minibatches": 4,
                "loss.aggregation": "token-mean",
            },
        ),
        ("algorithm=rloo", "verl", {"loss.kind": "ppo_clip", "loss.dual_clip": 3.0}),
        ("algorithm=cispo", "verl", {"loss.clip_low": 0.2, "loss.clip_high": 0.2}),
        ("algorithm=ppo kl.place=reward", "verl", {"kl.estimator": "k1"}),
        (
            "",
            "trl",
            {"advantage.eps": 1e-4, "optim.schedule": "linear", "offpolicy.weight": "sequence"},
        ),
        ("kl.place=loss", "trl", {"kl.bound": None}),
    ],
)
def test_what_differs_from_a_peer(line: str, peer: Peer, expected: dict[str, Any]) -> None:
    found = {key: value for key, (_, value) in differences(config(line), peer).items()}
    assert found.items() >= expected.items()


def test_a_configuration_without_an_algorithm_is_grpo() -> None:
    tree = {"name": "t", "model": {"path": "x"}, "data": {"source": "arithmetic"}}
    assert changes(resolve(tree)) == [] and resolve(tree).algorithm == "grpo"
