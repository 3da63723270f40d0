"""The engines by name (`rollout.engine`): the only place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..kernels import platform
from . import vllm_compat
from .engine import Engine
from .service import InFlight
from .transport import Link, TokenBucket


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a rollout worker needs to start its engine."""

    model_path: str
    device: str
    """A platform's name, as in `cluster.device`."""
    dtype: str
    """As in `model.dtype`."""
    threads: int
    max_num_seqs: int
    max_model_len: int
    run_id: str
    timeout: float
    """Seconds that one burst of decoding or one weight update may take."""
    in_flight: InFlight = "update"
    """As in `schedule.in_flight`."""
    engine: str = "embedded"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's own, by its names."""
    max_restarts: int = 0
    """How often vLLM's processes are started anew."""
    rate_limit: float | None = None
    """As in `sync.rate_limit`."""

    def link(self) -> Link:
        """The worker's end of the way that weights take."""
        return Link(timeout=self.timeout, bucket=None if self.rate_limit is None else TokenBucket(self.rate_limit))


def check_engine(engine: str, engine_args: Mapping[str, Any]) -> None:
    """ValueError for what can be known to be wrong before an engine starts; loads neither torch nor vLLM."""
    if engine == "vllm":
        vllm_compat.check_installed()
        vllm_compat.check_engine_args(engine_args)
    elif engine_args:
        raise ValueError(
            f"rollout.engine_args has {', '.join(engine_args)}, which are vLLM's; set rollout.engine=vllm or leave them out"
        )


def make_engine(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    """The engine of a rollout worker, up and ready; its version is -1 until the first patch. cards: the worker's own."""
    return {"embedded": _embedded, "vllm": _vllm}[spec.engine](spec, cards)


def _embedded(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    from .embedded import EmbeddedEngine

    target = platform.named(spec.device)
    return EmbeddedEngine(
        spec.model_path,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        dtype=platform.compute_dtype(spec.dtype, target),
        device=str(platform.device_of_process(target)),
        run_id=spec.run_id,
        version=-1,
        deadline_s=spec.timeout,
    )


def _vllm(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    from .vllm_engine import VLLMEngine

    dtype = platform.compute_dtype(spec.dtype, platform.named(spec.device))
    return VLLMEngine(
        spec.model_path,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        device=spec.device,
        threads=spec.threads,
        cards=cards,
        run_id=spec.run_id,
        version=-1,
        deadline_s=spec.timeout,
        max_restarts=spec.max_restarts,
        engine_args=spec.engine_args,
    )


__all__ = ["WorkerSpec", "check_engine", "make_engine"]
