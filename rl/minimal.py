"""GRPO (arXiv 2402.03300) on one page and without Ray: python -m emberl.rl.minimal [key=value ...]

A verifier marks G answers to each prompt; those above their group's mean become more likely.
`trainer.py` adds actors, staleness, a critic and more; a test holds the two equal, bit for bit.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ..rewards.inputs import RewardInput
from ..rewards.suite import build_suite
from ..rollout.embedded.engine import EmbeddedEngine
from ..rollout.samples import Sampling
from ..rollout.weights.patch import WeightPatch, dense_patch
from .algorithm.advantages import group_advantages
from .algorithm.losses import Objective, token_loss
from .batch import demonstrations, make_batch
from .config.load import Config, load_config
from .data.sources import open_source
from .data.templates import framing_ids
from .groups import Batch, Group
from .learner.batching import plan_micro_batches
from .learner.policy import Policy, to_tensors
from .learner.publisher import shards_of, tensor_bytes
from .learner.trainable import Trainable, shard
from .model_files import load_tokenizer, prepare_model, stop_tokens

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
DEVICE = torch.device("cpu")
F32 = torch.float32


async def train(config: Config, model: str) -> AsyncIterator[tuple[list[Group], WeightPatch]]:
    """Trains the model of a directory; yields each step's groups and the weights after it."""
    tokenizer = load_tokenizer(model, config.data)
    framing = framing_ids(tokenizer)
    stop = stop_tokens(tokenizer, model)
    source = open_source(config.data, tokenizer, config.seed)
    suite = build_suite({name: part.model_dump() for name, part in config.reward.parts.items()})
    slots = config.rollout.max_num_seqs
    length = config.max_model_length
    engine = EmbeddedEngine(model, max_num_seqs=slots, max_model_len=length, dtype=F32, version=-1)
    policy = load_policy(model)
    position = 0
    optimizer = Trainable(policy, config.sft_optim, config.sft.steps)
    for _ in range(config.sft.steps if "sft" in config.stages else 0):
        learn(optimizer, demonstrations(source, tokenizer, config, position), Objective.sft())
        position += config.sft.batch_size

    optimizer = Trainable(policy, config.optim, config.updates)
    limit = config.rollout.max_response_length
    await engine.apply(weights := weights_of(policy, 0))
    for step in range(1, config.schedule.steps + 1):
        prompts = [source.train(position + i) for i in range(config.schedule.prompts_per_step)]
        position += len(prompts)
        seed = config.seed * 1_000_003 + step
        sampling = Sampling(max_tokens=limit, stop_token_ids=stop, seed=seed)
        requests = [(prompt, config.rollout.group_size, sampling) for prompt in prompts]
        sampled = [completion async for completion in engine.generate_all(requests)]
        groups = []
        for prompt in prompts:
            own = sorted((c for c in sampled if c.prompt_id == prompt.id), key=lambda c: c.sample)
            texts = [tokenizer.decode([t for t in c.token_ids if t not in framing]) for c in own]
            verdicts = suite.grade([RewardInput(completion=t, answer=prompt.answer) for t in texts])
            groups.append(Group(prompt=prompt, completions=tuple(own), verdicts=tuple(verdicts)))
        kept = [g for g in groups if g.has_signal or not config.filter.zero_variance]
        advantages = group_advantages([g.scores for g in kept], config.advantage)
        kept = [g.with_advantages(a) for g, a in zip(kept, advantages, strict=True)]
        batch = make_batch(kept, config.loss, config.advantage, max_length=limit)
        if batch is None:  # all answers to each prompt are equally good
            optimizer.skip(1)
        else:
            learn(optimizer, batch, Objective.of(config.loss, config.kl, config.offpolicy))
            await engine.apply(weights := weights_of(policy, weights.version + 1))
        yield groups, weights
    suite.close()


def load_policy(model: str) -> Policy:
    """Sharded over a process group of one, since the optimizer knows shards only."""
    dist.init_process_group(init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    policy = Policy(AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager"))
    mesh = init_device_mesh(DEVICE.type, (1,))
    shard(policy, policy.model.model.layers, mesh, F32, device=DEVICE, master=F32, keep=True)
    return policy.train()


def learn(optimizer: Trainable, batch: Batch, objective: Objective) -> None:
    """One optimizer step. A token's weight holds its denominator, so the passes' losses add up."""
    loss_of = token_loss(objective, batch, DEVICE)
    room = int(optimizer.optim.micro_batch_tokens)
    for sequences in plan_micro_batches(batch.sequence_lengths, 1, room)[0]:
        micro = to_tensors(batch, sequences, DEVICE)
        shift = torch.from_numpy(batch.behaviour_logp_T)[micro.index_n]
        optimizer.module(micro, loss_of, shift, objective.temperature)[0].backward()
    optimizer.update("actor")


def weights_of(policy: Policy, version: int) -> WeightPatch:
    """All weights and their digests, by which the engine proves what it serves."""
    return dense_patch("page", version, tensor_bytes(shards_of(policy.model, F32, 0, 1)))


async def main() -> None:
    config = load_config(QUICKSTART, ["name=minimal", "schedule.steps=30", *sys.argv[1:]])
    async for groups, weights in train(config, prepare_model(config, config.output, print)):
        rewards = [verdict.score or 0.0 for group in groups for verdict in group.verdicts]
        print(f"version {weights.version}: reward {sum(rewards) / len(rewards):.3f}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
