"""Algorithms by name: a preset is nothing but values for the groups `advantage`, `loss`, `kl`,
`offpolicy`, `filter`, `critic` and `schedule`.

`emberl train CONFIG --dry-run` prints what a preset became, and what a file or an override changes
of it. No preset sets a KL penalty (see `KLConfig`).
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
    "grpo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "seq-mean-token-mean",
        },
    },
    "dr_grpo": {
        "advantage": _PLAIN,
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "seq-mean-token-sum-norm",
        },
    },
    "dapo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "aggregation": "token-mean",
        },
        "filter": {"zero_variance": True, "dynamic_sampling": True, "overlong_share": 0.2},
    },
    "gspo": _GSPO,
    "gspo_token": _GSPO | {"loss": _GSPO["loss"] | {"ratio_level": "sequence-token"}},
    "cispo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"},
    },
    "rloo": {
        "advantage": {"kind": "group", "leave_one_out": True, "std": "none"},
        "loss": {"kind": "reinforce", "aggregation": "seq-mean-token-sum"},
    },
    "reinforce_pp": {
        "advantage": {"kind": "return", "std": "none", "whiten": True},
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token-mean",
        },
        "filter": _EVERY_GROUP,
    },
    "reinforce_pp_baseline": {
        "advantage": {"kind": "group", "std": "none", "whiten": True},
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token-mean",
        },
        "filter": _EVERY_GROUP,
    },
    "ppo": {
        "advantage": {"kind": "gae", "std": "none", "gamma": 1.0, "lam": 1.0, "whiten": True},
        "loss": {
            "kind": "ppo_clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token-mean",
        },
        "filter": _EVERY_GROUP,
    },
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
    "dppo_tv": {
        "advantage": _PLAIN,
        "loss": {
            "kind": "dppo_tv",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "tau": 1e-3,
            "aggregation": "token-mean",
        },
    },
    "sapo": {
        "advantage": {"kind": "group", "std": "group"},
        "loss": {"kind": "sapo", "aggregation": "seq-mean-token-mean"},
    },
    "k1_5": {
        "advantage": _PLAIN,
        "loss": {
            "kind": "k1_5",
            "ratio_level": "trajectory",
            "tau": 0.1,
            "aggregation": "seq-mean-token-sum",
        },
    },
    "k2_5": {
        "advantage": _PLAIN,
        "loss": {
            "kind": "k2_5",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "tau": 1e-3,
            "aggregation": "token-mean",
        },
    },
    "topr": {
        "advantage": _PLAIN,
        "loss": {"kind": "topr", "ratio_level": "trajectory", "aggregation": "seq-mean-token-sum"},
    },
    "gpg": {
        "advantage": {"kind": "group", "std": "none", "rescale": "signal"},
        "loss": {"kind": "reinforce", "aggregation": "token-mean"},
    },
    "opd": {
        "advantage": _PLAIN,
        "loss": {"kind": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"},
        "filter": _EVERY_GROUP,
    },
}


PAPERS: Mapping[str, str] = {
    "grpo": (
        "arXiv 2402.03300: scores normalised in the group, mean over an answer's tokens, then over"
        " answers"
    ),
    "dr_grpo": (
        "arXiv 2503.20783: without the two normalisations that favour long wrong answers and easy"
        " prompts"
    ),
    "dapo": "arXiv 2503.14476",
    "gspo": "arXiv 2507.18071, section 5.1: the bounds, and four minibatches",
    "gspo_token": "arXiv 2507.18071, section 4.3: GSPO with a derivative for each token",
    "cispo": (
        "arXiv 2506.13585, whose upper bound is not printed; 1 + 4 is TRL's, ScaleRL (arXiv"
        " 2510.13786) takes 4 to 8"
    ),
    "rloo": "arXiv 2402.14740",
    "reinforce_pp": "arXiv 2501.03262",
    "reinforce_pp_baseline": "arXiv 2501.03262: with the group's mean as a baseline",
    "ppo": "arXiv 1707.06347; gamma = lambda = 1 is what LLM trainers (verl, OpenRLHF) default to",
    "vapo": "arXiv 2504.05118",
    "dppo_tv": (
        "arXiv 2602.04879, with prime-rl's values; verl's example has bounds of 0.15, and it"
        " truncates the ratio besides"
    ),
    "sapo": "arXiv 2511.20347",
    "k1_5": "arXiv 2501.12599, eq. 3; tau as in ROLL",
    "k2_5": "arXiv 2602.02276, eq. 1, which prints neither bounds nor tau",
    "topr": "arXiv 2503.14286",
    "gpg": "arXiv 2504.02546",
    "opd": (
        "on-policy distillation, https://thinkingmachines.ai/blog/on-policy-distillation:"
        " importance sampling (here truncated), no advantages within the group"
    ),
}
"""The paper of each preset, and the values that it leaves open."""


def preset(name: str) -> Tree:
    """The values that `algorithm: name` stands for, as a copy that may be changed. Raises
    ValueError with the nearest name if there is no such preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, 1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"algorithm={name!r} is no preset{hint} (known: {', '.join(PRESETS)})")
    # deep: presets share dictionaries, e.g. `_PLAIN`
    return copy.deepcopy(dict(PRESETS[name]))
