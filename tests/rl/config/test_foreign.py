"""Names of verl, TRL and OpenRLHF are answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emberl.rl.config.foreign import PEERS, our_name
from emberl.rl.config.key_reference import NAME
from emberl.rl.config.load import ConfigError, keys, load_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def said(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("rollout.n=8", "rollout.group_size"),
        ("actor_rollout_ref.rollout.n=8", "rollout.group_size"),
        ("+actor_rollout_ref.rollout.n=8", "rollout.group_size"),
        ("data.train_files=[a.parquet]", "data.source"),
        ("trainer.total_epochs=3", "schedule.passes"),
        ("schedule.total_epochs=3", "schedule.passes"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "optim.lr"),
        ("actor.optim.lr=1e-6", "optim.lr"),
        ("num_generations=8", "rollout.group_size"),
        ("num-generations=8", "rollout.group_size"),
        ("beta=0.1", "kl.coef with kl.place=loss"),
        ("n_samples_per_prompt=8", "rollout.group_size"),
        ("algo.kl.init_coef=0.1", "kl.coef"),
        ("optim.learning_rate=1e-5", "optim.lr"),
        ("eval.n_samples_per_prompt=4", "eval.samples"),
        ("algorithm.adv_estimator=grpo", "algorithm"),
        ("reward.custom_reward_function.path=f.py", "reward.parts.answer.use"),
    ],
)
def test_a_peers_name_is_answered_with_ours(name: str, ours: str) -> None:
    key = name.split("=", 1)[0]
    assert f"unknown key {key}: emberl calls it {ours}" in said(name)


def test_what_we_have_no_key_for_says_what_to_do() -> None:
    found = said("gradient_accumulation_steps=4", "actor_rollout_ref.actor.ppo_mini_batch_size=64")
    assert (
        "unknown key gradient_accumulation_steps: the whole step counts: set"
        " schedule.prompts_per_step" in found
    )
    assert "schedule.minibatches is train_batch_size / ppo_mini_batch_size" in found


def test_all_of_a_peers_file_is_answered_at_once() -> None:
    found = said(
        "trainer.total_epochs=3",
        "trainer.nnodes=1",
        "trainer.project_name=x",
        "critic.optim.lr=1e-5",
    )
    assert found.count("unknown key") == 4 and "emberl calls it critic.lr" in found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("critic.warmup_steps=5", "did you mean critic.lr_warmup_steps?"),
        ("rollout.group_sze=8", "did you mean rollout.group_size?"),
        ("checkpoint.foo=1", "checkpoint has every, keep, keep_best, max_failures, history"),
        ("xyzzyq=1", "the top level has name, seed"),
        ("reward.parts.answer.wieght=1", "did you mean reward.parts.answer.weight?"),
    ],
)
def test_a_slip_of_ones_own_is_not_taken_for_a_peers_name(name: str, hint: str) -> None:
    assert hint in said(name)


def test_the_table_names_keys_that_exist_and_none_that_is_ours() -> None:
    known = {key.replace(f".{NAME}.", ".answer.") for key in keys()}
    groups = {key.split(".")[0] for key in known}
    assert sum(len(names) for names in PEERS.values()) > 250
    for names in PEERS.values():
        for name, ours in names.items():
            if ours.startswith("- "):
                assert re.search(r"--resume|[a-z]+\.[a-z_]+|FSDP2", ours), ours
                continue
            for key in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", ours.replace("with kl.place=loss", "")):
                if key in ("and", "or"):
                    continue
                assert key in known or key.startswith("rollout.engine_args."), (name, key)
                assert key.split(".")[0] in groups
            assert name == ours or name not in known or name == "algorithm", (
                f"{name} is a key of ours"
            )


def test_a_name_that_means_two_things_is_not_guessed() -> None:
    assert our_name("optim.lr_warmup_steps") is None or "warmup" in str(
        our_name("optim.lr_warmup_steps")
    )
    assert our_name("n") is None and our_name("path") is None
