"""The critic of PPO and VAPO: a second model on the learner ranks that estimates the return before
each token.

Shape legend: n loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .policy import MicroBatchTensors, hidden_states


class Critic(nn.Module):
    """A transformer body and a value head, which starts at 0: an untrained critic says 0, and
    advantages are returns."""

    def __init__(self, body: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = body
        self.value = nn.Linear(body.config.hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, micro: MicroBatchTensors) -> Tensor:
        """The value [n] before each loss token, in the dtype of the master weights: bfloat16 would
        round it to 0.4 %."""
        hidden_nH = hidden_states(self.body, micro)
        values_n1: Tensor = self.value(hidden_nH.to(self.value.weight.dtype))
        return values_n1.sum(-1)  # not a view, which FSDP warns of
