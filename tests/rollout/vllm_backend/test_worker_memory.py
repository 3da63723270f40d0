"""Updates that an engine's processes write into their own memory, with a worker whose model is small
enough to look into: what cannot be placed comes with its layer, and what goes wrong leaves the old
version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.vllm_backend import engine_processes, transfer_api
from emberl.rollout.vllm_backend.compat import EngineSettings
from emberl.rollout.vllm_backend.served_weights import ServedWeights
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

    def __init__(self) -> None:
        self.model, self.loads = Model(), list[list[str]]()
        self.device, self.rank = torch.device("cpu"), 0
        self.vllm_config = None

        def reload(weights_iterator: Any) -> None:
            given = list(weights_iterator)
            self.loads.append(sorted(name for name, _ in given))
            self.model.load_weights(given)

        self.model_runner = SimpleNamespace(get_model=lambda: self.model, reload_weights=reload)


class LLM:
    """`RunningLLM`, as far as weights go."""

    vocab_size = 24

    def __init__(self, worker: Worker) -> None:
        self.worker, self.steps = worker, list[str]()

    def on_tokens(self, count: Any) -> None: ...

    async def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self.worker, method)(*arguments)]

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


def patch(names: Iterable[str]) -> WeightPatch:
    after = {**OLD, **{name: with_first(name, 7) for name in names}}
    whole = dense_patch("run", 1, after.items())
    changes = {name: between(OLD[name], after[name]) for name in names}
    return replace(whole, tensors={}, changes=changes, base_version=0, verified=True)


def served(monkeypatch: pytest.MonkeyPatch) -> tuple[ServedWeights, Worker, LLM, NoRequests]:
    """With `OLD` as version 0."""
    worker, requests = Worker(), NoRequests()
    llm = LLM(worker)
    monkeypatch.setattr(engine_processes, "start", lambda settings: llm)
    weights = ServedWeights(
        EngineSettings(model="m", max_num_seqs=2, max_model_len=8, dtype="float32"), requests,
        run_id="run", version=-1, deadline_s=20, max_restarts=0, server="", servers_directory=None,
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
    # captured graphs read where it was
    worker.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL")),
    )
    kept, worker.device = worker.model.q, SimpleNamespace(type="meta")
    worker.model.q = nn.Parameter(kept.clone(), requires_grad=False)
    with pytest.raises(MovedError, match=r"q \(pointer\) lies elsewhere than captured graphs"):
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


def test_what_does_not_stay_where_it_was_written_is_served_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, worker, _, requests = served(monkeypatch)
    prove = worker.emberl_prove

    def damaged(version: int) -> None:
        worker.model.q[0, 0] = 3
        prove(version)

    monkeypatch.setattr(worker, "emberl_prove", damaged)
    with pytest.raises(DigestMismatchError, match=r"element 0 .* does not hold"):
        asyncio.run(weights.apply(patch(["layers.0.attn.q"])))
    assert weights.held is None and weights.corrupt is not None and len(requests.failed) == 1
    asyncio.run(weights.apply(dense_patch("run", 1, OLD.items())))
    assert weights.corrupt is None and held(worker)["q"] == 1
