"""The parts of `emberl doctor --live`, each for a process of its own (`live.py`).

products      a matrix product on every card
collectives   a sum and a broadcast over all cards, one process each; two processes on a CPU
engine        an engine starts and decodes; a learner computes the same tokens' log-probs
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...kernels import ascend, platform
from ...rewards.verdict import Status, Verdict
from ...rollout.engine import WorkerSpec, make_engine
from ...rollout.samples import Completion, Prompt, Sampling
from ..algorithm.offpolicy import mismatch_metrics
from ..batch import flat_batch
from ..config.algorithm import LossConfig
from ..config.load import ModelConfig, OptimConfig
from ..config.tiny import TinyConfig
from ..data.tiny import make_tiny
from ..groups import Batch, Group
from ..learner.flops import peak_flops
from ..learner.model_loader import RankSpec
from ..learner.rank import LearnerRank
from . import bench_device
from .bench_device import MEBI, Sizes

TINY = TinyConfig(hidden=128, layers=2, heads=8, kv_heads=4, head_dim=64, init_std=0.2)
"""Has heads for engines of up to eight ranks. Its weights are large, so that its output depends on
every layer: one that computes something else shows in the probabilities."""
PROMPTS, SAMPLES, PROMPT, ANSWER = 4, 4, 24, 40
"""Numbers of prompts and of samples of each, and the tokens of a prompt and of an answer."""


def products(device: str, n: int | None = None) -> dict[str, Any]:
    """`rates`: FLOP/s of a square matrix product in the dtype of training, by number of the card;
    `peak`: FLOP/s of the data sheet, None for a device that is not in the table."""
    target = platform.named(device)
    dtype = platform.compute_dtype("auto", target)
    sizes = Sizes(gemm=(n or (1024 if target.is_cpu else 8192),), rounds=5)
    rates = {}
    for card in range(_cards(target)):
        where = platform.device_of_process(target, card)
        [rates[str(card)]] = bench_device.gemm(target, where, sizes, (dtype,)).values()
    name = platform.device_name(target)
    return {
        "device": name or "CPU", "dtype": str(dtype).removeprefix("torch."), "rates": rates,
        "peak": peak_flops(name),
    }  # fmt: skip


def _cards(target: platform.Platform) -> int:
    return 1 if target.is_cpu else int(torch.get_device_module(target.device).device_count())


def collectives(device: str, deadline: float) -> dict[str, Any]:
    """Bytes a second of an all-reduce and a broadcast; `link`: the data sheet's; None: unknown."""
    target = platform.named(device)
    cards = _cards(target)
    if not target.is_cpu and cards < 2:
        return {"ranks": 1}
    reduced = (4 if target.is_cpu else 256) * MEBI
    rates = bench_device.collective(
        target, max(2, cards), Sizes(reduced=reduced, deadline=deadline)
    )
    generation = ascend.generation_of(platform.device_name(target) or "")
    return rates | {"link": generation.link if generation is not None else None}


def engine(
    device: str, name: str, dtype: str, engine_args: Mapping[str, Any], deadline: float,
    running: int = PROMPTS * SAMPLES,
) -> dict[str, Any]:  # fmt: skip
    """Seconds until the engine was up, tokens a second, and the learner's distance from it as
    training logs it (`mismatch_metrics`); or `error` and `at`, the step that failed."""
    target = platform.named(device)
    threads = platform.local_cpus()
    platform.set_threads(threads)
    report: dict[str, Any] = {"engine": name, "device": target.device, "at": "start"}
    if target.is_cpu and name == "vllm":
        # else it compiles the model and its sampler by g++, which can take minutes
        engine_args = {"enforce_eager": True, **engine_args}
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    report["dtype"] = str(platform.compute_dtype(dtype, target)).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny(folder, TINY, seed=0))
        spec = WorkerSpec(
            model_path=model, device=target.device, dtype=dtype, threads=threads,
            max_num_seqs=running, max_model_len=PROMPT + ANSWER + 1, run_id="doctor",
            timeout=deadline, engine=name, engine_args=engine_args,
        )  # fmt: skip
        try:
            groups = asyncio.run(_decode(spec, report))
            report["at"] = "learner"
            report |= _compared(target, model, dtype, threads, deadline, groups)
        except Exception as error:  # anything: the doctor reports it with the step that failed
            return report | {"error": f"{type(error).__name__}: {error}"[:500]}
    return report


async def _decode(spec: WorkerSpec, report: dict[str, Any]) -> list[Group]:
    start = time.perf_counter()
    up = make_engine(spec, ())
    try:
        report |= {"start_seconds": time.perf_counter() - start, "at": "decoding"}
        generator = np.random.default_rng(0)
        prompts = [
            Prompt(id=str(i), answer="", source="doctor",
                   token_ids=tuple(map(int, generator.integers(4, 20, PROMPT))))
            for i in range(PROMPTS)
        ]  # fmt: skip
        sampling = Sampling(max_tokens=ANSWER, temperature=1.0, seed=0)
        start = time.perf_counter()
        answers: dict[str, list[Completion]] = {prompt.id: [] for prompt in prompts}
        async for answer in up.generate_all([(p, SAMPLES, sampling) for p in prompts]):
            answers[answer.prompt_id].append(answer)
        tokens = sum(len(each) for row in answers.values() for each in row)
        report["tokens_per_second"] = tokens / (time.perf_counter() - start)
    finally:
        await up.close()
    return [_group(prompt, answers[prompt.id]) for prompt in prompts]


def _group(prompt: Prompt, answers: Sequence[Completion]) -> Group:
    right = Verdict(status=Status.CORRECT, score=1.0)
    group = Group(prompt=prompt, completions=tuple(answers), verdicts=(right,) * len(answers))
    return group.with_advantages(np.zeros(len(answers)))


def _compared(
    target: platform.Platform, model: str, dtype: str, threads: int, deadline: float,
    groups: Sequence[Group],
) -> dict[str, Any]:  # fmt: skip
    batch = flat_batch(groups, LossConfig(), max_length=ANSWER)
    assert batch is not None
    settings = ModelConfig.model_validate({"path": model, "dtype": dtype})
    spec = RankSpec(rank=0, world=1, device=target.device, threads=threads, model=settings,
                    timeout=deadline)  # fmt: skip
    return distance(LearnerRank(spec), batch, model)


def distance(learner: LearnerRank, batch: Batch, model: str) -> dict[str, Any]:
    """The mismatch metrics of these tokens with this learner; NaN if a log-prob is not finite."""
    learner.connect(learner.address())
    try:
        learner.load(model)
        learner.begin_stage(OptimConfig(micro_batch_tokens=2048), 1)
        ours = learner.logprobs(batch)
    finally:
        learner.close()
    metrics = mismatch_metrics(
        ours, batch.behaviour_logp_T, batch.loss_mask_T, batch.sequence_ids_T
    )
    # the metrics skip tokens that are not finite, so a broken model could look right
    whole = bool(np.isfinite(ours[batch.loss_mask_T]).all())
    names = ("training/rollout_probs_diff_mean", "training/rollout_probs_diff_max",
             "rollout_corr/k3_kl")  # fmt: skip
    figures = {name: metrics[name] if whole else float("nan") for name in names}
    return {"tokens": batch.num_loss_tokens} | figures


PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "products": products,
    "collectives": collectives,
    "engine": engine,
}
