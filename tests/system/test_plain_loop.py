"""Invariants 1 and 5: the actors give what a plain synchronous loop gives, token by token and byte by byte."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.suite import build_suite
from emberl.rl.algorithm.advantages import group_advantages
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import make_batch
from emberl.rl.config.load import Config, load_config
from emberl.rl.data.sources import open_source
from emberl.rl.groups import Group
from emberl.rl.learner.checkpoint import full_tensors
from emberl.rl.learner.rank import LearnerRank, RankSpec
from emberl.rl.model_files import stop_tokens
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.samples import Sampling
from emberl.rollout.weights.patch import TensorBytes, WeightPatch, dense_patch
from small_system import Emberl, read_metrics
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow


def served(learner: LearnerRank, version: int) -> WeightPatch:
    """The learner's weights, whole."""
    tensors = {name: tensor.contiguous().numpy() for name, tensor in full_tensors(learner.policy, learner.dtype)}
    return dense_patch(
        "plain",
        version,
        [
            (name, TensorBytes(dtype="F32", shape=value.shape, data=value.reshape(-1).view(np.uint8).copy()))
            for name, value in tensors.items()
        ],
    )


def plain_loop(config: Config, model: str) -> tuple[dict[str, str], dict[str, str], list[float]]:
    """Sample, mark, step, hand over, without Ray: digests of what the learner and the engine hold, scores per step."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = open_source(config.data, tokenizer, config.seed)
    suite = build_suite({"answer": {"use": "math"}})
    engine = EmbeddedEngine(
        model, max_num_seqs=config.rollout.max_num_seqs, max_model_len=64, dtype="float32", version=-1
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner = LearnerRank(RankSpec(rank=0, world=1, device="cpu", threads=1, model=config.model, timeout=60.0))
    learner.connect(f"127.0.0.1:{port}")
    learner.load(model)
    learner.begin_stage(config.optim, config.schedule.steps)
    objective = Objective.of(config.loss, config.kl, config.offpolicy, temperature=1.0)
    asyncio.run(engine.apply(served(learner, 0)))
    scores, per_step = [], config.schedule.prompts_per_step
    for step in range(1, config.schedule.steps + 1):
        sampling = Sampling(
            max_tokens=config.rollout.max_response_length,
            stop_token_ids=stop_tokens(tokenizer, model),
            seed=config.seed * 1_000_003 + step,
        )
        prompts = [source.train(i) for i in range((step - 1) * per_step, step * per_step)]
        for prompt in prompts:
            engine.submit(prompt, config.rollout.group_size, sampling)
        found = engine.run()
        groups = []
        for prompt in prompts:
            answers = tuple(sorted((c for c in found if c.prompt_id == prompt.id), key=lambda c: c.sample))
            texts = [
                tokenizer.decode(c.token_ids[: -1 if c.finish_reason == "stop" else None].tolist()) for c in answers
            ]
            verdicts = tuple(suite.grade([RewardInput(completion=t, answer=prompt.answer) for t in texts]))
            groups.append(Group(prompt=prompt, completions=answers, verdicts=verdicts))
        advantages = group_advantages([g.scores for g in groups], config.advantage)
        groups = [g.with_advantages(a) for g, a in zip(groups, advantages, strict=True)]
        batch = make_batch(groups, config.loss, config.advantage, max_length=config.rollout.max_response_length)
        scores.append(float(np.mean([g.scores for g in groups])))
        if batch is not None:
            learner.step(batch, objective)
            asyncio.run(engine.apply(served(learner, step)))
    held = served(learner, 99)
    learner.close()
    suite.close()
    return dict(held.digests), engine.digests(), scores


def test_the_actors_are_the_plain_loop(emberl: Emberl) -> None:
    start = emberl.train("stages=[sft]", "sft.steps=60", "run_dir=start")
    model = f"{start['run_dir']}/model"
    path = emberl.folder / "rl.yaml"
    lines = [line for line in emberl.config.read_text().splitlines() if not line.startswith(("stages", "model", "sft"))]
    path.write_text("\n".join([*lines, "stages: [rl]", f"model: {{path: {emberl.folder / model}, dtype: float32}}"]))
    emberl.train("run_dir=actors", "schedule.steps=3", config=path)
    learner, engine, scores = plain_loop(load_config(path, ["schedule.steps=3"]), str(emberl.folder / model))
    assert learner == engine, "the engine serves the learner's bytes"
    assert scores == [row["critic/score/mean"] for row in read_metrics(emberl.folder / "actors")]
    assert 0 < sum(scores) < 3, "the steps had something to learn from"
    from emberl.rollout.weights.patch import digest
    from safetensors.numpy import load_file

    saved = load_file(emberl.folder / "actors/model/model.safetensors")
    assert {name: digest(value.reshape(-1).view(np.uint8)) for name, value in saved.items()} == learner
