"""What an engine stands still for: a version loaded whole beside one of which only what changed is
written, on a random model of Qwen2.5-0.5B's shape of which 1 % changed.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_commit.py [--quick]
    [--json FILE] [--engines embedded vllm] [--dtypes bfloat16 float32] [--layers 24]
    [--words 151936] [--rounds 5]

One line per engine, dtype and way ("whole": a dense version; "in place": a patch):
pause     seconds for which decoding stands still (of the middle round), its share of the whole
          version's, and the CPU seconds of all processes for it, which a busy machine leaves alone.
prepare   seconds beside decoding: a patch to positions and values, proved by digest.
memory    bytes beside the engine's own at the most (PSS of all processes less that of the engine
          after its start, and without what the benchmark has freed), over the model's.
floor     (embedded, CPU seconds of one thread) the same changes written without any proof, where
          they lie known: by a bare loop into the plain weights, and into the plain weights and
          oneDNN's copies; as `index_copy_` into the plain weights; and the changed bytes as one copy
          of memory. The ratio is the time of apply and proof (compared, written and read back, all
          of it in the pause) over that.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness
import numpy as np
import psutil
import torch
from emberl.kernels import platform
from emberl.rollout.weights.apply import resolve
from emberl.rollout.weights.codec import elements
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import TensorBytes, WeightPatch, dense_patch
from emberl.rollout.weights.tensors import write_model

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Qwen2.5-0.5B's config.json; it has 24 layers and 151,936 words."""
CHANGED = 0.01
NAMES = {"bfloat16": "BF16", "float32": "F32"}
BARS = {"pause": 0.10, "apply": 2.0, "memory": 1.1}


def make_model(folder: Path, dtype: str, layers: int, words: int) -> dict[str, TensorBytes]:
    settings = {**SHAPE, "num_hidden_layers": layers, "vocab_size": words, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, 896)}
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", 896, 896),
            ("self_attn.k_proj", 128, 896),
            ("self_attn.v_proj", 128, 896),
            ("self_attn.o_proj", 896, 896),
            ("mlp.gate_proj", 4864, 896),
            ("mlp.up_proj", 4864, 896),
            ("mlp.down_proj", 896, 4864),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
            if name[10:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"model.layers.{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (896,)
    shapes["model.norm.weight"] = (896,)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.from_numpy(rng.standard_normal(shape, np.float32)) * 0.02
        data = values.to(getattr(torch, dtype)).view(-1).view(torch.uint8).numpy()
        tensors[name] = TensorBytes(dtype=NAMES[dtype], shape=shape, data=data)
    write_model(folder / "model.safetensors", tensors)
    return tensors


def next_version(tensors: dict[str, TensorBytes], seed: int) -> dict[str, TensorBytes]:
    """One element in a hundred goes to the next representable number."""
    rng, after = np.random.default_rng(seed), {}
    for name, tensor in tensors.items():
        data = tensor.data.copy()
        bits = elements(data, 2 if tensor.dtype == "BF16" else 4)
        bits[rng.random(len(bits), np.float32) < CHANGED] += 1
        after[name] = replace(tensor, data=data)
    return after


def make_engine(kind: str, folder: Path, dtype: str) -> Any:
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 128, "dtype": dtype}
    serving: dict[str, Any] = {"run_id": "bench", "version": -1, "deadline_s": 600}
    if kind == "embedded":
        from emberl.rollout.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(folder, **settings, **serving)
    from emberl.rollout.vllm_backend.compat import EngineSettings
    from emberl.rollout.vllm_backend.engine import VLLMEngine

    own = EngineSettings(model=str(folder), **settings, engine_args={"enforce_eager": True})
    return VLLMEngine(own, **serving)


class Processes:
    """This one and those that it has started."""

    def __init__(self) -> None:
        self.all = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def settled(self) -> int:
        """`pss`, once this process has given back what it freed."""
        platform.give_back_memory()
        return self.pss()

    def pss(self) -> int:
        total = 0
        for process in self.all:
            rows = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(row.split()[1]) for row in rows if row.startswith("Pss:"))
        return total

    def cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.all)

    @contextmanager
    def peak(self, every: float = 0.1) -> Iterator[list[int]]:
        """Within, the most memory that was seen."""
        seen, end = [self.pss()], threading.Event()

        def look() -> None:
            while not end.wait(every):
                seen.append(self.pss())

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield seen
        finally:
            end.set()
            looking.join()
            seen.append(self.pss())


def floors(engine: Any, patch: WeightPatch, rounds: int) -> dict[str, float]:
    """Seconds to write the same changes, and back, without any proof."""
    # not above: vLLM's processes read this file, too, and do not start where numba was loaded
    from emberl.kernels.patch_coding import scatter
    from emberl.rollout.weights.in_place import Writing

    found = {n: [p.find(c) for p in engine.decoder.places(n)[0]] for n, c in patch.changes.items()}

    def into(kinds: slice) -> None:
        for places in found.values():
            for place in places[kinds]:
                scatter.write(place.memory, place.at, place.new)

    there = Writing((n, c, engine.decoder.places(n)[0]) for n, c in patch.changes.items())

    plain = [
        (torch.from_numpy(at.astype(np.int64)), *map(signed, (memory, new)))
        for [(memory, at, _, new, *_), *_] in found.values()
    ]

    def index_copy() -> None:
        for at, memory, new in plain:
            memory.index_copy_(0, at, new)

    new = np.concatenate([c.new for c in patch.changes.values()])
    out = np.empty_like(new)
    ways = {
        "memory copy of the changed bytes": lambda: np.copyto(out, new),
        "index_copy_, plain weights": index_copy,
        "loop, plain weights": lambda: into(slice(0, 1)),
        "loop, plain weights and copies": lambda: into(slice(None)),
        "compared, written and read back": there.write,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            if name.startswith("compared"):
                there.take_back()  # a comparison with what lies there finds what it should
            start = time.thread_time()  # other programs run meanwhile
            way()
            seconds[name].append(time.thread_time() - start)
    there.take_back()
    return {name: min(found[1:]) for name, found in seconds.items()}


def signed(values: Any) -> torch.Tensor:
    return torch.from_numpy(values.view(f"i{values.itemsize}"))


async def measure(
    report: harness.Report,
    kind: str,
    dtype: str,
    folder: Path,
    layers: int,
    words: int,
    rounds: int,
) -> None:
    case = f"{kind}, {dtype}"
    tensors = make_model(folder, dtype, layers, words)
    size = float(sum(tensor.data.nbytes for tensor in tensors.values()))
    engine = make_engine(kind, folder, dtype)
    processes = Processes()
    own, version = processes.settled(), 0
    found: dict[str, dict[str, list[float]]] = {
        way: {"pause": [], "cpu": [], "prepare": [], "memory": [], "kept": []}
        for way in ("whole", "in place")
    }
    await engine.apply(dense_patch("bench", 0, tensors.items()))
    base = processes.settled()
    floor: dict[str, float] = {}
    for number in range(rounds + 1):
        for way, rows in found.items():
            version += 1
            after = next_version(tensors, version)
            sent = encode(engine.held, after, run_id="bench", version=version)
            if way == "whole":
                sent = dense_patch("bench", version, after.items())
            del after
            before = processes.settled()
            start = time.perf_counter()
            with processes.peak() as seen:
                patch = sent if way == "whole" else resolve(sent, engine.held)
                patch = replace(patch, verified=True)
                prepared = time.perf_counter() - start
                cpu = processes.cpu()
                await engine.apply(patch)
                cpu = processes.cpu() - cpu
            tensors = {name: engine.held.tensors[name] for name in tensors}
            tensors = {n: replace(t, data=t.data.copy()) for n, t in tensors.items()}
            if number == 0:  # compiles, learns where tensors lie
                continue
            rows["pause"].append(engine.pause_s)
            rows["cpu"].append(cpu)
            rows["prepare"].append(prepared)
            # what the benchmark itself holds of a patch as it came is not the engine's
            rows["memory"].append(base - own + max(seen) - before)
            rows["kept"].append(before - own)
            if kind == "embedded" and way == "in place" and number == 1:
                back = replace(patch, changes={n: swapped(c) for n, c in patch.changes.items()})
                floor = floors(engine, back, rounds)
    await engine.close()
    whole = harness.median(found["whole"]["pause"])
    for way, rows in found.items():
        middle = {name: harness.median(values) for name, values in rows.items()}
        bar = BARS["pause"] if way == "in place" else None
        report.record(
            case,
            f"{way}: pause",
            middle["pause"],
            "s",
            ratio=middle["pause"] / whole,
            floor=bar,
            cpu_s=middle["cpu"],
            prepare_s=middle["prepare"],
            beside_the_engine=middle["memory"] / size,
            kept=middle["kept"] / size,
        )
    for impl, seconds in floor.items():
        proved = floor["compared, written and read back"]
        report.record(case, impl, seconds, "s", ratio=proved / seconds, floor=BARS["apply"])


def swapped(change: Any) -> Any:
    return replace(change, old=change.new, new=change.old, checksum=-change.checksum)


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    kinds = ("embedded", "vllm")
    parser.add_argument("--engines", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--layers", type=int, default=24, help="of Qwen2.5-0.5B's 24")
    parser.add_argument("--words", type=int, default=151_936, help="of its vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    report = harness.Report("commit", arguments.json, "numpy", "numba", "vllm")
    layers, words = (2, 4096) if arguments.quick else (arguments.layers, arguments.words)
    for kind in arguments.engines:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                rounds = 1 if arguments.quick else arguments.rounds
                work = measure(report, kind, dtype, Path(folder), layers, words, rounds)
                asyncio.run(work)


if __name__ == "__main__":
    main()
