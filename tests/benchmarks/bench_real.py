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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from harness import Report, arguments, median

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


@contextmanager
def served(side: str, model: str, sequences: int, python: str) -> Iterator[Callable[[], float]]:
    """The seconds of one round of `side`, each time it is called."""
    command = [python, __file__, "--serve", side, model, str(sequences)]
    threads = str(os.cpu_count() or 1)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def round_of(asked: IO[str] = asked, answers: IO[str] = answers) -> float:
            asked.write("\n")
            asked.flush()
            answer = answers.readline()
            if not answer:
                log.seek(0)
                sys.exit(f"{side} failed:\n{log.read()[-3000:]}")
            return float(answer)

        yield round_of
        asked.close()
        process.kill()


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
                side: opened.enter_context(served(side, model, sequences, python))
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


CONFIG = """
name: bench
stages: [rl]
model: {{path: {model}, dtype: {dtype}}}
data: {{source: {data}, heldout: 0, max_prompt_length: 96}}
rollout: {{group_size: {group}, max_response_length: {tokens}, max_num_seqs: 256}}
reward: {{parts: {{digits: {{use: "{file}:digits"}}}}}}
loss: {{aggregation: token-mean}}
filter: {{zero_variance: false}}
schedule: {{steps: {steps}, prompts_per_step: {prompts}}}
optim: {{lr: 1.0e-6}}
eval: {{size: 0}}
checkpoint: {{every: 0}}
tracking: {{wandb: disabled}}
cluster: {{device: cpu, learners: 2, rollouts: 1, cpus_per_learner: 0.5, cpus_per_rollout: 1}}
"""


def digits(completions: list[Any], **_: object) -> list[float]:
    """The reward of both, in TRL's form: the share of digits."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def emberl_step(folder: Path, model: str, prompts: int, steps: int) -> tuple[float, float]:
    """Median completion tokens/s of a step after the first, and the answers' mean length."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    (folder / "bench.yaml").write_text(
        CONFIG.format(
            model=model,
            dtype=DTYPE,
            data=folder / "prompts.jsonl",
            group=GROUP,
            tokens=LONGEST,
            steps=steps,
            prompts=prompts,
            file=Path(__file__).resolve(),
        )
    )
    command = [
        str(Path(sys.executable).with_name("emberl")),
        "train",
        str(folder / "bench.yaml"),
        f"run_dir={run_dir}",
    ]
    subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    return median([r["perf/sampled_tokens_per_second"] for r in rows]), median(
        [r["response_length/mean"] for r in rows]
    )


def trl_step(folder: Path, model: str, prompts: int, steps: int) -> tuple[float, float]:
    """The same of TRL, in a process of its own."""
    command = [sys.executable, __file__, "--trl", str(folder), model, str(prompts), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    found = subprocess.run(
        command, check=True, timeout=3600, stdout=subprocess.PIPE, text=True, env=environment
    )
    speed, length = json.loads(found.stdout.strip().splitlines()[-1])
    return speed, length


def train_with_trl(folder: Path, model: str, prompts: int, steps: int) -> None:
    """In the child: prints [tokens/s, mean length] as JSON."""
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

    clock = Clock()
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=32,
        gradient_accumulation_steps=GROUP * prompts // 32,
        num_generations=GROUP,
        max_steps=steps,
        max_completion_length=LONGEST,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        use_cpu=True,
        bf16=DTYPE == "bfloat16",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, DTYPE)),
        reward_funcs=digits,
        args=config,
        train_dataset=datasets.load_dataset(
            "json", data_files=str(folder / "chats.jsonl"), split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    speeds = [GROUP * prompts * n / s for n, s in zip(lengths, clock.seconds, strict=False)][1:]
    print(json.dumps([median(speeds), median(lengths)]))


def step(report: Report, model: str, prompts: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = [question for question, _ in make_work(GROUP * 512)]
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"question": q, "answer": "0"}) + "\n" for q in questions)
        )
        chats = [{"prompt": [{"role": "user", "content": q}]} for q in questions]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(emberl_step(folder, model, prompts, 3))
            theirs.append(trl_step(folder, model, prompts, 3))
        speed, peer = median([s for s, _ in ours]), median([s for s, _ in theirs])
        case = f"step {prompts}x{GROUP}"
        report.record(case, "trl", peer, "tokens/s", ratio=1.0, length=theirs[0][1])
        report.record(
            case, "emberl", speed, "tokens/s", ratio=speed / peer, floor=3.0, length=ours[0][1]
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
    parser.add_argument("--trl", nargs=4, help="internal: FOLDER MODEL PROMPTS STEPS")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], args.serve[1], int(args.serve[2]))
        return
    if args.trl:
        train_with_trl(Path(args.trl[0]), args.trl[1], int(args.trl[2]), int(args.trl[3]))
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
