"""Rollout throughput of the embedded engine beside transformers' `generate`: useful completion
tokens per second.

The work: 128 sequences with prompts of 8 to 32 tokens and forced response lengths of 16 to 128,
mean 72 (no end token, so that both do exactly this work). `generate` has its best honest setting:
one batch of 128, left-padded, a static graph of nothing but decoding; it runs to the longest
response and each sequence is counted to its own length. Both sample at temperature 1; the engine
also returns log-probs. Rounds alternate between the two. Each thread count is a process of its own,
because pools of different sizes in one process disturb each other.

    .venv/bin/python tests/benchmarks/bench_rollout.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from harness import Report, arguments, interleave, median

SEQUENCES, GROUP, SLOTS = 128, 8, 128
SIZES: dict[str, dict[str, int]] = {
    "0.6M": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    | {"num_key_value_heads": 1},
    "4.8M": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    | {"num_key_value_heads": 2},
}
FLOOR = 2.0
"""The engine must be this much faster than `generate` on the quickstart's model (0.6M)."""

Work = list[tuple[tuple[int, ...], int]]
"""(prompt, response length) of each sequence."""


def make_work(sequences: int, group: int, seed: int = 0) -> Work:
    """`group` sequences in a row share a prompt and, because a request has one limit, a length."""
    rng = random.Random(seed)
    lengths = [
        16 + round(112 * i / max(1, sequences // group - 1)) for i in range(sequences // group)
    ]
    rng.shuffle(lengths)
    work: Work = []
    for length in lengths:
        prompt = tuple(rng.randrange(2, 32) for _ in range(rng.randint(8, 32)))
        work += [(prompt, length)] * group
    return work


def make_model(size: str) -> Any:
    """A Qwen3 of this size in float32, made from a seed, that knows no end token."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
        **SIZES[size],
    )
    return Qwen3ForCausalLM(config)


def measure(size: str, dtype: str, threads: int, quick: bool) -> dict[str, Any]:
    """Runs in a process of its own; returns tokens per second of each implementation."""
    import torch
    from emberl.rollout.embedded.engine import EmbeddedEngine
    from emberl.rollout.samples import Prompt, Sampling

    torch.set_num_threads(threads)
    model = make_model(size).eval()
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        engine = EmbeddedEngine(path, max_num_seqs=SLOTS, max_model_len=160, dtype=dtype)
    model = model.to(getattr(torch, dtype))

    def generate(work: Work, attention: str) -> Callable[[], None]:
        width = max(len(prompt) for prompt, _ in work)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt, _ in work])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in work])
        longest = max(length for _, length in work)

        def run() -> None:
            model.set_attn_implementation(attention)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                    max_new_tokens=longest, min_new_tokens=longest,
                )  # fmt: skip
            assert out.shape[1] == width + longest

        return run

    def embedded(work: Work, group: int) -> Callable[[], None]:
        def run() -> None:
            for index in range(0, len(work), group):
                prompt, length = work[index]
                noun = Prompt(id=str(index), token_ids=prompt, answer="", source="bench")
                engine.submit(noun, group, Sampling(max_tokens=length))
            completions = engine.run()
            assert sum(map(len, completions)) == sum(length for _, length in work)

        return run

    alone, groups = make_work(SEQUENCES, 1), make_work(SEQUENCES, GROUP)
    impls = {
        "generate sdpa": generate(alone, "sdpa"),
        "generate eager": generate(alone, "eager"),
        "embedded": embedded(alone, 1),
        "generate sdpa, groups": generate(groups, "sdpa"),
        "generate eager, groups": generate(groups, "eager"),
        f"embedded, groups of {GROUP}": embedded(groups, GROUP),
        f"embedded, groups of {GROUP} unshared": embedded(groups, 1),
    }
    seconds = interleave(impls, 2 if quick else 5)
    tokens = sum(length for _, length in alone)
    grouped = sum(length for _, length in groups)
    return {
        name: (grouped if "groups" in name else tokens) / median(times)
        for name, times in seconds.items()
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", help="SIZE:DTYPE:THREADS, e.g. 0.6M:bfloat16:1")
    parser.add_argument(
        "--worker",
        action="store_true",
        help="print one case's rates as JSON (used by the benchmark)",
    )
    args = parser.parse_args()
    if args.worker:
        size, dtype, threads = args.only.split(":")
        print(json.dumps(measure(size, dtype, int(threads), args.quick)))
        return
    report = Report("rollout", args.json, "transformers")
    cases = [
        f"{size}:{dtype}:{t}" for size in SIZES for dtype in ("bfloat16", "float32") for t in (1, 2)
    ]
    if args.quick:
        cases = cases[:1]
    for case in [args.only] if args.only else cases:
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--only",
            case,
            *(["--quick"] if args.quick else []),
        ]
        threads = case.rsplit(":", 1)[1]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        if done.returncode != 0:
            sys.exit(f"case {case} failed:\n{done.stderr[-2000:]}")
        rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        base = max(
            rate
            for name, rate in rates.items()
            if name.startswith("generate") and "groups" not in name
        )
        shared_base = max(
            rate for name, rate in rates.items() if name.startswith("generate") and "groups" in name
        )
        for name, rate in rates.items():
            ratio = rate / (shared_base if "groups" in name else base)
            floor = FLOOR if case.startswith("0.6M") and name.startswith("embedded") else None
            report.record(case, name, rate, "tokens/s", ratio=ratio, floor=floor)


if __name__ == "__main__":
    main()
