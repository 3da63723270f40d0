"""End to end beside TRL's GRPOTrainer: rollout, reward and optimizer step on the same model,
prompts, group size and lengths.

Both start from the same random model, so both sample answers of the same length distribution, and
both train on every answer (the reward is the share of digits, so no group is without a signal).
emberl runs as it always does, as Ray actors; TRL in a process of its own with as many threads as
there are cores. They take turns. TRL is needed: pip install trl accelerate. Run: python
tests/benchmarks/bench_vs_trl.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import Report, arguments, median

SIZES = {
    "0.6M": {
        "hidden": 128,
        "layers": 3,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 64,
        "intermediate": 384,
    },
    "4.8M": {
        "hidden": 256,
        "layers": 6,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "intermediate": 768,
    },
}
GROUP, PROMPTS, MAX_TOKENS = 8, 32, 96
CONFIG = """
name: bench
stages: [rl]
model: {{path: {model}, dtype: bfloat16}}
data: {{source: {data}, heldout: 0, max_prompt_length: 64}}
rollout: {{group_size: {group}, max_response_length: {tokens}, max_num_seqs: 128}}
reward: {{parts: {{digits: {{use: "{file}:digits"}}}}}}
loss: {{aggregation: token-mean}}
filter: {{zero_variance: false}}
schedule: {{steps: {steps}, prompts_per_step: {prompts}}}
optim: {{lr: 1.0e-6}}
eval: {{size: 0}}
checkpoint: {{every: 0}}
tracking: {{wandb: disabled}}
cluster: {{device: cpu, learners: 2, rollouts: 2, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}}
"""


def digits(completions: Sequence[str], **_: object) -> list[float]:
    """The reward of both, in TRL's form: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def make(folder: Path, size: str) -> None:
    """The model and the prompts that both train on."""
    from emberl.rl.config.data import DataConfig
    from emberl.rl.config.tiny import TinyConfig
    from emberl.rl.data.sources import open_source
    from emberl.rl.data.tiny import make_tiny
    from transformers import AutoTokenizer

    make_tiny(folder / "model", TinyConfig(**SIZES[size]), seed=0)
    source = open_source(
        DataConfig(source="arithmetic", heldout=0), AutoTokenizer.from_pretrained(folder / "model")
    )
    rows = [
        {"prompt": str(source.train(i).columns["question"]), "answer": source.train(i).answer}
        for i in range(2048)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_emberl(folder: Path, steps: int) -> tuple[float, float]:
    """Median completion tokens/s of a step after the first two, and the answers' mean length."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    (folder / "bench.yaml").write_text(
        CONFIG.format(
            model=folder / "model",
            data=folder / "prompts.jsonl",
            group=GROUP,
            tokens=MAX_TOKENS,
            steps=steps,
            prompts=PROMPTS,
            file=Path(__file__).resolve(),
        )
    )
    command = [
        str(Path(sys.executable).with_name("emberl")),
        "train",
        str(folder / "bench.yaml"),
        f"run_dir={run_dir}",
    ]
    subprocess.run(
        command, check=True, timeout=900, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][2:]
    return median([r["perf/sampled_tokens_per_second"] for r in rows]), median(
        [r["response_length/mean"] for r in rows]
    )


def run_trl(folder: Path, steps: int) -> tuple[float, float]:
    """The same of TRL, in a process of its own."""
    command = [sys.executable, __file__, "--trl", str(folder), str(steps)]
    found = subprocess.run(command, check=True, timeout=1800, capture_output=True, text=True)
    speed, length = json.loads(found.stdout.strip().splitlines()[-1])
    return speed, length


def train_with_trl(folder: Path, steps: int) -> None:
    """In the child: prints [tokens/s, mean length] as JSON."""
    import time

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=GROUP * PROMPTS,
        num_generations=GROUP,
        max_steps=steps,
        max_completion_length=MAX_TOKENS,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        use_cpu=True,
        bf16=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16),
        reward_funcs=digits,
        args=config,
        train_dataset=datasets.load_dataset(
            "json", data_files=str(folder / "prompts.jsonl"), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    speeds = [GROUP * PROMPTS * n / s for n, s in zip(lengths, clock.seconds, strict=False)][2:]
    print(json.dumps([median(speeds), median(lengths)]))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trl", nargs=2, default=None, help="internal: be the TRL process")
    options = parser.parse_args()
    if options.trl:
        train_with_trl(Path(options.trl[0]), int(options.trl[1]))
        return
    report = Report("vs_trl", options.json, "trl", "transformers", "ray")
    rounds, steps = (1, 6) if options.quick else (3, 10)
    for size in ("0.6M",) if options.quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, size)
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(run_emberl(folder, steps))
                theirs.append(run_trl(folder, steps))
            case = f"{size}, {PROMPTS}x{GROUP} answers"
            speed, peer = median([s for s, _ in ours]), median([s for s, _ in theirs])
            report.record(case, "trl", peer, "tokens/s", ratio=1.0, length=theirs[0][1])
            report.record(
                case,
                "emberl",
                speed,
                "tokens/s",
                ratio=speed / peer,
                floor=2 * peer,
                length=ours[0][1],
            )


if __name__ == "__main__":
    main()
