"""Padding of micro-batches, and the learner's log-probs beside a plain forward pass of the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from emberl.rl.batch import sft_batch
from emberl.rl.data_settings import TinyConfig
from emberl.rl.learner.policy import Policy, to_tensors
from emberl.rl.tiny import make_tiny


def test_rows_point_one_position_before_their_target() -> None:
    batch = sft_batch([((3, 4, 7, 8, 1), 2), ((5, 9, 1), 1)])
    micro = to_tensors(batch, (1, 0), torch.device("cpu"))
    assert micro.token_ids_BL.shape == (8, 8)  # two sequences, the longer of five tokens, both sizes padded to eight
    assert micro.token_ids_BL[0].tolist() == [5, 9, 1, 0, 0, 0, 0, 0]
    assert micro.token_ids_BL[1].tolist() == [3, 4, 7, 8, 1, 0, 0, 0]
    assert micro.rows_n.tolist() == [0, 1, 8 + 1, 8 + 2, 8 + 3]
    assert micro.targets_n.tolist() == [9, 1, 7, 8, 1]
    assert micro.index_n.tolist() == [6, 7, 2, 3, 4]
    assert micro.sequence_ids_n.tolist() == [1, 1, 0, 0, 0]


def test_a_rank_without_sequences_still_makes_a_pass() -> None:
    micro = to_tensors(sft_batch([((3, 4, 1), 1)]), (), torch.device("cpu"))
    assert micro.token_ids_BL.sum() == 0
    assert len(micro.rows_n) == len(micro.targets_n) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_sequence_alone(tmp_path: Path, temperature: float) -> None:
    from transformers import AutoModelForCausalLM

    small = TinyConfig(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    model = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path, small, seed=1), dtype=torch.float64)
    sequences = [(3, 4, 7, 8, 1), (5, 9, 1), (6, 6, 6, 7, 9, 8, 10, 11, 1)]
    batch = sft_batch([(tokens, 2) for tokens in sequences])
    micro = to_tensors(batch, (2, 0, 1), torch.device("cpu"))
    with torch.no_grad():
        _, stats, _ = Policy(model)(micro, None, None, temperature)
        alone = []
        for i in (2, 0, 1):
            logits = model(torch.tensor([sequences[i]])).logits[0] / temperature
            picked = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequences[i][1:])[:, None])[:, 0]
            alone.append(picked[1:])
    np.testing.assert_allclose(stats.logp.numpy(), torch.cat(alone).numpy(), rtol=0, atol=1e-6)
