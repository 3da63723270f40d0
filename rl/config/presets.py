"""Algorithms by name: a preset is nothing but values for the groups `advantage`, `loss`, `kl`, `offpolicy`, `filter`,
`critic` and `schedule`.

`emberl train CONFIG --dry-run` prints what a preset became, and what a file or an override changes of it. No preset sets a
KL penalty (see `KLConfig`).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

Tree = dict[str, dict[str, Any]]

_PLAIN: dict[str, Any] = {"kind": "group", "std": "none"}
_EVERY_GROUP = {"zero_variance": False}
_GSPO: Tree = {
    "advantage": {"kind": "group", "std": "group"},
    "loss": {
        "kind": "ppo_clip",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
    },
    # bounds as narrow as these clip on an engine's rounding, so the old policy is the learner's own
    "offpolicy": {"old_logp": "recompute"},
    "schedule": {"minibatches": 4},
}

PRESETS: Mapping[str, Tree] = {
    # arXiv 2402.03300: scores normalised in the group, mean over an answer's tokens, then over answers
    "grpo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "seq-mean-token-mean"},
    },
    # arXiv 2503.20783: without the two normalisations that favour long wrong answers and easy prompts
    "dr_grpo": {
        "advantage": _PLAIN,
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "seq-mean-token-sum-norm"},
    },
    # arXiv 2503.14476
    "dapo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean"},
        "filter": {"zero_variance": True, "dynamic_sampling": True, "overlong_share": 0.2},
    },
    # arXiv 2507.18071, section 5.1: the bounds, and four minibatches
    "gspo": _GSPO,
    "gspo_token": _GSPO | {"loss": _GSPO["loss"] | {"ratio_level": "sequence-token"}},
    # arXiv 2506.13585, whose upper bound is not printed; 1 + 4 is TRL's, ScaleRL (arXiv 2510.13786) takes 4 to 8
    "cispo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"},
    },
    # arXiv 2402.14740
    "rloo": {
        "advantage": {"kind": "group", "leave_one_out": True, "std": "none"},
        "loss": {"kind": "reinforce", "aggregation": "seq-mean-token-sum"},
    },
    # arXiv 2501.03262
    "reinforce_pp": {
        "advantage": {"kind": "return", "std": "none", "whiten": True},
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token-mean"},
        "filter": _EVERY_GROUP,
    },
    "reinforce_pp_baseline": {
        "advantage": {"kind": "group", "std": "none", "whiten": True},
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token-mean"},
        "filter": _EVERY_GROUP,
    },
    # arXiv 1707.06347; gamma = lambda = 1 is what LLM trainers (verl, OpenRLHF) default to
    "ppo": {
        "advantage": {"kind": "gae", "std": "none", "gamma": 1.0, "lam": 1.0, "whiten": True},
        "loss": {"kind": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token-mean"},
        "filter": _EVERY_GROUP,
    },
    # arXiv 2504.05118
    "vapo": {
        "advantage": {
            "kind": "gae",
            "std": "none",
            "gamma": 1.0,
            "lam_critic": 1.0,
            "vapo_alpha": 0.05,
            "whiten": True,
        },
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "aggregation": "token-mean",
            "nll_coef": 0.1,
        },
        "critic": {"warmup": 50},
        "filter": _EVERY_GROUP,
    },
    # arXiv 2602.04879, with prime-rl's values; verl's example has bounds of 0.15, and it truncates the ratio besides
    "dppo_tv": {
        "advantage": _PLAIN,
        "loss": {"kind": "dppo_tv", "clip_low": 0.2, "clip_high": 0.2, "tau": 1e-3, "aggregation": "token-mean"},
    },
    # arXiv 2511.20347
    "sapo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "sapo", "aggregation": "seq-mean-token-mean"},
    },
    # arXiv 2501.12599, eq. 3; tau as in ROLL
    "k1_5": {
        "advantage": _PLAIN,
        "loss": {"kind": "k1_5", "ratio_level": "trajectory", "tau": 0.1, "aggregation": "seq-mean-token-sum"},
    },
    # arXiv 2602.02276, eq. 1, which prints neither bounds nor tau
    "k2_5": {
        "advantage": _PLAIN,
        "loss": {"kind": "k2_5", "clip_low": 0.2, "clip_high": 0.28, "tau": 1e-3, "aggregation": "token-mean"},
    },
    # arXiv 2503.14286
    "topr": {
        "advantage": _PLAIN,
        "loss": {"kind": "topr", "ratio_level": "trajectory", "aggregation": "seq-mean-token-sum"},
    },
    # arXiv 2504.02546
    "gpg": {
        "advantage": {"kind": "group", "std": "none", "rescale": "signal"},
        "loss": {"kind": "reinforce", "aggregation": "token-mean"},
    },
}


def preset(name: str) -> Tree:
    """The groups that `algorithm: name` stands for, as a tree of its own; ValueError with the nearest name if unknown."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"algorithm={name!r} is no preset{hint} (known: {', '.join(PRESETS)})")
    return copy.deepcopy(dict(PRESETS[name]))
