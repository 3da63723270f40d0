"""One learner rank as a process of its own: python gradients.py RANK WORLD PORT MODEL OUT BUDGET DTYPE, for test_invariance.py.

Writes the loss and every gradient, whole, of a fixed ragged batch under the given micro-batch budget.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from emberl.rl.algorithm.losses import Objective
from emberl.rl.algorithm.settings import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config import ModelConfig, OptimConfig
from emberl.rl.groups import Batch
from emberl.rl.learner.rank import LearnerRank, RankSpec


def ragged_batch() -> Batch:
    """Seven sequences of unlike lengths, with gaps in the loss mask, made from a fixed seed."""
    rng = np.random.default_rng(3)
    lengths = [5, 17, 9, 2, 12, 7, 3]
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    mask = (positions >= 1) & (rng.random(len(ids)) < 0.8)
    weights = np.where(mask, 1.0 / mask.sum(), 0.0)
    return Batch(
        token_ids_T=rng.integers(4, 20, len(ids)).astype(np.int32),
        positions_T=positions,
        sequence_ids_T=ids,
        loss_mask_T=mask,
        behaviour_logp_T=np.where(mask, -3.0 + 0.3 * rng.standard_normal(len(ids)), np.nan),
        advantages_T=np.repeat(rng.standard_normal(len(lengths)), lengths),
        weights_T=weights,
        num_loss_tokens=int(mask.sum()),
    )


def main() -> None:
    rank, world, port = (int(a) for a in sys.argv[1:4])
    model, out, budget, dtype = sys.argv[4], Path(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
    spec = RankSpec(
        rank=rank, world=world, device="cpu", threads=1, model=ModelConfig(path=model, dtype=dtype), timeout=60.0
    )  # fmt: skip
    learner = LearnerRank(spec)
    learner.connect(f"127.0.0.1:{port}")
    learner.load(model)
    learner.begin_stage(OptimConfig(lr=1e-3, micro_batch_tokens=budget), 1)
    objective = Objective.of(LossConfig(), KLConfig(), OffPolicyConfig(), temperature=1.0)
    loss, _ = learner.backward(ragged_batch(), objective)
    gradients = {
        n: p.grad.full_tensor().numpy() for n, p in learner.policy.model.named_parameters() if p.grad is not None
    }
    if rank == 0:
        np.savez(out, loss=loss, **gradients)
    learner.close()


if __name__ == "__main__":
    main()
