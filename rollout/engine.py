"""The protocol `Engine`, through which a rollout worker uses any decoder, and the engines by name.

Every coroutine runs on one event loop; an engine does its computing elsewhere, so the loop stays
free. `make_engine` is the only place that knows all engines (`rollout.engine`).
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels import platform
from .model_directory import model_directory
from .samples import Completion, Prompt, Sampling
from .vllm_backend import compat as vllm_compat
from .weights.canary import Canary
from .weights.engine_transfer import BroadcastGroup
from .weights.patch import WeightPatch, Weights
from .weights.transport import FetchContext, TokenBucket

Request = tuple[Prompt, int, Sampling]
"""A prompt, how many samples of it, and how they are drawn."""

Partials = Mapping[str, Sequence[Completion]]
"""Completions that are to go on from where they stand, by the id of their prompt."""

InFlight = Literal["update", "finish", "park"]
"""As in `schedule.in_flight`."""


class Engine(Protocol):
    """Decodes prompts with versioned weights that can be changed while it decodes."""

    @property
    def version(self) -> int:
        """The version of the weights that the next token is sampled from."""
        ...

    @property
    def held(self) -> Weights | None:
        """The served weights as the engine's own bytes, read-only for the caller; the next version
        overwrites only what it changes. None before the first patch, and while the loaded weights
        are not verified."""
        ...

    @property
    def joined(self) -> BroadcastGroup | None:
        """The group through which the learners can send weights into the engine's own processes;
        None where there is none."""
        ...

    def generate_all(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Completion]:
        """Yields the n completions of each request as they finish (samples 0..n-1, in any order),
        each prompt computed once.

        All requests are submitted at once. ValueError, before any of them is taken, if one cannot
        be served (prompt and `max_tokens` beyond the engine's length, a bad sampling value).
        Requests that are aborted leave the stream: it ends after those that were not.

        partials: prompt id -> aborted completions of it. Of such a request only these samples are
        decoded, from where they stand (none of them at `max_tokens`): what they have keeps its
        log-probs and spans, and is read with the weights of now. They come back whole.
        """
        ...

    async def apply(self, patch: WeightPatch) -> int:
        """Swaps the weights at a token boundary and returns the version now served.

        A patch's own digests are compared before anything changes, unless that was done
        (`WeightPatch.verified`), and what is served when it is loaded.
        Tokens sampled before keep the old version in their spans, those after carry the new one. A
        patch of the version already served changes nothing. VersionError: another run, a version
        that goes backwards, or a patch on another base. DigestMismatchError: the bytes are not
        those of the learners; such bytes are never served.
        """
        ...

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        """Ends every unfinished sample of these prompts; returns what each had decoded
        (`finish_reason` "abort").

        They come from here only, not from the streams of `generate_all`. A sample not yet started
        comes without a token.
        """
        ...

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probs [T-1] of all tokens [T] but the first by the served weights, without a
        temperature.

        An end-to-end proof that digests cannot give: an engine that goes on multiplying by a packed
        copy of old weights holds the right bytes.
        """
        ...

    async def canary(self, canary: Canary | None) -> None:
        """Loads this canary of the served weights, or with None takes it back, by the same path as
        updates, verified by digest, under the same version, while nothing else runs. Raises
        DigestMismatchError if it cannot be taken back; the engine then serves nothing until a whole
        patch comes."""
        ...

    async def sleep(self, level: int) -> None:
        """Frees the device for the learners once nothing is decoded: level 1 keeps the weights in
        the machine's memory, level 2 drops them. Requests wait until the next `apply` or `wake`.
        Idempotent."""
        ...

    async def wake(self) -> None:
        """Serves what it served before `sleep`, loaded and verified anew. Does nothing if it is not
        asleep."""
        ...

    async def reload(self) -> None:
        """Loads all weights that it was given once more, after a probe showed that it computes with
        others."""
        ...

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that the engine was given to serve."""
        ...

    async def close(self) -> None:
        """Ends all streams and frees the device. Idempotent."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """Settings with which a rollout worker starts its engine."""

    model_path: str
    """A local directory or a Hub id."""
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
    """vLLM's own arguments by name, or those of a user's engine."""
    token_rate: float | None = None
    """As in `rollout.token_rate`."""
    max_restarts: int = 0
    """Most restarts of vLLM's processes."""
    server: str = ""
    """Address of a running vLLM to use instead of starting one."""
    servers_directory: str | None = None
    """As in `rollout.servers_directory`."""
    rate_limit: float | None = None
    """As in `sync.rate_limit`."""

    def link(self) -> FetchContext:
        """The settings with which the worker fetches weights: deadline and rate limit."""
        return FetchContext(
            timeout=self.timeout,
            bucket=None if self.rate_limit is None else TokenBucket(self.rate_limit),
        )


def check_engine(engine: str, engine_args: Mapping[str, Any], servers: Sequence[str] = ()) -> None:
    """Raises ValueError for settings that can be found wrong before an engine starts. Loads neither
    torch nor vLLM, only a user's own engine."""
    if servers:
        check_servers(engine, engine_args, servers)
    elif engine == "vllm":
        vllm_compat.check_installed()
        vllm_compat.check_engine_args(engine_args)
    elif engine not in BUILT_IN:
        _own(engine)
    elif engine_args:
        raise ValueError(
            f"rollout.engine_args has {', '.join(engine_args)}, which are vLLM's; set"
            " rollout.engine=vllm or leave them out"
        )


def check_servers(engine: str, engine_args: Mapping[str, Any], servers: Sequence[str]) -> None:
    """Raises ValueError for settings that do not fit `rollout.servers`; needs no vLLM here."""
    if engine != "vllm":
        raise ValueError(
            f"rollout.servers are vLLM's, but rollout.engine={engine}; set rollout.engine=vllm"
        )
    if engine_args:
        raise ValueError(
            f"rollout.engine_args has {', '.join(engine_args)}, but rollout.servers run already:"
            " give them to `vllm serve`"
        )
    for url in servers:
        if not url.startswith(("http://", "https://")) or servers.count(url) > 1:
            raise ValueError(
                f"rollout.servers: {url!r} must be an address like http://host:8000, and stand"
                " there once"
            )


def make_engine(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    """Starts the engine of a rollout worker, which owns these cards. Its version is -1 until the
    first patch."""
    return (BUILT_IN.get(spec.engine) or _own(spec.engine))(spec, cards)


def _own(engine: str) -> Callable[[WorkerSpec, tuple[str, ...]], Engine]:
    """The factory of a user's engine, `package.module:factory`. Raises ValueError if it cannot be
    loaded."""
    module, _, name = engine.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"rollout.engine={engine!r} cannot be loaded ({error}); give {', '.join(BUILT_IN)}, or"
            " package.module:factory"
        ) from error
    made: Callable[[WorkerSpec, tuple[str, ...]], Engine] = factory
    return made


def _embedded(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    from .embedded.engine import EmbeddedEngine

    target = platform.named(spec.device)
    return EmbeddedEngine(
        model_directory(spec.model_path),
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        dtype=platform.compute_dtype(spec.dtype, target),
        device=str(platform.device_of_process(target, platform.card_index(target, cards))),
        run_id=spec.run_id,
        version=-1,
        deadline_s=spec.timeout,
        token_rate=spec.token_rate,
    )


def _vllm(spec: WorkerSpec, cards: tuple[str, ...]) -> Engine:
    from .vllm_backend.engine import VLLMEngine

    dtype = platform.compute_dtype(spec.dtype, platform.named(spec.device))
    settings = vllm_compat.EngineSettings(
        model=spec.model_path,
        dtype=str(dtype).removeprefix("torch."),
        device=spec.device,
        threads=spec.threads,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        cards=cards,
        engine_args=spec.engine_args,
    )
    return VLLMEngine(
        settings,
        run_id=spec.run_id,
        version=-1,
        deadline_s=spec.timeout,
        max_restarts=spec.max_restarts,
        server=spec.server,
        servers_directory=spec.servers_directory,
    )


BUILT_IN: Mapping[str, Callable[[WorkerSpec, tuple[str, ...]], Engine]] = {
    "embedded": _embedded,
    "vllm": _vllm,
}
