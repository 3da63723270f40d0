"""Weight patches: how small, how fast, how little decoding waits for them.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_sync.py [--quick]
    [--json FILE] [--only PART ...]

ratio     the weights' bytes / a patch's, header included, beside other lossless codes, on two
traces: GRPO on the
          quickstart's model (`emberl train` runs here and keeps its history), and a random model of
          Qwen2.5-0.5B's shape under AdamW with back-propagated gradients (of its 24 layers
          --layers, and the whole embedding).
          `bound, independent`: entropy if every element of a tensor changed by itself, all with one
              probability.
          `bound, by exponent`: the same, each exponent with its own probability and its own
              distribution of changes.
speed     bytes of weights a second on one core. `diff`: nothing changed; `encode`, `decode`: of the
trace. exposed   `emberl train` with every worker behind a token bucket of 20 MB/s: patches and
whole weights over the weak link,
          whole weights over the strong one; tokens/s and the share of a step that decoding stood
          still.
network   the same weights over a real link: two network namespaces joined by a veth pair with
`tc tbf rate 160mbit`, an
          engine that decodes on the far side. Needs root.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
import numpy as np
import traces
import zstandard
from emberl.rollout.weights.apply import changed_elements, materialise
from emberl.rollout.weights.codec import decode_chunk, encode_chunk
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.dtypes import ELEMENT_BYTES
from emberl.rollout.weights.patch import Weights, digest
from emberl.rollout.weights.wire_format import from_bytes, to_bytes

PARTS = ("ratio", "speed", "exposed", "network")
BARS = {0.009: 150.0, 0.023: 60.0}
"""Changed fraction, at most -> the ratio asked for."""
BF16_BYTES = ELEMENT_BYTES["BF16"]


def entropy(counts: np.ndarray) -> float:
    """Bits a symbol."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def bound(old: np.ndarray, new: np.ndarray) -> float:
    """Bits, if elements change independently with one probability."""
    changed = old != new
    share = np.array([changed.sum(), (~changed).sum()], float)
    if not changed.any():
        return 0.0
    steps = np.unique((new[changed] - old[changed]).view(np.int16), return_counts=True)[1].astype(
        float
    )
    return len(old) * entropy(share) + steps.sum() * entropy(steps)


def bound_by_exponent(old: np.ndarray, new: np.ndarray) -> float:
    exponents = old >> 7 & 255
    return sum(bound(old[exponents == e], new[exponents == e]) for e in np.unique(exponents))


def naive(old: np.ndarray, new: np.ndarray) -> bytes:
    """Gaps of one byte with an escape, values XORed, zstd-3: the code that the reference measured
    at 95x for 1.5 %."""
    positions = np.flatnonzero(old != new)
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = np.repeat(255, int((gaps // 255).sum())).astype(np.uint8)
    values = (old[positions] ^ new[positions]).view(np.uint8).reshape(-1, 2).T
    return b"".join(
        zstandard.ZstdCompressor(3).compress(np.ascontiguousarray(part).tobytes())
        for part in ((gaps % 255).astype(np.uint8), escapes, values)
    )


def sizes(step: traces.Step) -> dict[str, float]:
    """Bytes by code; the rivals without any header, checksum or digest."""
    found = dict.fromkeys(
        ["dense", "index32 + value", "dense XOR + zstd-1", "gap8 + XOR + zstd-3"], 0.0
    )
    found |= {"bound, independent": 0.0, "bound, by exponent": 0.0}
    for name, tensor in step.new.items():
        old, new = step.old[name].data.view(np.uint16), tensor.data.view(np.uint16)
        found["dense"] += tensor.data.nbytes
        found["index32 + value"] += 6.0 * np.count_nonzero(old != new)
        planes = np.ascontiguousarray((old ^ new).view(np.uint8).reshape(-1, 2).T)
        found["dense XOR + zstd-1"] += len(zstandard.ZstdCompressor(1).compress(planes.tobytes()))
        found["gap8 + XOR + zstd-3"] += len(naive(old, new))
        found["bound, independent"] += bound(old, new) / 8
        found["bound, by exponent"] += bound_by_exponent(old, new) / 8
    return found


def weights_of(tensors: traces.Tensors, version: int) -> Weights:
    digests = {name: digest(tensor.data) for name, tensor in tensors.items()}
    return Weights(run_id="bench", version=version, tensors=tensors, digests=digests)


def ratio(report: harness.Report, step: traces.Step) -> None:
    base = weights_of(step.old, 0)
    patch = encode(base, step.new, run_id="bench", version=1)
    data = to_bytes(patch)
    after = materialise(from_bytes(data), base)
    assert after.digests == weights_of(step.new, 1).digests
    found = {"emberl patch": float(len(data)), **sizes(step)}
    elements = found["dense"] / 2
    changed = changed_elements(patch) / elements
    floor = next((least for most, least in BARS.items() if changed <= most), None)
    for impl, size in found.items():
        times = found["dense"] / size if size else float("inf")
        report.record(
            step.name,
            impl,
            size,
            "bytes",
            ratio=times,
            floor=floor if impl == "emberl patch" else None,
            changed=changed,
            bits_per_change=8 * size / max(1.0, changed * elements),
        )


def speed(report: harness.Report, step: traces.Step, rounds: int) -> None:
    """Of the largest tensor that fits 64 MiB, in chunks as the encoder takes them."""
    name = max(
        (n for n, t in step.new.items() if t.data.nbytes <= 64 << 20),
        key=lambda n: step.new[n].data.nbytes,
    )
    old, new = (np.ascontiguousarray(t[name].data) for t in (step.old, step.new))
    parts = [slice(start, start + (1 << 20)) for start in range(0, new.nbytes, 1 << 20)]
    chunks = [encode_chunk(old[part], new[part], BF16_BYTES) for part in parts]
    out = np.empty_like(new)

    def decode() -> None:
        for part, chunk in zip(parts, chunks, strict=True):
            decode_chunk(chunk, old[part], out[part], BF16_BYTES)

    seconds = harness.interleave(
        {
            "diff, unchanged": lambda: [
                encode_chunk(old[part], old[part].copy(), BF16_BYTES) for part in parts
            ],
            "encode": lambda: [encode_chunk(old[part], new[part], BF16_BYTES) for part in parts],
            "decode": decode,
            "digest": lambda: digest(new),
        },
        rounds,
    )
    assert np.array_equal(out, new)
    changed = float((old.view(np.uint16) != new.view(np.uint16)).mean())
    best = {impl: min(times) for impl, times in seconds.items()}
    best["encode + decode"] = best["encode"] + best["decode"]
    for impl, time in best.items():
        floor = {"diff, unchanged": 2.0, "encode + decode": 1.0}.get(impl)
        report.record(
            f"{step.name}, speed",
            impl,
            new.nbytes / time / 1e9,
            "GB/s",
            floor=floor,
            changed=changed,
        )


SIZES = {
    "quickstart": ("schedule.prompts_per_step=8", "rollout.max_response_length=48"),
    "100M": (
        "model.tiny={hidden: 768, layers: 12, heads: 12, kv_heads: 4, head_dim: 64, intermediate: 3072, init_std: 0.02}",
        "schedule.prompts_per_step=2",
        "rollout.group_size=4",
        "rollout.max_response_length=24",
        "rollout.max_num_seqs=8",
    ),
}
WEAK = 20e6
"""Bytes a second."""
LINKS = {
    "strong link, dense": ("sync.mode=dense",),
    "weak link, patches": ("sync.mode=patch", f"sync.rate_limit={WEAK:g}"),
    "weak link, dense": ("sync.mode=dense", f"sync.rate_limit={WEAK:g}"),
}
REWARD = """
import zlib
from emberl.rewards import reward
@reward
def noise(row):
    return zlib.crc32(row.completion.encode()) % 2
"""


def exposed(report: harness.Report, size: str, steps: int) -> None:
    """Runs that are ahead by one version; the first two steps warm up. What the answers are worth
    is a coin's toss, so that a model with random weights has gradients."""
    speeds = {}
    for link, overrides in LINKS.items():
        with tempfile.TemporaryDirectory() as folder:
            reward = Path(folder, "noise.py")
            reward.write_text(REWARD)
            rows = traces.train(
                Path(folder),
                "stages=[rl]",
                *SIZES[size],
                *overrides,
                "model.dtype=bfloat16",
                "optim.lr=1e-6",
                "optim.schedule=constant",
                "optim.warmup_steps=0",
                f"schedule.steps={steps}",
                "schedule.max_staleness=1",
                "eval.size=0",
                "checkpoint.every=0",
                "cluster.rollouts=1",
                "cluster.cpus_per_rollout=1",
                f"reward.parts.answer.use={reward}:noise",
                f"run_dir={folder}/run",
            )[2:]
        seconds = sum(row["timing_s/step"] for row in rows)
        tokens = sum(row["perf/sampled_tokens_per_second"] * row["timing_s/step"] for row in rows)
        speeds[link] = tokens / seconds
        mean = {
            name: sum(row[name] for row in rows) / len(rows)
            for name in rows[0]
            if name.startswith(("sync/", "timing_s/"))
        }
        stood_still = sum(row["sync/apply_s"] for row in rows) / seconds
        report.record(
            f"{size}, one version ahead",
            link,
            speeds[link],
            "tokens/s",
            ratio=speeds[link] / speeds["strong link, dense"],
            floor=0.95 if link == "weak link, patches" else None,
            decoding_stood_still=stood_still,
            step_s=mean["timing_s/step"],
            update_s=mean["timing_s/update_weights"],
            wire_mb=mean["sync/wire_bytes"] / 1e6,
            transfer_s=mean["sync/transfer_s"],
            prepare_s=mean["sync/prepare_s"],
            apply_s=mean["sync/apply_s"],
            encode_s=mean["sync/encode_s"],
            diff_s=mean["sync/diff_s"],
            changed=mean.get("sync/changed_fraction", -1.0),
        )


def network(report: harness.Report, sizes: Sequence[str], steps: int) -> None:
    """The slot count and the length give the decoding of a batch, `step_s` the learner's part."""
    import weak_link
    from emberl.rl.config.tiny import TinyConfig
    from emberl.rl.data.tiny import make_tiny

    large = {
        "hidden": 768,
        "layers": 12,
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 64,
        "intermediate": 3072,
    }
    cases: dict[str, tuple[TinyConfig, dict[str, float]]] = {
        "quickstart": (TinyConfig(init_std=0.02), {"slots": 64, "length": 96, "step_s": 1.0}),
        "100M": (TinyConfig(init_std=0.02, **large), {"slots": 16, "length": 96, "step_s": 8.0}),
    }
    for size in sizes:
        shape, settings = cases[size]
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "model": str(make_tiny(folder, shape, 0)),
                "steps": steps,
                "lr": 1e-6,
                **settings,
            }
            best = 0.0
            for link in LINKS:
                rate = "160mbit" if link.startswith("weak") else None
                mode = "patch" if link.endswith("patches") else "dense"
                found = weak_link.measure(options | {"mode": mode}, rate)
                best = best or found["tokens_s"]
                rate_s = found.pop("tokens_s")
                report.record(
                    f"{size}, veth + tbf",
                    link,
                    rate_s,
                    "tokens/s",
                    ratio=rate_s / best,
                    floor=0.95 if mode == "patch" else None,
                    stood_still=found["apply_s"] / found["step_s"],
                    **found,
                )


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=4, help="of Qwen2.5-0.5B's 24 (default 4)")
    parser.add_argument(
        "--sizes", nargs="+", choices=tuple(SIZES), default=None, help="for exposed and network"
    )
    arguments = parser.parse_args()
    report = harness.Report("sync", arguments.json, "numpy", "numba", "zstandard")
    quick = arguments.quick
    if "ratio" in arguments.only or "speed" in arguments.only:
        qwen = traces.qwen(
            (5.5e-7, 1.6e-6),
            layers=1 if quick else arguments.layers,
            steps=2 if quick else 8,
            tokens=128,
        )
        for step in qwen:
            if "ratio" in arguments.only:
                ratio(report, step)
            if "speed" in arguments.only:
                speed(report, step, 3 if quick else 15)
    sizes = arguments.sizes or (["quickstart"] if quick else list(SIZES))
    for size in sizes if "exposed" in arguments.only else ():
        exposed(report, size, 4 if quick else 12 if size == "quickstart" else 6)
    if "network" in arguments.only:
        network(report, sizes, steps=4 if quick else 6)
    if "ratio" in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            rates = (1e-6,) if quick else (1e-6, 3e-6, 8e-6)
            for step in traces.quickstart(
                Path(folder), rates, sft_steps=60 if quick else 300, steps=3 if quick else 12
            ):
                ratio(report, step)


if __name__ == "__main__":
    main()
