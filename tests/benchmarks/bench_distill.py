"""On-policy distillation beside supervised learning on the same teacher's samples, at equal tokens.

Student, data and sampling are those of configs/distill_quickstart.yaml. Each seed has a cold start
of its own; from there every arm makes as many updates on as many completion tokens: the arms `opd
...` on what the student sampled, `sft` on what the teacher sampled for the same problems. Accuracy
is that of one sampled answer to each held-out problem at temperature 1.

    .venv/bin/python tests/benchmarks/bench_distill.py TEACHER FOLDER [--seeds 0 1 2] [--steps 60]
        [--cold 1100] [--arms sft:1e-3 policy_gradient:1e-3 reverse_kl:1e-3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from emberl.rewards.inputs import RewardInput
from emberl.rewards.suite import RewardSuite, build_suite
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import demonstrations, flat_batch, sft_batch, updates_of, with_teachers
from emberl.rl.config.load import Config, OptimConfig, load_config
from emberl.rl.data.sources import PromptSource, open_source
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Group
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.publisher import shards_of, tensor_bytes
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.model_files import load_tokenizer
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.samples import Completion, Prompt, Sampling
from emberl.rollout.weights.patch import dense_patch
from harness import Report

CONFIG = Path(__file__).parents[2] / "configs" / "distill_quickstart.yaml"
EVERY = 20
TOKENS = 8_192
"""Of an update's completions, but for the last sixteen problems'."""
SAMPLED = Verdict(status=Status.PARTIAL, score=0.0)


class Bench:
    """One seed: its problems, and a learner process group that all its arms share."""

    def __init__(self, teacher: str, folder: Path, seed: int, steps: int, cold: int) -> None:
        settings = [f"seed={seed}", f"sft.steps={cold}", f"schedule.steps={steps}"]
        settings += [f"distill.teachers.quickstart.path={teacher}"]
        self.config: Config = load_config(CONFIG, settings)
        self.teacher, self.folder, self.cold = teacher, folder / f"seed{seed}", cold
        self.tokenizer = load_tokenizer(teacher, self.config.data)
        self.source: PromptSource = open_source(self.config.data, self.tokenizer, seed)
        self.suite: RewardSuite = build_suite({"answer": {"use": "math"}})
        assert self.config.model.tiny is not None
        path = make_tiny(self.folder / "init", self.config.model.tiny, seed)
        spec = RankSpec(
            rank=0,
            world=1,
            device="cpu",
            threads=1,
            model=self.config.model.model_copy(update={"dtype": "float32"}),
            timeout=600.0,
        )
        self.learner = LearnerRank(spec)
        self.learner.connect(self.learner.address())
        self.learner.load(str(path))

    def student(self) -> str:
        """The model after its cold start."""
        done = self.folder / "cold"
        if not (done / "model.safetensors").exists():
            self.learner.begin_stage(self.config.sft_optim, self.cold)
            size = self.config.sft.batch_size
            for step in range(self.cold):
                batch = demonstrations(self.source, self.tokenizer, self.config, step * size)
                self.learner.step(batch, Objective.sft())
            self.learner.save(str(done))
        return str(done)

    def arm(self, loss: str, lr: float) -> list[tuple[int, int, float]]:
        """(updates, completion tokens, accuracy) at the start and every so many updates."""
        config, learner = self.config, self.learner
        distill = config.distill
        student = self.student()
        learner.load(student)
        optim: OptimConfig = config.optim.model_copy(update={"lr": lr})
        learner.begin_stage(optim, config.schedule.steps)
        if loss != "sft":
            distill = distill.model_copy(update={"loss": loss})
            learner.load_teachers(distill)
        objective = Objective.of(config.loss, config.kl, config.offpolicy, distill=distill)
        engine = make_engine(student)
        sampler = make_engine(self.teacher) if loss == "sft" else engine
        found = [(0, 0, self.accuracy(engine))]
        tokens, position = 0, self.cold * config.sft.batch_size
        for step in range(1, config.schedule.steps + 1):
            prompts: list[Prompt] = []
            sampled: list[list[Completion]] = []
            while tokens < step * TOKENS:  # so that every arm has as many, whatever its lengths
                more = [self.source.train(position + i) for i in range(16)]
                position += len(more)
                groups = self.sample(sampler, more, config.rollout.group_size, step)
                prompts, sampled = [*prompts, *more], [*sampled, *groups]
                tokens += sum(len(c) for group in groups for c in group)
            if loss == "sft":
                examples = [
                    ([*p.token_ids, *c.token_ids.tolist()], len(p.token_ids))
                    for p, group in zip(prompts, sampled, strict=True)
                    for c in group
                ]
                learner.step(sft_batch(examples), Objective.sft())
            else:
                self.distil(prompts, sampled, objective)
            weights = tensor_bytes(shards_of(learner.policy.model, learner.dtype, 0, 1))
            asyncio.run(engine.apply(dense_patch("bench", step, weights)))
            if step % EVERY == 0:
                found.append((step, tokens, self.accuracy(engine)))
        return found

    def distil(
        self, prompts: Sequence[Prompt], sampled: Sequence[Any], objective: Objective
    ) -> None:
        groups = [
            Group(
                prompt=p,
                completions=tuple(group),
                verdicts=(SAMPLED,) * len(group),
                advantages=np.zeros(len(group)),
            )
            for p, group in zip(prompts, sampled, strict=True)
        ]

        distill, limit = objective.distill, self.config.rollout.max_response_length
        whole = flat_batch(groups, self.config.loss, max_length=limit, distill=distill)
        assert whole is not None
        if distill.on_samples:
            whole = replace(whole, teacher_logp_T=self.learner.teacher_logprobs(whole))
        (batch,) = updates_of(
            with_teachers(whole, distill),
            groups,
            self.config.loss,
            max_length=limit,
            keep_all=objective.needs_all_tokens,
        )
        self.learner.step(batch, objective)

    def sample(
        self, engine: EmbeddedEngine, prompts: Sequence[Prompt], n: int, seed: int
    ) -> list[list[Completion]]:
        limit = self.config.rollout.max_response_length
        sampling = Sampling(max_tokens=limit, seed=seed, stop_token_ids=(1,))
        for prompt in prompts:
            engine.submit(prompt, n, sampling)
        found: dict[str, list[Completion]] = {prompt.id: [] for prompt in prompts}
        for completion in engine.run():
            found[completion.prompt_id].append(completion)
        return [sorted(found[p.id], key=lambda c: c.sample) for p in prompts]

    def accuracy(self, engine: EmbeddedEngine) -> float:
        prompts = self.source.heldout
        answers = self.sample(engine, prompts, 1, seed=99)
        texts = [
            self.tokenizer.decode(a[0].token_ids.tolist()).replace("<eos>", "") for a in answers
        ]
        inputs = [
            RewardInput(completion=text, answer=prompt.answer)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        return float(np.mean([v.status == Status.CORRECT for v in self.suite.grade(inputs)]))


def make_engine(path: str) -> EmbeddedEngine:
    return EmbeddedEngine(path, max_num_seqs=256, max_model_len=144, dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cold", type=int, default=1100)
    arms = ["sft:1e-3", "policy_gradient:1e-3", "reverse_kl:1e-3"]
    parser.add_argument("--arms", nargs="+", default=arms)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = Report("distill", given.json, "transformers")
    for seed in given.seeds:
        bench = Bench(given.teacher, given.folder, seed, given.steps, given.cold)
        for arm in given.arms:
            loss, lr = arm.split(":")
            for step, tokens, accuracy in bench.arm(loss, float(lr)):
                case = f"seed {seed}, {step} updates, {tokens:,} tokens"
                report.record(case, arm, accuracy, "accuracy")
        bench.suite.close()
        bench.learner.close()


if __name__ == "__main__":
    main()
