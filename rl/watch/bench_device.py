"""`emberl bench device`: the speed of this machine's device, of its link to the host and of its
collectives, as one JSON file.

    {"bench": "device", "device": "Ascend910B3", "count": 8, "versions": {...},
     "gemm": {"bfloat16 4096": FLOP/s, ...}, "memory": {"copy": bytes/s},
     "link": {"to_device": bytes/s, "to_host": bytes/s},
     "collective": {"ranks": 8, "all_reduce": bytes/s, "broadcast": bytes/s},
     "decode": {"running": [...], "context": [...], "seconds": [[...]], "model": "..."},
     "commit": {"copy_bytes_per_s": ..., "hash_bytes_per_s": ..., "scatter_elements_per_s": ...}}

`emberl plan link.rates=FILE` reads `commit`. A part that fails has an `error` instead of figures,
and the others go on. Every figure is the median of several rounds after one that does not count.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...kernels import platform
from ...kernels.platform import Platform
from ...rollout.weights.patch import digest
from .bench_timing import seconds, waiting

PACKAGES = (
    "torch",
    *(p.module for p in platform.PLATFORMS.values() if p.module),
    "vllm",
    "vllm_ascend",
    "transformers",
    "triton_ascend",
    "emberl",
)
MEBI = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes and counts of the measurements."""

    gemm: tuple[int, ...] = (2048, 4096, 8192)
    moved: int = 512 * MEBI
    """Bytes of a copy."""
    reduced: int = 256 * MEBI
    """Bytes of a collective's tensor."""
    elements: int = 4 * MEBI
    """Elements of a scatter, among sixteen times as many."""
    running: tuple[int, ...] = (1, 8, 32, 128)
    context: tuple[int, ...] = (64, 512)
    steps: int = 32
    """Tokens of each answer that are timed."""
    rounds: int = 5
    deadline: float = 120.0
    """Seconds for the processes of a collective, with their start."""


QUICK = Sizes(
    gemm=(256, 512), moved=16 * MEBI, reduced=4 * MEBI, elements=MEBI // 4, running=(1, 4),
    context=(16, 48), steps=8, rounds=3,
)  # fmt: skip
"""Small sizes, for a machine without accelerator, and for a trial whether all parts run."""


def measure(
    device: str = "auto", sizes: Sizes | None = None, model: str | None = None
) -> dict[str, Any]:
    """Runs all parts; results by part. model: a local directory; None: a tiny model made here."""
    target = platform.named(device)
    sizes = sizes or (QUICK if target.is_cpu else Sizes())
    where = platform.device_of_process(target)
    count = 1 if target.is_cpu else int(torch.get_device_module(target.device).device_count())
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "gemm": lambda: gemm(target, where, sizes),
        "memory": lambda: memory(target, where, sizes),
        "link": lambda: link(target, where, sizes),
        "collective": lambda: collective(target, max(2, count) if target.is_cpu else count, sizes),
        "decode": lambda: decode(target, where, sizes, model),
        "commit": lambda: commit(target, where, sizes),
    }
    results: dict[str, Any] = {
        "bench": "device",
        "device": platform.device_name(target) or python_platform.processor() or "CPU",
        "platform": target.device,
        "count": count,
        "machine": {"cores": platform.local_cpus(), "arch": python_platform.machine()},
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
    }
    for name, part in parts.items():
        try:
            results[name] = part()
        except Exception as error:  # a broken part must not cost the figures of the others
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return results


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gemm(
    target: Platform, where: torch.device, sizes: Sizes, dtypes: tuple[torch.dtype, ...] = ()
) -> dict[str, Any]:
    """FLOP/s of square matrix products, by dtype and size, e.g. `bfloat16 4096`. dtypes: by default
    those that the device multiplies fast."""
    if not dtypes:
        wide = target.is_cpu and not platform.supports_bf16(target)
        dtypes = (torch.float32,) if wide else (torch.float32, torch.bfloat16)
    rates = {}
    for dtype in dtypes:
        for n in sizes.gemm:
            a, b = (torch.randn(n, n, device=where).to(dtype) for _ in range(2))
            taken = seconds(
                lambda a=a, b=b: a @ b,  # type: ignore[misc]
                waiting(target),
                sizes.rounds,
            )
            rates[f"{str(dtype).removeprefix('torch.')} {n}"] = 2 * n**3 / taken
    return rates


def memory(target: Platform, where: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second, read plus written, of a copy within the device."""
    a = torch.ones(sizes.moved, dtype=torch.uint8, device=where)
    b = torch.empty_like(a)
    taken = seconds(lambda: b.copy_(a), waiting(target), sizes.rounds)
    return {"copy": 2 * sizes.moved / taken}


def link(target: Platform, where: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second from the host's page-locked memory to the device, and back."""
    host = torch.ones(sizes.moved, dtype=torch.uint8)
    if not target.is_cpu:
        host = host.pin_memory()
    there = torch.empty(sizes.moved, dtype=torch.uint8, device=where)
    wait = waiting(target)
    to = seconds(lambda: there.copy_(host, non_blocking=True), wait, sizes.rounds)
    back = seconds(lambda: host.copy_(there, non_blocking=True), wait, sizes.rounds)
    return {"to_device": sizes.moved / to, "to_host": sizes.moved / back}


def commit(target: Platform, where: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rates of the steps during which an engine pauses for an update: a copy from pageable host
    memory and a digest on one core (bytes/s), and a compare-and-scatter on the device
    (elements/s)."""
    wait = waiting(target)
    host = torch.ones(sizes.moved, dtype=torch.uint8)
    there = torch.empty(sizes.moved, dtype=torch.uint8, device=where)
    copied = seconds(lambda: there.copy_(host), wait, sizes.rounds)
    hashed = seconds(lambda: digest(host.numpy()), lambda: None, sizes.rounds)
    total = 16 * sizes.elements
    weights = torch.zeros(total, dtype=torch.bfloat16, device=where)
    drawn = np.sort(np.random.default_rng(0).choice(total, sizes.elements, replace=False))
    at = torch.from_numpy(drawn).to(where)
    values = torch.ones(sizes.elements, dtype=torch.bfloat16, device=where)

    def write() -> None:
        (weights[at] == values).all()
        weights[at] = values

    scattered = seconds(write, wait, sizes.rounds)
    return {
        "copy_bytes_per_s": sizes.moved / copied,
        "hash_bytes_per_s": sizes.moved / hashed,
        "scatter_elements_per_s": sizes.elements / scattered,
    }


def collective(target: Platform, ranks: int, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second of an all-reduce and of a broadcast, with one process for each device, two on
    a CPU; or an `error`. Processes that have not answered by the deadline are killed."""
    if ranks < 2:
        return {"ranks": ranks, "error": "one device: nothing to exchange"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = f"{__package__}.bench_exchange"
    numbers = [port, sizes.reduced, sizes.rounds, sizes.deadline]
    own = platform.actor_environment(target.device, "learner", os.environ)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, target.device, *map(str, [rank, ranks, *numbers])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )
        for rank in range(ranks)
    ]
    try:
        out, _ = workers[0].communicate(timeout=sizes.deadline)
        answer = json.loads(out) if workers[0].returncode == 0 else {}
    except subprocess.TimeoutExpired:
        answer = {"error": f"no answer in {sizes.deadline:g} s from {ranks} ranks"}
    why = _ended(workers)
    return {
        "ranks": ranks,
        "bytes": sizes.reduced,
        **(answer if "all_reduce" in answer else why or answer),
    }


def _ended(workers: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Kills the ranks that still run. Returns the error of the first rank that had failed by
    itself, since the others may only have waited for it; {} if none had."""
    failed = [rank for rank, worker in enumerate(workers) if worker.poll() not in (None, 0)]
    said = []
    for worker in workers:
        worker.kill()
        said.append(worker.communicate()[1])
    if not failed:
        return {}
    return {"error": f"rank {failed[0]}: {said[failed[0]].strip()[-500:]}"}


def decode(
    target: Platform, where: torch.device, sizes: Sizes, model: str | None
) -> dict[str, Any]:
    """Seconds of a decode step: `seconds[i][j]` with `running[i]` answers, `context[j]` tokens."""
    from ...rollout.embedded.engine import EmbeddedEngine
    from ...rollout.samples import Prompt, Sampling

    with tempfile.TemporaryDirectory() as folder:
        path = model or _tiny(folder)
        engine = EmbeddedEngine(
            path,
            max_num_seqs=max(sizes.running),
            max_model_len=max(sizes.context) + sizes.steps + 1,
            dtype=platform.compute_dtype("auto", target),
            device=str(where),
        )
        table = []
        for running in sizes.running:
            row = []
            for context in sizes.context:
                prompt = Prompt(
                    id=f"{running}-{context}", token_ids=(5,) * context, answer="", source="bench"
                )

                def run(length: int, prompt: Prompt = prompt, running: int = running) -> float:
                    start = time.perf_counter()
                    sampling = Sampling(max_tokens=length, temperature=1.0, seed=0)
                    engine.submit(prompt, running, sampling)
                    engine.run()
                    return time.perf_counter() - start

                run(sizes.steps)  # the first run also compiles and fills caches
                # the prefill is in both, so their difference is of decoding alone
                whole, one = (min(run(n) for _ in range(sizes.rounds)) for n in (sizes.steps, 1))
                # timing noise could make the difference 0 or less
                row.append(max(whole - one, 1e-6) / (sizes.steps - 1))
            table.append(row)
    return {
        "running": list(sizes.running), "context": list(sizes.context), "seconds": table,
        "model": model or "tiny, 0.5M parameters", "engine": "embedded",
    }  # fmt: skip


def _tiny(folder: str) -> str:
    from ..config.tiny import TinyConfig
    from ..data.tiny import make_tiny

    return str(make_tiny(folder, TinyConfig(), seed=0))


def write(results: dict[str, Any], path: Path | None) -> str:
    """The results as JSON text, also written to `path` if there is one."""
    text = json.dumps(results, indent=1)
    if path is not None:
        path.write_text(text + "\n")
    return text
