"""A step of `emberl train` beside one of TRL's GRPOTrainer: rollout, reward and optimizer step on the
same model, prompts, group size and lengths. `bench_real.py` and `bench_vs_trl.py` say which.

Both train on every answer (the reward is the share of digits, so no group is without a signal).
emberl runs as it always does, as Ray actors; TRL in a process of its own, which is this file, with
as many threads as there are cores. They take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness import median

CONFIG = """
name: bench
stages: [rl]
model: {{path: {model}, dtype: {dtype}}}
data: {{source: {folder}/prompts.jsonl, heldout: 0, max_prompt_length: {longest_prompt}}}
rollout: {{group_size: {group}, max_response_length: {longest}, max_num_seqs: {slots}}}
reward: {{parts: {{digits: {{use: "{file}:digits"}}}}}}
loss: {{aggregation: token-mean}}
filter: {{zero_variance: false}}
schedule: {{steps: {steps}, prompts_per_step: {prompts}}}
optim: {{lr: 1.0e-6}}
eval: {{size: 0}}
checkpoint: {{every: 0}}
tracking: {{wandb: disabled}}
cluster: {{device: cpu, learners: 2, rollouts: {rollouts}, cpus_per_learner: 0.5, cpus_per_rollout: {rollout_cpus}}}
"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both do."""

    folder: str
    """Holds `prompts.jsonl`, the rows of emberl, and takes what the runs write."""
    asked: str = "prompts.jsonl"
    """The file there with TRL's rows."""
    model: str
    dtype: str
    group: int
    prompts: int
    """Of a step."""
    longest_prompt: int
    longest: int
    """Tokens of an answer."""
    steps: int
    warmup: int
    """Steps at the beginning that do not count."""
    slots: int
    """Answers that a rollout worker of emberl's decodes at a time."""
    rollouts: int
    rollout_cpus: float
    pass_size: int
    """Answers in one pass of TRL's."""


class Speed(NamedTuple):
    tokens_per_s: float
    """Completion tokens, the median step's."""
    length: float
    """Of an answer, the median of the steps' means."""


def digits(completions: list[Any], **_: object) -> list[float]:
    """The reward of both, in TRL's form: the share of digits."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def compare(work: Work, rounds: int) -> tuple[Speed, Speed]:
    """(emberl's, TRL's): medians of the speeds in so many pairs of runs, lengths of the first."""
    pairs = [(emberl_steps(work), trl_steps(work)) for _ in range(rounds)]
    ours, theirs = (
        Speed(median([speed.tokens_per_s for speed in side]), side[0].length)
        for side in zip(*pairs, strict=True)
    )
    return ours, theirs


def emberl_steps(work: Work) -> Speed:
    run_dir = Path(tempfile.mkdtemp(dir=work.folder))
    config = Path(work.folder) / "bench.yaml"
    config.write_text(CONFIG.format(**asdict(work), file=Path(__file__).resolve()))
    command = [str(Path(sys.executable).with_name("emberl")), "train", str(config)]
    subprocess.run(
        [*command, f"run_dir={run_dir}"], check=True, timeout=3600, stdout=subprocess.DEVNULL
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[work.warmup :]
    rows = [json.loads(line) for line in lines]
    return Speed(
        median([row["perf/sampled_tokens_per_second"] for row in rows]),
        median([row["response_length/mean"] for row in rows]),
    )


def trl_steps(work: Work) -> Speed:
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    found = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(work))],
        check=True,
        timeout=3600,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return Speed(*json.loads(found.stdout.strip().splitlines()[-1]))


def train_with_trl(work: Work) -> Speed:
    """In the process of its own."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    clock, folder = Clock(), Path(work.folder)
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work.pass_size,
        gradient_accumulation_steps=work.group * work.prompts // work.pass_size,
        num_generations=work.group,
        max_steps=work.steps,
        max_completion_length=work.longest,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        use_cpu=True,
        bf16=work.dtype == "bfloat16",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype)),
        reward_funcs=digits,
        args=config,
        train_dataset=datasets.load_dataset(
            "json", data_files=str(folder / work.asked), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[clock],
    )
    trainer.train()
    logged = trainer.state.log_history
    lengths = [row[name] for row in logged if (name := "completions/mean_length") in row]
    answers = work.group * work.prompts
    speeds = [answers * n / s for n, s in zip(lengths, clock.seconds, strict=False)]
    return Speed(median(speeds[work.warmup :]), median(lengths))


if __name__ == "__main__":
    print(json.dumps(train_with_trl(Work(**json.loads(sys.argv[1])))))
