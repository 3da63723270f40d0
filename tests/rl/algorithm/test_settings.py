"""Presets expand to valid groups, and a wrong setting says its key, its value and the fix."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from emberl.rl.config.algorithm import (
    AdvantageConfig,
    FilterConfig,
    KLConfig,
    LossConfig,
    OffPolicyConfig,
    check_algorithm,
)
from emberl.rl.config.load import CriticConfig, ScheduleConfig
from emberl.rl.config.presets import PRESETS, preset

GROUPS: dict[str, Any] = {
    "advantage": AdvantageConfig,
    "loss": LossConfig,
    "kl": KLConfig,
    "offpolicy": OffPolicyConfig,
    "filter": FilterConfig,
    "critic": CriticConfig,
    "schedule": ScheduleConfig,
}
NAMES = [
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "gspo_token",
    "cispo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "ppo",
    "vapo",
    "dppo_tv",
    "sapo",
    "k1_5",
    "k2_5",
    "topr",
    "gpg",
    "opd",
]


def test_every_algorithm_of_the_menu_is_a_preset() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_valid_setting_of_its_groups(name: str) -> None:
    tree = preset(name)
    assert set(tree) <= set(GROUPS)
    built: dict[str, Any] = {group: model(**tree.get(group, {})) for group, model in GROUPS.items()}
    for group, values in tree.items():
        assert values == {key: getattr(built[group], key) for key in values}
    check_algorithm(built["advantage"], built["kl"], built["filter"])


@pytest.mark.parametrize(
    ("name", "group", "values"),
    [
        ("dapo", "loss", {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean"}),
        ("gspo", "loss", {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("dr_grpo", "advantage", {"kind": "group", "std": "none"}),
        ("rloo", "advantage", {"leave_one_out": True, "std": "none"}),
        ("vapo", "advantage", {"kind": "gae", "lam_critic": 1.0, "vapo_alpha": 0.05}),
    ],
)
def test_what_names_an_algorithm(name: str, group: str, values: dict[str, Any]) -> None:
    assert preset(name)[group].items() >= values.items()


def test_a_preset_is_the_callers_own() -> None:
    preset("grpo")["loss"]["clip_low"] = 9
    assert preset("grpo")["loss"]["clip_low"] == 0.2


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="algorithm='grop' is no preset; did you mean 'grpo'"):
        preset("grop")
    with pytest.raises(ValueError, match=r"algorithm='xyzzy' is no preset \(known: grpo, "):
        preset("xyzzy")


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (LossConfig, {"kind": "ppo_clp"}, "there is no loss 'ppo_clp'; did you mean 'ppo_clip'"),
        (
            LossConfig,
            {"kind": "cispo", "ratio_level": "sequence-token"},
            "ratio_level=sequence-token does not go with",
        ),
        (
            LossConfig,
            {"kind": "k1_5"},
            "loss.ratio_level=token does not go with loss.kind=k1_5; set trajectory",
        ),
        (LossConfig, {"clip_low": 1.5}, "loss.clip_low=1.5 would let the ratio below 0"),
        (LossConfig, {"dual_clip": 0.9}, "greater than 1"),
        (
            LossConfig,
            {"dual_clip": 3.0, "kind": "sapo"},
            "loss.dual_clip=3.0 belongs to loss.kind=ppo_clip",
        ),
        (LossConfig, {"tau": 0.1}, "loss.tau=0.1 belongs to k1_5, k2_5 and dppo_tv, not ppo_clip"),
        (
            LossConfig,
            {"norm_const": 5},
            "loss.norm_const=5.0 needs loss.aggregation=seq-mean-token-sum-norm",
        ),
        (
            LossConfig,
            {"denominator": "kept", "aggregation": "seq-mean-token-sum"},
            "loss.denominator=kept needs a mean",
        ),
        (LossConfig, {"options": {"a": 1}}, "loss.options is for a function of yours"),
        (LossConfig, {"aggregation": "mean"}, "token-mean"),
        (LossConfig, {"clip_high": float("nan")}, "finite number"),
        (LossConfig, {"clip": 0.2}, "Extra inputs are not permitted"),
        (AdvantageConfig, {"kind": "grp"}, "there is no advantage 'grp'"),
        (AdvantageConfig, {"vapo_alpha": 0.05}, "need advantage.kind=gae, not group"),
        (AdvantageConfig, {"kind": "gae", "leave_one_out": True}, "set advantage.kind=group"),
        (AdvantageConfig, {"gamma": 1.1}, "less than or equal to 1"),
        (KLConfig, {"unbiased": True}, "kl.unbiased=true needs kl.place=loss"),
        (
            KLConfig,
            {"place": "loss", "estimator": "k3+", "unbiased": True},
            "here they are loss and k3+",
        ),
        (OffPolicyConfig, {"weight": "token"}, "set offpolicy.old_logp=recompute"),
        (OffPolicyConfig, {"seq_mask_low": 0.5}, "set offpolicy.old_logp=recompute"),
        (OffPolicyConfig, {"low": 3.0}, "offpolicy.low=3.0 is above offpolicy.high=2.0"),
        (
            FilterConfig,
            {"dynamic_sampling": True, "zero_variance": False},
            "it needs filter.zero_variance=true",
        ),
    ],
)
def test_a_wrong_setting(model: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        model(**values)
    assert message in str(error.value)


def test_groups_that_do_not_go_together() -> None:
    reward = KLConfig(place="reward")
    with pytest.raises(
        ValueError, match=r"kl.place=reward needs token rewards, which advantage.kind=group has not"
    ):
        check_algorithm(AdvantageConfig(), reward, FilterConfig())
    with pytest.raises(ValueError, match=r"set filter.zero_variance=false"):
        check_algorithm(AdvantageConfig(kind="return"), reward, FilterConfig())
    check_algorithm(AdvantageConfig(kind="return"), reward, FilterConfig(zero_variance=False))


def test_what_a_later_stage_may_ask() -> None:
    assert AdvantageConfig(kind="gae").needs_critic
    assert not AdvantageConfig().needs_critic
    assert [AdvantageConfig(**c).per_token for c in ({}, {"whiten": True}, {"kind": "return"})] == [
        False,
        True,
        True,
    ]
    assert not OffPolicyConfig(opsm_delta=0.5).active
    assert OffPolicyConfig(old_logp="recompute", seq_mask_high=2.0).active


def test_settings_presets_and_advantages_load_no_torch() -> None:
    code = (
        "import sys; from emberl.rl.algorithm import advantages, offpolicy; "
        "from emberl.rl.config import algorithm, presets; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
