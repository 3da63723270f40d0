"""The output layer's loss, forward and backward, against its peers, interleaved in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/benchmarks/bench_loss.py [--quick]
    [--json FILE]

On a CPU the shapes A: 4096 x 512 x 32k and B: 2048 x 1024 x 152k, on a card (`--device cuda`) C:
16k x 3584 x 152k and D: 32k x 2048 x 152k, all bfloat16 (or `--dtype float32`, what one trains in
on a CPU without bfloat16 products). Every line says which share of the measured matrix-product
ceiling its three products (two, one) reach: of bfloat16 products, or of float32 ones where the CPU
has no others worth having. Peers are used where they are installed: trl and liger-kernel
(packages), verl (its file verl/utils/experimental/torch_functional.py is loaded alone); one that
fails, for want of memory say, is listed with its reason. Errors are against float64 on a problem
small enough for it. Peak memory is the process's resident set (a card's: what torch allocated)
above what it was before the call.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness
import torch
from emberl.kernels.loss.fused_loss import linear_logprob, linear_loss
from emberl.kernels.loss.head import product_dtype
from emberl.kernels.loss.terms import TokenStats, TokenTerms
from torch import Tensor

CLIP = 0.2
SHAPES = {
    "A": (4096, 512, 32_000),
    "B": (2048, 1024, 152_000),
    "C": (16_384, 3584, 152_000),
    "D": (32_768, 2048, 152_000),
}
ON_A_CPU, ON_A_CARD = ("A", "B"), ("C", "D")
QUICK = {"quick": (512, 128, 4000)}
SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A batch of `SEQUENCES` equal sequences whose log-probs look like a trained model's."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantage: Tensor
    """[N], equal within a sequence"""

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.targets), device=self.targets.device) // (
            len(self.targets) // SEQUENCES
        )


def problem(
    n: int, h: int, v: int, device: torch.device, *, half: bool = False, dtype: torch.dtype
) -> Problem:
    g = torch.Generator(device).manual_seed(0)
    on = {"generator": g, "device": device}
    weight = torch.randn(v, h, **on) * h**-0.5
    targets = torch.randint(0, v, (n,), **on)
    peak = torch.rand(n, 1, **on) * 20 + 5
    hidden = (weight[targets] * peak + torch.randn(n, h, **on) * 0.5).to(dtype)
    weight = weight.to(dtype)
    logp = linear_logprob(hidden, weight, targets, backend="chunked").logp
    old = (logp + 0.05 * torch.randn(n, **on)).clamp(max=0)
    advantage = torch.randn(SEQUENCES, **on)
    if half:
        advantage[::2] = 0
    return Problem(
        hidden=hidden, weight=weight, targets=targets, old=old,
        advantage=advantage.repeat_interleave(n // SEQUENCES),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenClip:
    """PPO-clip, the mean over tokens."""

    p: Problem
    whole_sequences: bool = False
    needs_entropy: bool = False

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        advantage = self.p.advantage[index] / len(self.p.old)
        ratio = torch.exp(stats.logp - self.p.old[index])
        plain, bounded = ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
        return TokenTerms(
            loss=-torch.minimum(plain, bounded), dlogp=torch.where(plain <= bounded, -plain, 0.0)
        )


@dataclass(frozen=True, kw_only=True)
class SequenceClip:
    """GSPO: the clipped ratio is the sequence's geometric mean, the loss is the mean over
    sequences."""

    p: Problem
    whole_sequences: bool = True
    needs_entropy: bool = False

    def __call__(self, stats: TokenStats, index: Tensor) -> TokenTerms:
        length = len(self.p.old) // SEQUENCES
        log_ratio = (stats.logp - self.p.old[index]).view(-1, length).mean(1)
        advantage = self.p.advantage[index].view(-1, length)[:, 0] / SEQUENCES
        ratio = torch.exp(log_ratio)
        plain, bounded = ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
        loss, slope = -torch.minimum(plain, bounded), torch.where(plain <= bounded, -plain, 0.0)
        return TokenTerms(
            loss=(loss / length).repeat_interleave(length),
            dlogp=(slope / length).repeat_interleave(length),
        )


def from_logp(p: Problem, logp: Tensor, *, sequences: bool) -> Tensor:
    """The same two losses for autograd."""
    log_ratio, advantage = logp - p.old, p.advantage
    if sequences:
        log_ratio, advantage = (
            log_ratio.view(SEQUENCES, -1).mean(1),
            advantage.view(SEQUENCES, -1)[:, 0],
        )
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers() -> dict[str, LogProb]:
    """Differentiable log-probs [N] of each peer that is installed."""
    found: dict[str, LogProb] = {
        "naive": lambda h, w, y: (h @ w.t()).float().log_softmax(-1).gather(1, y[:, None])[:, 0],
        "naive in float32": (
            lambda h, w, y: (h.float() @ w.float().t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
        ),
        "torch linear_cross_entropy": lambda h, w, y: (
            -torch.nn.functional.linear_cross_entropy(h, w, y, reduction="none").float()
        ),
    }
    if (utils := optional("trl.trainer.utils")) is not None:
        chunked = importlib.import_module("trl.kernels.chunked_logprob")
        found["trl on logits"] = lambda h, w, y: utils.selective_log_softmax(h @ w.t(), y).float()
        found["trl chunked"] = lambda h, w, y: chunked.ChunkedLogProbFunction.apply(
            h, w, None, y, 1.0, 4096
        )[0]
    if (scaled := optional("liger_kernel.ops.fused_linear_scaled_cross_entropy")) is not None:
        found["liger scaled CE"] = lambda h, w, y: (
            -scaled.LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y)
        )
    if (verl := importlib.util.find_spec("verl")) is not None and verl.origin is not None:
        path = Path(verl.origin).parent / "utils/experimental/torch_functional.py"
        spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        head = module.FusedLinearForPPO()
        found["verl fused"] = lambda h, w, y: head(h, w, y)[0]
    return found


@lru_cache
def optional(name: str) -> Any:
    """The module, or None with the reason printed where it or something that it needs is not
    installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"left out: {name} ({error})")
        return None


def liger_loss(p: Problem, h: Tensor, w: Tensor, *, sequences: bool) -> Tensor:
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=h.device.type != "cpu",
        use_ref_model=False,
        loss_type="grpo" if sequences else "dapo",
        importance_sampling_level="sequence" if sequences else "token",
    )
    shape = (SEQUENCES, -1)
    value: Tensor = loss(
        h.view(*shape, h.shape[1]),
        w,
        p.targets.view(shape),
        torch.ones_like(p.targets).view(shape),
        p.advantage.view(shape)[:, 0],
        old_per_token_logps=p.old.view(shape),
    )[0]
    return value


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed; `products` are the matrix products that the floor counts."""

    products: int
    half: bool = False
    frozen: bool = False
    gradients: bool = True
    sequences: bool = False


CASES = {
    "full": Case(products=3),
    "frozen head": Case(products=2, frozen=True),
    "log-prob only": Case(products=1, gradients=False),
    "half without signal": Case(products=3, half=True),
    "GSPO": Case(products=3, sequences=True),
}


def leaves(p: Problem, case: Case) -> tuple[Tensor, Tensor]:
    return p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_(not case.frozen)


def runs(p: Problem, case: Case) -> dict[str, Callable[[], Any]]:
    """Every implementation of a case, as a function without arguments that returns when its work is
    done."""

    def ours() -> None:
        if not case.gradients:
            with torch.no_grad():
                linear_logprob(p.hidden, p.weight, p.targets, shift=p.old)
            return
        h, w = leaves(p, case)
        loss = SequenceClip(p=p) if case.sequences else TokenClip(p=p)
        linear_loss(h, w, p.targets, loss, shift=p.old, sequence_ids=p.ids)[0].backward()

    def peer(logprob: LogProb) -> Callable[[], None]:
        def run() -> None:
            if not case.gradients:
                with torch.no_grad():
                    logprob(p.hidden, p.weight, p.targets)
                return
            h, w = leaves(p, case)
            from_logp(p, logprob(h, w, p.targets), sequences=case.sequences).backward()

        return run

    def liger() -> None:
        h, w = leaves(p, case)
        liger_loss(p, h, w, sequences=case.sequences).backward()

    found: dict[str, Callable[[], Any]] = {"emberl": ours} | {
        name: peer(f) for name, f in peers().items()
    }
    if importlib.util.find_spec("liger_kernel") is not None and case.gradients:
        found["liger fused GRPO"] = liger
    return {name: finished(run, p.hidden.device) for name, run in found.items()}


def finished(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run`, waiting for the card."""
    if device.type == "cpu":
        return run

    def wait() -> None:
        run()
        torch.get_device_module(device).synchronize()

    return wait


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """The best matrix product of this process in the dtype that ours makes them in, in TFLOP/s."""
    dtype, best = product_dtype(dtype, device), 0.0
    sizes = ((4096, 512, 1024), (4096, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 2048))
    if device.type != "cpu":
        sizes = ((8192, 8192, 8192), (32768, 3584, 4096), (32768, 4096, 3584))
    for m, k, n in sizes:
        a, b = (
            torch.randn(m, k, device=device).to(dtype),
            torch.randn(k, n, device=device).to(dtype),
        )
        out = torch.empty(m, n, dtype=dtype, device=device)
        product = finished(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        product()
        for _ in range(4):
            start = time.perf_counter()
            product()
            best = max(best, 2e-12 * m * k * n / (time.perf_counter() - start))
    return best


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Puts into the list the peak of what a card's tensors take, or of the resident set (sampled
    every 2 ms), above its value at entry, in MiB."""
    if device.type != "cpu":
        card = torch.get_device_module(device)
        card.reset_peak_memory_stats()
        start, result = card.memory_allocated(), [0.0]
        yield result
        result[0] = (card.max_memory_allocated() - start) / 2**20
        return
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page  # noqa: E731
    # or memory that an earlier call left with malloc would hide this one's
    ctypes.CDLL(None).malloc_trim(0)
    start, result, stop = resident(), [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            result[0] = max(result[0], resident() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def errors(report: harness.Report, device: torch.device, wanted: Callable[[str], bool]) -> None:
    """Log-prob and gradient errors of every implementation against float64 autograd."""
    p = problem(512, 256, 8000, device, dtype=torch.bfloat16)
    h, w = p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()
    exact = (h @ w.t()).log_softmax(-1).gather(1, p.targets[:, None])[:, 0]
    from_logp(p, exact, sequences=False).backward()
    assert h.grad is not None and w.grad is not None
    norms = h.grad.norm(dim=1)
    known = peers()
    for name in filter(wanted, runs(p, CASES["full"])):
        mine_h, mine_w = leaves(p, CASES["full"])
        logp = None
        with reported(name, "errors"):
            if name == "emberl":
                value, stats, _ = linear_loss(
                    mine_h, mine_w, p.targets, TokenClip(p=p), shift=p.old
                )
                logp = stats.logp
            elif name in known:
                logp = known[name](mine_h, mine_w, p.targets)
                value = from_logp(p, logp, sequences=False)
            else:
                value = liger_loss(p, mine_h, mine_w, sequences=False)
            value.backward()
        if mine_h.grad is None or mine_w.grad is None:
            continue
        error = (mine_h.grad - h.grad).norm(dim=1)
        off = (
            torch.full_like(exact, float("nan")) if logp is None else (logp - exact).detach().abs()
        )
        report.record(
            "error 512x256x8000",
            name,
            float(off.mean()),
            "nat",
            logp_max=float(off.max()),
            dh=float(error.norm() / norms.norm()),
            dw=float((mine_w.grad - w.grad).norm() / w.grad.norm()),
            dh_row_p99=float((error[norms > 0] / norms[norms > 0]).quantile(0.99)),
        )


@contextmanager
def reported(name: str, what: str) -> Iterator[None]:
    """Prints why a peer cannot do this here (too little memory, a kernel that does not compile);
    ours must."""
    try:
        yield
    except Exception as error:
        if name == "emberl":
            raise
        print(f"left out: {name} in {what} ({type(error).__name__}: {str(error)[:200]})")


def measure(
    report: harness.Report,
    label: str,
    p: Problem,
    case: Case,
    rounds: int,
    wanted: Callable[[str], bool],
) -> None:
    """One case of one shape: a record for each implementation."""
    dtype, device, peaks = p.hidden.dtype, p.hidden.device, {}
    chosen = {name: run for name, run in runs(p, case).items() if wanted(name)}
    for name, run in chosen.items():
        with reported(name, label), peak_memory(device) as peak:
            run()
            peaks[name] = peak
    top = ceiling(dtype, device)
    seconds = harness.in_turns({name: chosen[name] for name in peaks}, rounds)
    top = max(top, ceiling(dtype, device))
    flops = 2e-12 * case.products * p.hidden.numel() * len(p.weight) * (0.5 if case.half else 1.0)
    mine = harness.median(seconds["emberl"])
    for name, times in seconds.items():
        took = harness.median(times)
        report.record(
            label,
            name,
            took,
            "s",
            ratio=took / mine,
            floor=flops / top,
            best=min(times),
            ceiling_tflops=top,
            percent=100 * flops / top / took,
            peak_mib=peaks[name][0],
            threads=torch.get_num_threads(),
        )


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="only this shape (may be repeated)"
    )
    parser.add_argument(
        "--case", choices=CASES, action="append", help="only this case (may be repeated)"
    )
    parser.add_argument(
        "--impl", action="append", help="only implementations whose name contains this; ours always"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, help="instead of the shape's, for CPUs with slow products"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()

    def wanted(name: str) -> bool:
        return name == "emberl" or args.impl is None or any(part in name for part in args.impl)

    report = harness.Report("loss", args.json, "triton", "trl", "liger-kernel", "verl")
    if args.device.type != "cpu":
        report.machine["card"] = torch.get_device_module(args.device).get_device_name()
    if product_dtype(getattr(torch, args.dtype), args.device) != getattr(torch, args.dtype):
        print(
            "this CPU has no bfloat16 products: peers take minutes a run, at a vocabulary of 152k"
            " hours for a table; --tokens 256 --rounds 1 shortens that, --dtype float32 compares"
            " what one would train in here"
        )
    errors(report, args.device, wanted)
    usual = ON_A_CPU if args.device.type == "cpu" else ON_A_CARD
    shapes = QUICK if args.quick else {name: SHAPES[name] for name in args.shape or usual}
    for shape, (tokens, *widths) in shapes.items():
        label = shape + (f" ({args.tokens} tokens)" if args.tokens else "")
        label += " float32" if args.dtype == "float32" else ""
        for name in args.case or CASES:
            case = CASES[name]
            dtype: torch.dtype = getattr(torch, args.dtype)
            p = problem(args.tokens or tokens, *widths, args.device, half=case.half, dtype=dtype)
            measure(report, f"{label} {name}", p, case, 1 if args.quick else args.rounds, wanted)


if __name__ == "__main__":
    main()
