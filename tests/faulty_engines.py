"""Engines that decode with something else than they hold, as captured graphs, packed copies and
caches do: an embedded engine with a second set of weights for decoding, and one behind vLLM's
interface that pretends to capture."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emberl.rollout.embedded.cpu_step import CPUStep
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.matrix import Matrix
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Prompt, Sampling
from emberl.rollout.vllm_backend import engine_processes
from emberl.rollout.vllm_backend.compat import EngineSettings
from emberl.rollout.vllm_backend.engine import VLLMEngine
from emberl.rollout.vllm_backend.requests import Decoded
from emberl.rollout.vllm_backend.shared_memory import Entry, read_mirror
from emberl.rollout.weights.patch import digest

KINDS = (
    "one version behind",
    "twenty versions behind",
    "one tensor old",
    "one worker of two old",
    "tied head not packed anew",
    "transposed layer",
    "cache kept from before",
)


@dataclass(kw_only=True)
class Fault:
    """kind: one of `KINDS`, or empty. begins: the version from which on; before it all is well.
    tensor: the one that stays old."""

    kind: str = ""
    begins: int = 0
    tensor: str = ""


def shadowed(engine: EmbeddedEngine, fault: Fault) -> Callable[[int], None]:
    """Gives the engine's batch weights of its own for decoding; what is returned brings these up to
    date after a load into version v, but for the fault."""
    batch, decoder = engine._batch, engine.decoder
    copy = Decoder(decoder.arch, decoder.dtype)
    if fault.kind.startswith("tied head"):
        copy.head = Matrix(torch.empty_like(copy.embedding))
    copy.reserve(batch.max_model_len)
    past: deque[Mapping[str, torch.Tensor]] = deque(maxlen=21)
    cached: dict[tuple[int, ...], Any] = {}
    prefill = batch._prefill

    def refresh(version: int) -> None:
        now = {name: tensor.clone() for name, tensor in decoder.weights.items()}
        if not past:
            past.extend([now] * 21)
        broken = version >= fault.begins
        past.append(now)
        behind = {"one version behind": 2, "one worker of two old": 2, "twenty versions behind": 21}
        source = past[-behind[fault.kind]] if broken and fault.kind in behind else now
        for name, tensor in copy.weights.items():
            if not (broken and fault.kind == "one tensor old" and name == fault.tensor):
                tensor.copy_(source[name])
        if broken and fault.kind == "transposed layer":
            copy.weights[fault.tensor].copy_(now[fault.tensor].T)
        if fault.kind.startswith("tied head") and not broken:
            copy.head.weight.copy_(now["model.embed_tokens.weight"])
        if not (broken and fault.kind.startswith("cache")):
            cached.clear()
        copy.pack()

    def keep() -> None:
        prefill()
        for request in batch._waiting:
            if request.state is not None:
                request.state = cached.setdefault(request.token_ids, request.state)

    if fault.kind.startswith("cache"):
        batch._prefill = keep
    refresh(-1)
    assert batch._step is not None
    batch._step = CPUStep(copy, batch._cache, batch.slots, batch.max_model_len, 1)
    if fault.kind.startswith("tied head"):
        copy.head.weight.copy_(copy.embedding)
        copy.head.pack()
    return refresh


class DecodeCopyEngine(EmbeddedEngine):
    """Decodes with a second set of weights."""

    def __init__(self, model: Path, fault: Fault, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._refresh = shadowed(self, fault)

    async def apply(self, patch: Any) -> int:
        version = await super().apply(patch)
        self._refresh(version)
        return version

    async def canary(self, canary: Any) -> None:
        await super().canary(canary)
        self._refresh(self.version)


class PretendLLM:
    """What `RunningLLM` offers, on an embedded engine in this process, which is said to have
    captured: it decodes with a copy of its weights."""

    def __init__(self, model: Path, dtype: str, fault: Fault) -> None:
        self.engine = EmbeddedEngine(model, max_num_seqs=8, max_model_len=128, dtype=dtype)
        self.vocab_size = self.engine.decoder.arch.vocab_size
        self._refresh = shadowed(self.engine, fault)
        self.version = 0
        self.steps: list[str] = []
        self._count: Callable[[str, Sequence[int]], None] = lambda *_: None

    def on_tokens(self, count: Any) -> None:
        self._count = count

    async def decode(
        self, request_id: str, token_ids: list[int], sampling: Sampling, salt: str
    ) -> Decoded:
        prompt = Prompt(id="p", token_ids=tuple(token_ids), answer="", source="")
        [done] = [c async for c in self.engine.generate_all([(prompt, 1, sampling)])]
        ids = done.token_ids.tolist()
        self._count(request_id, ids)
        return Decoded(ids, done.logprobs.tolist(), done.finish_reason)

    async def prompt_logprobs(self, request_id: str, token_ids: list[int], salt: str) -> Any:
        return (await self.engine.probe(token_ids)).tolist()

    async def call_workers(self, method: str, path: str, entries: Any, *_: Any) -> list[Any]:
        assert method == "emberl_load"
        self.steps.append("load")
        listed = {str(n): Entry(d, tuple(s), a, z) for n, d, s, a, z in entries}
        found = {}

        def load() -> None:
            for name, tensor in read_mirror(path, listed.items()):
                self.engine.decoder.load(name, tensor)
                found[name] = digest(tensor.data)
            self.engine.decoder.pack()
            self.engine._batch.weights_changed(0)
            self._refresh(self.version)

        await self.engine._at_boundary(load)
        return [found]

    async def clear_prefix_cache(self) -> bool:
        return True

    async def within(self, what: str, work: Awaitable[Any], deadline: float) -> Any:
        return await asyncio.wait_for(work, deadline)

    def __getattr__(self, name: str) -> Any:
        """pause, resume, sleep, wake, abort, label, shutdown: nothing to do."""

        async def step(*_: Any) -> None:
            self.steps.append(name)

        if name.startswith("_"):
            raise AttributeError(name)
        return step


def pretend_vllm(model: Path, fault: Fault, dtype: str, monkeypatch: Any) -> VLLMEngine:
    """vLLM's engine of ours on a `PretendLLM`."""
    llm = PretendLLM(model, dtype, fault)
    monkeypatch.setattr(engine_processes, "start", lambda settings: llm)
    settings = EngineSettings(model=str(model), max_num_seqs=8, max_model_len=128, dtype=dtype)
    engine = VLLMEngine(settings, run_id="run", version=-1)
    apply = engine.apply

    async def counted(patch: Any) -> int:
        llm.version = patch.version
        return await apply(patch)

    engine.apply = counted  # type: ignore[method-assign]
    return engine


@dataclass(kw_only=True)
class LocalPool:
    """Workers of this process in the place of a `RolloutPool`'s."""

    services: list[Any]
    restarts: int = 0
    announced: int = 0
    told: list[str] = field(default_factory=list)

    async def prove(self, *arguments: Any) -> list[Any]:
        return [await service.prove(*arguments) for service in self.services]

    async def decoded(self, requests: Any) -> list[Any]:
        return [await service.decoded(requests) for service in self.services]

    async def decoded_anew(self, worker: int, requests: Any) -> Any:
        await self.services[worker].engine.reload()
        return await self.services[worker].decoded(requests)

    async def probe(self, ids: Any) -> list[Any]:
        return [await service.engine.probe(ids) for service in self.services]

    async def reload(self, worker: int, ids: Any) -> Any:
        await self.services[worker].engine.reload()
        return await self.services[worker].engine.probe(ids)


class LocalLearners:
    """A torch model in the place of a `LearnerGroup`, with float32 masters and weights served in
    `dtype`."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.dtype = dtype
        self.compute = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def squares(self) -> dict[str, tuple[tuple[int, ...], float]]:
        return {
            name: (tuple(p.shape), float(p.detach().double().square().sum()))
            for name, p in self.model.named_parameters()
        }

    def canary(self, seed: int) -> Any:
        from emberl.rollout.weights.canary import canary_of

        return canary_of(seed, self.squares())

    @torch.no_grad()
    def logprobs(self, batch: Any, temperature: float = 1.0) -> Any:
        for ours, theirs in zip(self.model.parameters(), self.compute.parameters(), strict=True):
            theirs.copy_(ours)
        out = np.zeros(batch.num_tokens, np.float32)
        lengths = batch.sequence_lengths
        rows = np.split(batch.token_ids_T.astype(np.int64), np.cumsum(lengths)[:-1])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):  # pads stand where no token looks
            row[: len(tokens)] = torch.from_numpy(tokens)
        logits = self.compute(ids).logits[:, :-1].float()
        found = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0].numpy()
        place = batch.positions_T > 0
        out[place] = found[batch.sequence_ids_T[place], batch.positions_T[place] - 1]
        return out

    @torch.no_grad()
    def canary_logprobs(self, batch: Any, canary: Any, left_out: Sequence[str] = ()) -> list[Any]:
        from emberl.rl.learner.canary import change, changed

        with changed(self.model, canary, 0, 1):
            found = [self.logprobs(batch)]
            for name in left_out:
                change(self.model, canary, 0, 1, back=True, only=name)
                found.append(self.logprobs(batch))
                change(self.model, canary, 0, 1, only=name)
        return found
