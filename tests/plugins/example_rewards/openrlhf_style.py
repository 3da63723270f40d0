"""Written for OpenRLHF: `--remote_rm_url this_file.py`."""

import numpy as np


def reward_func(queries, prompts, labels, **kwargs):
    rewards = np.array(
        [float(q[len(p) :].strip() == a) for q, p, a in zip(queries, prompts, labels, strict=True)]
    )
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"mean": rewards.mean()}}
