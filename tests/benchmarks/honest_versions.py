"""Honest versions of a real model: python honest_versions.py MODEL FOLDER [--versions 200].

Each version is one AdamW step of the real learner on answers that the embedded engine has decoded.
FOLDER gets one file a version with the log-probs of the same tokens by the learner and by the
engine, decoded and read at once; a run that was stopped goes on from its last checkpoint. With
--judge the files are held against every gate of a run instead: no version may be an alarm, and how
near the nearest came is said, with how far apart an update and rounding are, and which older
versions of the engine's log-probs, served again, would be found.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import flat_batch
from emberl.rl.config.algorithm import LossConfig
from emberl.rl.config.load import ModelConfig, OptimConfig
from emberl.rl.groups import Group
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.publisher import shards_of, tensor_bytes
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.weights.decoding import FOLLOWED
from emberl.rl.weights.gate import MEAN, Gate
from emberl.rl.weights.probe import Level, Probe, tolerance_of
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.samples import Completion, Prompt, Sampling
from emberl.rollout.weights.patch import dense_patch
from transformers import AutoTokenizer

TEXTS = (
    "What is 17 + 25? Answer:",
    "A train leaves at 9:40 and arrives at 13:05. How many minutes does the journey take?",
    "Tom has 3 boxes of 12 pencils each and gives away 7 pencils. How many pencils does he keep?"
    " Think step by step.",
    "List three prime numbers:",
)
TOKENS = 24
SAVE_EVERY = 25


def group_of(prompt: Prompt, completions: list[Completion], score: dict[int, float]) -> Group:
    return Group(
        prompt=prompt,
        completions=tuple(completions),
        verdicts=tuple(Verdict(status=Status.CORRECT, score=score[c.sample]) for c in completions),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    if options.judge:
        judge(options.folder, tolerance_of(options.dtype))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [
        Prompt(id=str(i), token_ids=tuple(tokenizer(text).input_ids), answer="", source="")
        for i, text in enumerate(TEXTS)
    ]
    digits = np.array(
        [any(c.isdigit() for c in tokenizer.decode([i])) for i in range(len(tokenizer))]
    )
    rank = LearnerRank(
        RankSpec(
            rank=0, world=1, device="cpu", threads=1, timeout=600,
            model=ModelConfig(path=options.model, dtype=options.dtype),
        )
    )  # fmt: skip
    rank.connect(rank.address())
    rank.load(options.model)
    rank.begin_stage(
        OptimConfig.model_validate({"lr": options.lr, "micro_batch_tokens": 512}), 100_000
    )
    saved = options.folder / "checkpoint"
    start = 0
    if (saved / "version").exists():
        start = int((saved / "version").read_text())
        rank.restore(str(saved / "model"))
    engine = EmbeddedEngine(
        options.model, max_num_seqs=8, max_model_len=256, dtype=options.dtype, version=-1
    )
    asyncio.run(play(options, rank, engine, prompts, digits, start, saved))


async def play(
    options: Any, rank: LearnerRank, engine: Any, prompts: list[Prompt], digits: Any, start: int,
    saved: Path,
) -> None:  # fmt: skip
    for version in range(start, options.versions):
        shards = shards_of(rank.policy.model, rank.dtype, 0, 1)
        await engine.apply(dense_patch("run", version, dict(tensor_bytes(shards)).items()))
        requests = [
            (p, 2, Sampling(max_tokens=TOKENS - 4 * i, temperature=1.0, seed=7))
            for i, p in enumerate(prompts)
        ]
        done = [c async for c in engine.generate_all(requests)]
        rewards = {
            (c.prompt_id, c.sample): float(digits[c.token_ids].mean()) + 0.01 * c.sample
            for c in done
        }
        groups = []
        for prompt in prompts:
            mine = sorted((c for c in done if c.prompt_id == prompt.id), key=lambda c: c.sample)
            score = {c.sample: rewards[prompt.id, c.sample] for c in mine}
            values = np.array([score[c.sample] for c in mine])
            group = group_of(prompt, mine, score)
            groups.append(group.with_advantages((values - values.mean()) / (values.std() + 1e-6)))
        batch = flat_batch(groups, LossConfig(), max_length=TOKENS)
        assert batch is not None
        prefill = []
        for group in groups:
            for completion in group.completions:
                ids = [*group.prompt.token_ids, *completion.token_ids.tolist()]
                prefill.append((await engine.probe(ids))[len(group.prompt.token_ids) - 1 :])
        mask = batch.loss_mask_T
        expected = rank.logprobs(batch)[mask]
        rank.step(batch, Objective(loss=LossConfig()))
        after = rank.logprobs(batch)[mask]
        np.savez(
            options.folder / f"{version:05}.npz",
            decode=batch.behaviour_logp_T[mask], prefill=np.concatenate(prefill),
            learner=expected, moved=after, sequence=batch.sequence_ids_T[mask],
            tokens=batch.token_ids_T[mask],
        )  # fmt: skip
        gap = np.abs(np.exp(batch.behaviour_logp_T[mask]) - np.exp(expected)).mean()
        step = np.abs(np.exp(after) - np.exp(expected)).mean()
        print(f"version {version}: noise {gap:.2e}, one update moves {step:.2e}", flush=True)
        if (version + 1) % SAVE_EVERY == 0:
            shutil.rmtree(saved, ignore_errors=True)
            (saved / "model").mkdir(parents=True)
            rank.save(str(saved / "model"))
            (saved / "version").write_text(str(version + 1))
    await engine.close()
    rank.close()


def judge(folder: Path, tolerance: float) -> None:
    """Every recorded version through the probe of what is read, the probe of what is decoded, and
    the gate."""
    probes = {"read": Probe(tolerance), "decoded": Probe(tolerance)}
    gate, nearest = Gate(tolerance), dict.fromkeys(("read", "decoded", "gate"), (0.0, -1))
    alarms, noise, moved = 0, [], []
    files = sorted(folder.glob("?????.npz"))
    for version, file in enumerate(files):
        row = np.load(file)
        starts = np.flatnonzero(np.diff(row["sequence"], prepend=-1))[:6:2]
        part = np.concatenate([np.arange(start, start + FOLLOWED) for start in starts])
        pairs = {
            "read": (row["prefill"], row["learner"].astype(np.float32)),
            "decoded": (row["decode"][part], row["prefill"][part]),
        }
        apart = np.abs(np.exp(row["decode"]) - np.exp(row["learner"])).mean()
        noise.append(apart)
        moved.append(np.abs(np.exp(row["moved"]) - np.exp(row["learner"])).mean())
        ratios = {}
        for name, (found, expected) in pairs.items():
            level, bound = Level.between(found, expected), probes[name]._bound(len(found))
            ratios[name] = max(level.logp / bound.logp, level.p / bound.p)
            probes[name]._levels.append(level)
        figure = gate.check({MEAN: float(apart)}, version=version, moved=moved[-1])
        ratios["gate"] = figure["sync/gate"]
        alarms += any(ratio > 1 for ratio in ratios.values())
        nearest = {n: max(nearest[n], (ratio, version)) for n, ratio in ratios.items()}
    print(f"{len(files)} versions, {alarms} with an alarm; nearest to a bound (1 is the bound):")
    for name, (ratio, version) in nearest.items():
        print(f"  {name}: {ratio:.2f} at version {version}")
    print(
        f"rounding {np.median(noise):.2e} (largest {max(noise):.2e}), one update moves"
        f" {np.median(moved):.2e}, in probabilities"
    )


if __name__ == "__main__":
    main()
