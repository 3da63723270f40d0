"""The learner on a real model beside a plain loop of transformers and AdamW: python real_learner.py
MODEL [--threads 2].

Both train the same sequences in the same dtype, each in a process of its own that the parent asks
for one step in turn, so that what the machine does between them falls on both. tokens/s by the
medians; processor seconds tell what a loaded machine hides; memory is each process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from emberl.rl.groups import Batch


def make_batch(sequences: int, prompt: int, group: int) -> Batch:
    """Sequences of random tokens, drawn from a fixed seed: 50 to 159 that train behind `prompt`
    that do not, which `group` neighbours have in common."""
    rng = np.random.default_rng(0)
    lengths = prompt + rng.integers(50, 160, sequences)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    mask, count = positions >= prompt, len(positions)
    token_ids = rng.integers(5, 49_000, count).astype(np.int32)
    prompts = rng.integers(5, 49_000, (-(-sequences // group), prompt)).astype(np.int32)
    token_ids[~mask] = prompts.repeat(group, 0)[:sequences].ravel()
    return Batch(
        token_ids_T=token_ids,
        positions_T=positions,
        sequence_ids_T=np.repeat(np.arange(sequences, dtype=np.int32), lengths),
        loss_mask_T=mask,
        behaviour_logp_T=np.full(count, -10, np.float32),
        advantages_T=rng.standard_normal(count) * mask,
        weights_T=mask / mask.sum(),
        num_loss_tokens=int(mask.sum()),
    )


def learner(options: argparse.Namespace, batch: Batch) -> Any:
    """A function that makes one step of ours."""
    from emberl.rl.algorithm.losses import Objective
    from emberl.rl.config.algorithm import LossConfig
    from emberl.rl.config.load import ModelConfig, OptimConfig
    from emberl.rl.learner.model_loader import RankSpec
    from emberl.rl.learner.rank import LearnerRank

    settings = ModelConfig(
        path=options.model, dtype=options.dtype, share_prompts=options.share_prompts
    )
    rank = LearnerRank(
        RankSpec(
            rank=0, world=1, device="cpu", threads=options.threads, model=settings, timeout=600
        )
    )
    rank.connect(rank.address())
    rank.load(options.model)
    optim = OptimConfig.model_validate({"lr": 1e-6, "micro_batch_tokens": options.tokens})
    rank.begin_stage(optim, 100)
    objective = Objective(loss=LossConfig())
    return lambda: rank.step(batch, objective)


def plain(options: argparse.Namespace, batch: Batch) -> Any:
    """A function that makes one step of a policy gradient with transformers, the logits of the loss
    tokens only, sequences sorted by length, and AdamW."""
    import torch
    from emberl.rl.learner.batching import plan_micro_batches
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    policy = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    ).train()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    borders = np.concatenate(([0], np.cumsum(batch.sequence_lengths)))
    tokens = 2048 if options.tokens == "auto" else int(options.tokens)
    (passes,) = plan_micro_batches(batch.sequence_lengths, 1, tokens)

    def step() -> None:
        for chosen in passes:
            spans = [slice(borders[s], borders[s + 1]) for s in chosen]
            width = max(span.stop - span.start for span in spans)
            ids, factors = (
                torch.zeros(len(spans), width, dtype=d) for d in (torch.int64, torch.float32)
            )
            for i, span in enumerate(spans):
                length = span.stop - span.start
                ids[i, :length] = torch.from_numpy(batch.token_ids_T[span].astype(np.int64))
                weights = batch.advantages_T[span] * batch.weights_T[span]
                factors[i, :length] = torch.from_numpy(weights.astype(np.float32))
            rows, columns = factors.nonzero(as_tuple=True)
            hidden = policy.model(input_ids=ids, use_cache=False).last_hidden_state[
                rows, columns - 1
            ]
            logp = (
                policy.lm_head(hidden)
                .float()
                .log_softmax(-1)
                .gather(1, ids[rows, columns][:, None])[:, 0]
            )
            ratio = (logp - logp.detach()).exp()
            (-(ratio * factors[rows, columns]).sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(options: argparse.Namespace) -> None:
    """One implementation: a line of JSON for every line that comes in."""
    import resource

    make = {"learner": learner, "plain": plain}[options.serve]
    step = make(options, make_batch(options.sequences, options.prompt, options.group))
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps({"seconds": seconds, "cpu": time.process_time(), "peak": peak}), flush=True
        )


def measure(
    model: Path,
    *,
    threads: int,
    sequences: int,
    rounds: int,
    tokens: int | str = "auto",
    dtype: str = "bfloat16",
    prompt: int = 40,
    group: int = 1,
    share_prompts: str = "auto",
) -> dict[str, float]:
    """Medians of `rounds` steps of each, after one to warm up: tokens/s, their ratio, peak bytes
    and their ratio. The arguments are the command line's."""
    arguments = [
        str(model),
        f"--threads={threads}",
        f"--tokens={tokens}",
        f"--sequences={sequences}",
        f"--dtype={dtype}",
        f"--prompt={prompt}",
        f"--group={group}",
        f"--share-prompts={share_prompts}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, *arguments, f"--serve={name}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for name in ("plain", "learner")
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    try:
        for _ in range(rounds + 1):
            for name, process in processes.items():
                found[name].append(_ask(process.stdin, process.stdout))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    total = make_batch(sequences, prompt, group).num_tokens
    speeds = {
        name: total / statistics.median(r["seconds"] for r in rows[1:])
        for name, rows in found.items()
    }
    peaks = {name: rows[-1]["peak"] for name, rows in found.items()}
    processor = {
        name: statistics.median(b["cpu"] - a["cpu"] for a, b in pairwise(rows))
        for name, rows in found.items()
    }
    return {
        **{f"{name} tokens/s": speed for name, speed in speeds.items()},
        "speed ratio": speeds["learner"] / speeds["plain"],
        "processor seconds ratio": processor["plain"] / processor["learner"],
        **{f"{name} peak bytes": peak for name, peak in peaks.items()},
        "memory ratio": peaks["plain"] / peaks["learner"],
    }


def _ask(to: IO[str] | None, back: IO[str] | None) -> dict[str, float]:
    assert to is not None and back is not None
    to.write("step\n")
    to.flush()
    line: dict[str, float] = json.loads(back.readline())
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder in Hugging Face format")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens",
        default="auto",
        help="optim.micro_batch_tokens of both; auto: 2048 of the plain one",
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=40, help="tokens that are not trained on")
    parser.add_argument("--group", type=int, default=1, help="sequences with the same prompt")
    parser.add_argument("--share-prompts", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--serve", choices=["learner", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        options.model = str(options.model)
        serve(options)
        return
    found = measure(
        options.model,
        threads=options.threads,
        tokens=options.tokens,
        sequences=options.sequences,
        rounds=options.rounds,
        dtype=options.dtype,
        prompt=options.prompt,
        group=options.group,
        share_prompts=options.share_prompts,
    )
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
