"""Updates that an engine's processes write into their own memory, with a worker whose model is small
enough to look into: what cannot be placed comes with its layer, what goes wrong leaves the old
version, or nothing is handed out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.samples import Prompt, Sampling
from emberl.rollout.vllm_backend import engine_processes, transfer_api
from emberl.rollout.vllm_backend.compat import EngineSettings
from emberl.rollout.vllm_backend.engine import VLLMEngine
from emberl.rollout.vllm_backend.requests import Decoded
from emberl.rollout.vllm_backend.served_weights import ServedWeights
from emberl.rollout.weights.canary import canary_of, squares_of
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    DigestMismatchError,
    MovedError,
    TensorBytes,
    WeightPatch,
    dense_patch,
)
from torch import Tensor, nn

with pytest.MonkeyPatch.context() as without_vllm:  # which it registers with when it is imported
    without_vllm.setattr(transfer_api, "register_gloo", lambda: None)
    from emberl.rollout.vllm_backend.extension import WeightExtension

SHAPES = {"layers.0.attn.q": (4, 4), "layers.1.mlp.scaled": (2, 3), "layers.1.mlp.norm": (3,)}


class Model(nn.Module):
    """What it multiplies by is twice the checkpoint's `scaled`: no element of it can be placed."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            made = nn.Parameter(torch.zeros(shape), requires_grad=False)
            self.register_parameter(name.rpartition(".")[2], made)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        filled = set()
        for name, tensor in weights:
            short = name.rpartition(".")[2]
            factor = 2 if short == "scaled" else 1
            getattr(self, short).data.copy_(tensor if factor == 1 else tensor * factor)
            filled.add(short)
        return filled


class Worker(WeightExtension):
    """One process, in this one."""

    def __init__(self, *, moves: bool = False) -> None:
        """moves: whether a load makes a tensor anew."""
        self.model, self.loads = Model(), list[list[str]]()
        self.device: Any = torch.device("cpu")
        self.rank = 0
        self.vllm_config = None

        def reload(weights_iterator: Any) -> None:
            given = list(weights_iterator)
            self.loads.append(sorted(name for name, _ in given))
            if moves:
                self.model.q = nn.Parameter(self.model.q.clone(), requires_grad=False)
            self.model.load_weights(given)

        self.model_runner = SimpleNamespace(get_model=lambda: self.model, reload_weights=reload)

    def capture(self, *, eager: bool) -> None:
        """Pretends to, unless it is to be eager."""
        self.device = SimpleNamespace(type="meta")
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=eager),
            compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL")),
        )


class LLM:
    """`RunningLLM`, as far as weights go."""

    vocab_size = 24

    def __init__(self, worker: Worker) -> None:
        self.worker, self.steps = worker, list[str]()
        self.may_end = asyncio.Event()
        self._count: Any = None

    def on_tokens(self, count: Any) -> None:
        self._count = count

    def last_lines(self) -> list[str]:
        return []

    async def decode(self, request_id: str, *_: Any) -> Decoded:
        await self.may_end.wait()
        self._count(request_id, [5])
        return Decoded([5], [-0.5], "length")

    async def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        try:
            return [getattr(self.worker, method)(*arguments)]
        except RuntimeError as error:  # as vLLM does
            raise Exception(f"Call to collective_rpc method failed: {error}") from error

    async def clear_prefix_cache(self) -> bool:
        return True

    async def within(self, what: str, work: Awaitable[Any], deadline: float) -> Any:
        self.steps.append(what)
        return await asyncio.wait_for(work, deadline)

    def __getattr__(self, name: str) -> Any:
        async def step(*_: Any) -> None: ...

        return step


class NoRequests:
    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}
        self.failed: list[Exception] = []

    def count(self, request_id: str, token_ids: Any) -> None: ...

    async def fail(self, error: Exception) -> None:
        self.failed.append(error)


def tensor(values: Any) -> TensorBytes:
    array = np.asarray(values, "<f4")
    return TensorBytes(dtype="F32", shape=array.shape, data=array.reshape(-1).view(np.uint8).copy())


OLD = {
    name: tensor(np.arange(1, 1 + np.prod(shape)).reshape(shape)) for name, shape in SHAPES.items()
}


def with_first(name: str, value: float) -> TensorBytes:
    data = OLD[name].data.copy()
    data.view("<f4")[0] = value
    return replace(OLD[name], data=data)


def patch(names: Iterable[str], version: int = 1) -> WeightPatch:
    after = {**OLD, **{name: with_first(name, 7) for name in names}}
    whole = dense_patch("run", version, after.items())
    changes = {name: between(OLD[name], after[name]) for name in names}
    return replace(whole, tensors={}, changes=changes, base_version=0, verified=True)


def served(monkeypatch: pytest.MonkeyPatch) -> tuple[ServedWeights, Worker, LLM, NoRequests]:
    """With `OLD` as version 0."""
    worker, requests = Worker(), NoRequests()
    llm = LLM(worker)
    monkeypatch.setattr(engine_processes, "start", lambda settings: llm)
    weights = ServedWeights(
        EngineSettings(model="m", max_num_seqs=2, max_model_len=8, dtype="float32"), requests,
        run_id="run", version=-1, deadline_s=60, max_restarts=0, server="", servers_directory=None,
    )  # fmt: skip
    asyncio.run(weights.apply(dense_patch("run", 0, OLD.items())))
    return weights, worker, llm, requests


def held(worker: Worker) -> dict[str, float]:
    return {name: float(p.flatten()[0]) for name, p in worker.model.named_parameters()}


def test_what_has_no_place_is_loaded_with_its_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, worker, llm, _ = served(monkeypatch)
    assert held(worker) == {"q": 1, "scaled": 2, "norm": 1}
    update = patch(["layers.0.attn.q", "layers.1.mlp.scaled"])
    with pytest.warns(UserWarning, match=r"1 layers whole .* layers\.1\.mlp\.scaled \(NotPlaced"):
        asyncio.run(weights.apply(update))
    assert held(worker) == {"q": 7, "scaled": 14, "norm": 1}
    assert worker.loads[1:] == [["layers.1.mlp.norm", "layers.1.mlp.scaled"]]
    assert (weights.version, weights.mirror.digests()) == (1, update.digests)
    paused = llm.steps[llm.steps.index("resume") + 1 :]
    paused = paused[paused.index("pause") : paused.index("resume")]
    assert [step for step in paused if step in ("find", "write", "load", "prove")] == [
        "write",
        "load",
    ]


def test_what_is_refused_leaves_the_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, worker, llm, requests = served(monkeypatch)
    update, name = patch(["layers.0.attn.q"]), "layers.0.attn.q"
    asyncio.run(weights.processes.in_place.known())
    before = len(llm.steps)
    worker.capture(eager=False)  # graphs read where it was
    kept = worker.model.q
    worker.model.q = nn.Parameter(kept.clone(), requires_grad=False)
    with pytest.raises(MovedError, match=r"graphs .*: q \(pointer\) lies elsewhere than they"):
        asyncio.run(weights.apply(update))
    worker.model.q = kept
    assert "pause" not in llm.steps[before:] and weights.corrupt is None
    assert (weights.version, held(worker)["q"]) == (0, 1)
    # something else lies there: it is loaded anew
    worker.device = torch.device("cpu")
    asyncio.run(weights.processes.in_place.known())
    worker.model.q[0, 0] = 3
    with pytest.raises(DigestMismatchError, match=rf"{name}: element 0 .* made for"):
        asyncio.run(weights.apply(update))
    assert (weights.version, held(worker)["q"], weights.corrupt) == (0, 1, None)
    assert requests.failed == []
    asyncio.run(weights.apply(update))
    assert (weights.version, held(worker)["q"]) == (1, 7)


def test_what_a_canary_finds_in_the_memory_is_served_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One element is another than was sent: loaded whole, it would be mended and said to nobody."""
    for table in (SHAPES, OLD):  # all that is left can be placed, and is written
        monkeypatch.delitem(table, "layers.1.mlp.scaled")
    weights, worker, _, requests = served(monkeypatch)
    name, canary = "layers.0.attn.q", canary_of(1, squares_of(OLD))

    async def there_and_back() -> None:
        await weights.load_canary(canary)
        await weights.load_canary(None)

    asyncio.run(there_and_back())
    assert (held(worker)["q"], weights.corrupt) == (1, None)
    asyncio.run(weights.processes.in_place.known())
    worker.model.q[0, 0] = 3
    with pytest.raises(DigestMismatchError, match=rf"{name}: element 0 .* made for"):
        asyncio.run(weights.load_canary(canary))
    assert weights.held is None and len(requests.failed) == 1
    asyncio.run(weights.apply(dense_patch("run", 1, OLD.items())))
    assert (weights.version, held(worker)["q"], weights.corrupt) == (1, 1, None)


def test_what_an_audit_finds_is_served_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what was decoded since the update, which the audit ends after."""
    worker = Worker()
    llm = LLM(worker)
    monkeypatch.setattr(engine_processes, "start", lambda settings: llm)
    settings = EngineSettings(model="m", max_num_seqs=2, max_model_len=8, dtype="float32")
    prompt = Prompt(id="p", token_ids=(3,), answer="", source="")
    request = (prompt, 1, Sampling(max_tokens=1))
    prove = worker.emberl_prove

    def damaged(version: int) -> None:
        worker.model.q[0, 0] = 3
        llm.may_end.set()
        worker._emberl_work = SimpleNamespace(outcome=None)  # type: ignore[assignment]
        asyncio.get_running_loop().call_later(0.2, prove, version)

    async def decode(engine: VLLMEngine) -> list[Any]:
        return [completion async for completion in engine.generate_all([request])]

    async def scenario() -> None:
        engine = VLLMEngine(settings, run_id="run", version=-1)
        await engine.apply(dense_patch("run", 0, OLD.items()))
        under_way = asyncio.create_task(decode(engine))
        await asyncio.sleep(0)
        monkeypatch.setattr(worker, "emberl_prove", damaged)
        with pytest.raises(DigestMismatchError, match=r"layers\.0\.attn\.q: .* checksum"):
            await engine.apply(patch(["layers.0.attn.q"], version=32))  # which audits it
        assert llm.may_end.is_set()
        for tokens in (under_way, decode(engine)):
            with pytest.raises(DigestMismatchError):
                await tokens
        assert engine.held is None
        monkeypatch.undo()
        await engine.apply(dense_patch("run", 32, OLD.items()))
        assert held(worker)["q"] == 1 and len(await decode(engine)) == 1

    asyncio.run(scenario())


def test_a_load_that_leaves_graphs_behind_is_repeated_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is allowed of lost processes; and a server, which is not ours to start, says what
    it has to be started with."""
    started: list[Worker] = []

    def start(settings: EngineSettings) -> LLM:
        started.append(Worker(moves=True))
        started[-1].capture(eager=bool(settings.engine_args.get("enforce_eager")))
        return LLM(started[-1])

    monkeypatch.setattr(engine_processes, "start", start)
    monkeypatch.setattr(engine_processes, "connect", lambda _, settings, *__: start(settings))
    settings = EngineSettings(model="m", max_num_seqs=2, max_model_len=8, dtype="float32")

    def served_by(server: str) -> ServedWeights:
        return ServedWeights(
            settings, NoRequests(), run_id="run", version=-1, deadline_s=60, max_restarts=0,
            server=server, servers_directory=None,
        )  # fmt: skip

    weights = served_by("")
    with pytest.warns(UserWarning, match=r"without captured graphs .* e\.g\. q \(pointer\)"):
        asyncio.run(weights.apply(dense_patch("run", 0, OLD.items())))
    assert (weights.version, weights.corrupt, weights.processes.restarts) == (0, None, 1)
    assert len(started) == 2 and held(started[-1])["q"] == 1
    asyncio.run(weights.apply(dense_patch("run", 1, OLD.items())))
    assert (weights.version, len(started)) == (1, 2)
    with pytest.raises(MovedError, match=r"q \(pointer\); .*enforce.eager"):
        asyncio.run(served_by("http://there").apply(dense_patch("run", 0, OLD.items())))
