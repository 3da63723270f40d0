"""Learning-rate schedules over the updates of a stage."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..config.load import OptimConfig


def learning_rate(optimizer: Optimizer, settings: OptimConfig, total: int) -> LambdaLR:
    """The schedule of `total` updates; with a warm-up the first one has the factor 0. It equals
    transformers' `get_scheduler`, whose import would take a third of a rank's start."""

    def factor(update: int) -> float:
        warmup = settings.warmup_steps
        if update < warmup:
            return update / max(1, warmup)
        if settings.schedule == "constant":
            return 1.0
        rest = max(1, total - warmup)
        if settings.schedule == "linear":
            return max(0.0, (total - update) / rest)
        least = settings.min_lr_ratio
        cosine = 0.5 * (1.0 + math.cos(math.pi * ((update - warmup) / rest)))
        return max(0.0, cosine * (1 - least) + least if least else cosine)

    return LambdaLR(optimizer, factor)
