"""A real language model on this machine beside its peers: decoding, a whole GRPO step, and the
learner's part of it.

    python tests/benchmarks/bench_real.py [decode] [step] [learner] [--model DIR] [--vllm PYTHON]
    [--sequences 64 128] [--prompts 32] [--quick] [--json FILE]

`make smollm2` leaves the model (SmolLM2-135M-Instruct, bfloat16) where it is looked for. Every
implementation has a process of its own with as many threads as there are cores; they take turns, so
that a machine that drifts hits them alike, and the ratio is the median of those of the rounds.
Nothing else may run meanwhile.

- decode: chat prompts in groups of 8, forced response lengths of 16 to 128, temperature 1,
  log-probs of the sampled tokens. `generate` has one left-padded batch in the order of the lengths
  that suits it best, each sequence counted to its own length.
  vLLM: `LLM.generate` with n=8, compiled; `--vllm` is the interpreter that has it (`make test-vllm`
      makes one).
  VLLM_EAGER=1 leaves its compiler out. BENCH_REAL_DTYPE=float32 compares all in float32.
- step: 32 prompts x 8 answers, TRL's GRPOTrainer beside `emberl train`, both on every answer.
- learner: `real_learner.py`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from beside_trl import Work as Steps
from beside_trl import compare
from harness import Report, arguments, median, served

ROOT = Path(__file__).parents[2]
GROUP, LONGEST = 8, 128
SETTLE_S = 1.0
EAGER = os.environ.get("VLLM_EAGER") == "1"
DTYPE = os.environ.get("BENCH_REAL_DTYPE", "bfloat16")
"""Of all that is compared; float32 is for a CPU that does not multiply bfloat16."""
FLOPS_A_TOKEN = 0.27e9
"""Of the 135M model, decoding."""

Work = list[tuple[str, int]]
"""(question, response length) of each group of 8."""


def make_work(sequences: int) -> Work:
    rng = random.Random(0)
    groups = sequences // GROUP
    lengths = [16 + round((LONGEST - 16) * i / max(1, groups - 1)) for i in range(groups)]
    rng.shuffle(lengths)
    return [
        (f"What is {rng.randrange(10, 99)} + {rng.randrange(10, 99)}? Explain.", n) for n in lengths
    ]


def prompt_ids(model: str, work: Work) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _ in work
    ]


def embedded(model: str, work: Work) -> Callable[[], int]:
    import torch
    from emberl.rollout.embedded.engine import EmbeddedEngine
    from emberl.rollout.samples import Prompt, Sampling

    torch.set_num_threads(os.cpu_count() or 1)
    engine = EmbeddedEngine(model, max_num_seqs=len(work) * GROUP, max_model_len=256, dtype=DTYPE)
    prompts = prompt_ids(model, work)

    def run() -> int:
        for number, (ids, (_, length)) in enumerate(zip(prompts, work, strict=True)):
            prompt = Prompt(id=str(number), token_ids=tuple(ids), answer="", source="bench")
            engine.submit(prompt, GROUP, Sampling(max_tokens=length))
        return sum(len(completion) for completion in engine.run())

    return run


def generate(model: str, work: Work) -> Callable[[], int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, DTYPE), attn_implementation="sdpa"
    ).eval()
    prompts = [ids for ids in prompt_ids(model, work) for _ in range(GROUP)]
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    longest = max(length for _, length in work)

    def run() -> int:
        with torch.inference_mode():
            policy.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
                min_new_tokens=longest,
                pad_token_id=2,
            )
        return sum(length for _, length in work) * GROUP

    return run


def vllm(model: str, work: Work) -> Callable[[], int]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=DTYPE,
        max_model_len=256,
        max_num_seqs=len(work) * GROUP,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        disable_log_stats=True,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=EAGER,
    )
    prompts: Any = [{"prompt_token_ids": ids} for ids in prompt_ids(model, work)]
    parameters = [
        SamplingParams(n=GROUP, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False)
        for _, length in work
    ]

    def run() -> int:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return run


SIDES: dict[str, Callable[[str, Work], Callable[[], int]]] = {
    "embedded": embedded,
    "generate": generate,
    "vllm": vllm,
}


def serve(side: str, model: str, sequences: int) -> None:
    """In a process of its own: a round for every line that comes in, answered by its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes there
    work = make_work(sequences)
    run, expected = SIDES[side](model, work), sum(length for _, length in work) * GROUP
    for _ in sys.stdin:
        start = time.perf_counter()
        assert run() == expected
        print(time.perf_counter() - start, file=answers, flush=True)
    os._exit(0)  # vLLM's processes outlive an engine that just ends


def serving(
    side: str, model: str, sequences: int, python: str
) -> AbstractContextManager[Callable[[], float]]:
    """The seconds of one round of `side`, each time it is called."""
    threads = os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
    }
    return served(side, [python, __file__, "--serve", side, model, str(sequences)], environment)


def decode(
    report: Report, model: str, vllm_python: str | None, rounds: int, sizes: list[int]
) -> None:
    for sequences in sizes:
        tokens = sum(length for _, length in make_work(sequences)) * GROUP
        sides = {"generate": sys.executable, "embedded": sys.executable}
        if vllm_python:
            sides["vllm"] = vllm_python
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        with ExitStack() as opened:
            ready = {
                side: opened.enter_context(serving(side, model, sequences, python))
                for side, python in sides.items()
            }
            for number in range(1 + rounds):
                for side, run in ready.items():
                    time.sleep(SETTLE_S)
                    took = run()
                    if number:  # the first round warms up
                        seconds[side].append(took)
        for side, times in seconds.items():
            ratio = median(
                [base / own for base, own in zip(seconds["generate"], times, strict=True)]
            )
            rate = tokens / median(times)
            floor = 2.0 if side == "embedded" else None
            report.record(
                f"decode {sequences}",
                side,
                rate,
                "tokens/s",
                ratio=ratio,
                floor=floor,
                tflops=rate * FLOPS_A_TOKEN / 1e12,
            )


def step(report: Report, model: str, prompts: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = [question for question, _ in make_work(GROUP * 512)]
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"question": q, "answer": "0"}) + "\n" for q in questions)
        )
        chats = [{"prompt": [{"role": "user", "content": q}]} for q in questions]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        steps = Steps(
            folder=str(folder),
            asked="chats.jsonl",
            model=model,
            dtype=DTYPE,
            group=GROUP,
            prompts=prompts,
            longest_prompt=96,
            longest=LONGEST,
            steps=3,
            warmup=1,
            slots=256,
            rollouts=1,
            rollout_cpus=1,
            pass_size=32,
        )
        ours, theirs = compare(steps, rounds)
        case, ratio = f"step {prompts}x{GROUP}", ours.tokens_per_s / theirs.tokens_per_s
        report.record(case, "trl", theirs.tokens_per_s, "tokens/s", ratio=1.0, length=theirs.length)
        report.record(
            case,
            "emberl",
            ours.tokens_per_s,
            "tokens/s",
            ratio=ratio,
            floor=3.0,
            length=ours.length,
        )


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "parts", nargs="*", default=[], help="decode, step, learner; all by default"
    )
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m"))
    parser.add_argument(
        "--vllm", default=None, metavar="PYTHON", help="an interpreter that has vLLM"
    )
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[64, 128], help="of decode, multiples of 8"
    )
    parser.add_argument("--prompts", type=int, default=32, help="of a step")
    parser.add_argument("--serve", nargs=3, help="internal: SIDE MODEL SEQUENCES")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], args.serve[1], int(args.serve[2]))
        return
    if not (Path(args.model) / "config.json").exists():
        sys.exit(
            f"{args.model} holds no model; `make smollm2` makes models/smollm2-135m, or give"
            " --model DIR"
        )
    report = Report("real", args.json, "transformers", "trl", "ray")
    parts = args.parts or ["decode", "step", "learner"]
    if "decode" in parts:
        decode(report, args.model, args.vllm, 1 if args.quick else 3, args.sequences)
    if "step" in parts:
        step(report, args.model, 8 if args.quick else args.prompts, 1)
    if "learner" in parts:
        import real_learner

        for name, group in (("learner", 1), ("learner, 8 answers to a prompt", 8)):
            found = real_learner.measure(
                Path(args.model),
                threads=os.cpu_count() or 1,
                sequences=64,
                rounds=1 if args.quick else 3,
                group=group,
                dtype=DTYPE,
            )
            for side, ratio in (("plain", 1.0), ("learner", found["speed ratio"])):
                report.record(
                    name,
                    side,
                    found[f"{side} tokens/s"],
                    "tokens/s",
                    ratio=ratio,
                    floor=1.5 if side == "learner" else None,
                    peak_gb=found[f"{side} peak bytes"] / 1e9,
                )


if __name__ == "__main__":
    main()
