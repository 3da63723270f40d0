"""Learner ranks as processes: python gradients.py MODEL FOLDER WORLD-BUDGET-PACKING ..., for
test_invariance.py.

Writes to FOLDER/WORLD-BUDGET-PACKING.npz, of a fixed ragged batch in float64, the loss and the
whole gradient of every loss under every aggregation, of the critic, and what the ranks say of each
token. The ranks are forked from one process that has loaded everything: to load it takes longer
than the passes.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import token_weights
from emberl.rl.config.algorithm import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.load import CriticConfig, ModelConfig, OptimConfig
from emberl.rl.groups import Batch
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from torch.distributed import fsdp
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"clip_high": 0.28},
    "dual_clip": {"dual_clip": 3.0},
    "gspo": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {"ratio_level": "sequence-token", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"kind": "cispo", "clip_high": 4.0},
    "reinforce": {"kind": "reinforce", "entropy_coef": 0.01},
    "sapo": {"kind": "sapo"},
    "dppo_tv": {"kind": "dppo_tv", "tau": 1e-3},
    "topr": {"kind": "topr", "ratio_level": "trajectory"},
    "k1_5": {"kind": "k1_5", "ratio_level": "trajectory", "tau": 0.1},
    "k2_5": {"kind": "k2_5", "tau": 0.1},
    "vapo": {"nll_coef": 0.1},
}
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def ragged_batch() -> Batch:
    """Seven sequences of unlike lengths, with gaps in the loss mask, made from a fixed seed."""
    rng = np.random.default_rng(3)
    lengths = [5, 17, 9, 2, 12, 7, 3]
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    mask = (positions >= 1) & (rng.random(len(ids)) < 0.8)
    behaviour = np.where(mask, -3.0 + 0.3 * rng.standard_normal(len(ids)), np.nan)
    return Batch(
        token_ids_T=rng.integers(4, 20, len(ids)).astype(np.int32),
        positions_T=positions,
        sequence_ids_T=ids,
        loss_mask_T=mask,
        behaviour_logp_T=behaviour,
        advantages_T=np.repeat(rng.standard_normal(len(lengths)), lengths),
        weights_T=np.where(mask, 1.0 / mask.sum(), 0.0),
        num_loss_tokens=int(mask.sum()),
        correct_T=ids % 2 == 0,
        reference_logp_T=behaviour + 0.1,
        values_T=np.where(mask, rng.standard_normal(len(ids)), np.nan),
        returns_T=np.where(mask, rng.standard_normal(len(ids)), np.nan),
    )


def objectives(batch: Batch) -> Iterator[tuple[str, Batch, Objective]]:
    """Every loss under every aggregation; one of them with a KL penalty, one with importance
    weights."""
    for name, settings in LOSSES.items():
        for aggregation in AGGREGATIONS:
            weights = token_weights(
                batch.loss_mask_T, batch.sequence_ids_T, aggregation, norm_const=20.0
            )
            loss = LossConfig.model_validate({**settings, "aggregation": aggregation})
            kl = KLConfig(place="loss", coef=0.1) if name == "grpo" else KLConfig()
            decoupled = OffPolicyConfig(old_logp="recompute", weight="token", opsm_delta=0.5)
            offpolicy = decoupled if name == "dual_clip" else OffPolicyConfig()
            yield (
                f"{name} {aggregation}",
                replace(batch, weights_T=weights),
                Objective.of(loss, kl, offpolicy),
            )


def take_gradient(module: torch.nn.Module) -> np.ndarray:
    """All gradients in one row, which the parameters have no more afterwards."""
    row = [p.grad.full_tensor().flatten() for p in module.parameters() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return torch.cat(row).numpy()


LOADED = (fsdp.fully_shard, AutoModelForCausalLM, Qwen3ForCausalLM)
"""What a rank imports when it needs it, for all of them at once."""


def main() -> None:
    path, folder = sys.argv[1], Path(sys.argv[2])
    for name in sys.argv[3:]:
        world, budget, packing = name.split("-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rest = (int(world), port, path, folder / f"{name}.npz", int(budget), packing)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=run, args=(rank, *rest)) for rank in range(int(world))]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            if process.exitcode != 0:
                sys.exit(f"a rank of {name} ended with {process.exitcode}")


def run(rank: int, world: int, port: int, path: str, out: Path, budget: int, packing: str) -> None:
    model = ModelConfig.model_validate({"path": path, "dtype": "float64", "packing": packing})
    learner = LearnerRank(
        RankSpec(rank=rank, world=world, device="cpu", threads=1, model=model, timeout=60.0)
    )
    learner.connect(f"127.0.0.1:{port}")
    learner.load(path)
    learner.begin_stage(
        OptimConfig(lr=1e-3, micro_batch_tokens=budget), 1, CriticConfig(lr=1e-3), reference=True
    )
    learner.passes.size.reduce_every_pass = world == 4  # as where whole gradients would not fit
    found: dict[str, Any] = {}
    batch = ragged_batch()
    for name, weighted, objective in objectives(batch):
        loss, _ = learner.backward(weighted, objective)
        found[name] = np.append(take_gradient(learner.policy), loss)
    assert learner.critic is not None
    learner.critic_step(batch)  # moves its head from 0, so that its body has a gradient
    loss, _ = learner.critic_backward(batch)
    found["critic"] = np.append(take_gradient(learner.critic.module), loss)
    found["logprobs"], found["values"] = learner.logprobs(batch), learner.values(batch)
    learner.step(batch, Objective.sft())
    found["logprobs after a step"] = learner.logprobs(batch)
    found["logprobs of the reference"] = learner.reference_logprobs(batch)
    if rank == 0:
        np.savez(out, **found)
    learner.close()


if __name__ == "__main__":
    main()
