"""End to end beside TRL's GRPOTrainer: rollout, reward and optimizer step on the same model,
prompts, group size and lengths.

Both start from the same random model, so both sample answers of the same length distribution; how
they run says `beside_trl.py`. TRL is needed: pip install trl accelerate. Run: python
tests/benchmarks/bench_vs_trl.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from beside_trl import Work, compare
from harness import Report, arguments

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


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("vs_trl", options.json, "trl", "transformers", "ray")
    rounds, steps = (1, 6) if options.quick else (3, 10)
    for size in ("0.6M",) if options.quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, size)
            work = Work(
                folder=name,
                model=str(folder / "model"),
                dtype="bfloat16",
                group=GROUP,
                prompts=PROMPTS,
                longest_prompt=64,
                longest=MAX_TOKENS,
                steps=steps,
                warmup=2,
                slots=128,
                rollouts=2,
                rollout_cpus=0.5,
                pass_size=GROUP * PROMPTS,
            )
            ours, theirs = compare(work, rounds)
            case, peer = f"{size}, {PROMPTS}x{GROUP} answers", theirs.tokens_per_s
            report.record(case, "trl", peer, "tokens/s", ratio=1.0, length=theirs.length)
            report.record(
                case,
                "emberl",
                ours.tokens_per_s,
                "tokens/s",
                ratio=ours.tokens_per_s / peer,
                floor=2 * peer,
                length=ours.length,
            )


if __name__ == "__main__":
    main()
