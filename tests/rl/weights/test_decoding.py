"""The proof of decoding: canaries that are taken back bit for bit, and engines that decode with
something else than they hold."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty_engines as faulty
import numpy as np
import pytest
import torch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.learner.canary import changed, squares
from emberl.rl.weights.decoding import DecodeCheck, last_layer, proof_requests
from emberl.rl.weights.probe import tolerance_of
from emberl.rollout.actors import ActorLostError, WorkerLostError
from emberl.rollout.samples import Prompt
from emberl.rollout.weights.canary import Canary, alter, altered, canary_of
from emberl.rollout.weights.patch import TensorBytes, dense_patch, digest
from emberl.rollout.weights.tensors import as_tensor
from emberl.rollout.worker import GroupService

TINY = TinyConfig(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48, vocabulary="bytes"
)
NAMES = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


class Prompts:
    def train(self, position: int) -> Prompt:
        ids = tuple(range(4 + position, 16 + 2 * position))
        return Prompt(id=str(position), token_ids=ids, answer="", source="")


def test_powers_and_zeros_by_hand() -> None:
    """A matrix of 16 columns with elements of 0.01 is to have 1 / 4: 2^5 * 0.01 is nearest."""
    canary = canary_of(
        0,
        {
            "a.v_proj.weight": ((8, 16), 128 * 1e-4),
            "a.norm.weight": ((16,), 16.0),
            "a.q_proj.bias": ((16,), 0.0),
        },
    )
    assert canary.powers == {"a.v_proj.weight": 5, "a.norm.weight": 0}
    assert canary.zeros == {"a.q_proj.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_element_changes_and_comes_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    before = torch.randn(8, 6, dtype=dtype)
    canary = Canary(seed=3, powers={name: -2})
    now = before.clone()
    alter(now, name, canary)
    signs = torch.sign(now.float()) * torch.sign(before.float())
    assert torch.equal(now.float().abs(), before.float().abs() / 4)
    assert torch.equal(signs * signs[0], signs[:, :1] * signs[0, 0] * torch.ones(8, 6)), "rank one"
    assert {-1.0, 1.0} == set(signs.flatten().tolist())
    alter(now, name, canary, back=True)
    assert torch.equal(now, before)
    shards = torch.cat([part.clone() for part in before.split(3)])
    for start, part in zip((0, 3, 6), shards.split(3), strict=True):
        alter(part, name, canary, rows=(start, 8))
    whole = before.clone()
    alter(whole, name, canary)
    assert torch.equal(shards, whole), "shards are parts of the whole"
    left = before.clone()
    alter(left, name, replace(canary, without=name))
    assert torch.equal(left, before)


def test_zeros_become_something_and_come_back() -> None:
    canary = Canary(seed=0, powers={}, zeros=frozenset({"b"}))
    now = torch.zeros(64)
    alter(now, "b", canary)
    assert set(now.tolist()) == {-0.5, 0.5}
    alter(now, "b", canary, back=True)
    assert not torch.signbit(now).any() and not now.any()


def test_zeros_come_back_with_their_signs() -> None:
    """They are other bytes, which digests see."""
    canary = Canary(seed=0, powers={}, zeros=frozenset({"b"}))
    before = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, 0.0]])
    now = before.clone()
    alter(now, "b", canary)
    assert set(now.abs().flatten().tolist()) == {0.5}
    alter(now, "b", canary, back=True)
    assert torch.equal(now.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("total", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_canary_and_is_named(total: float) -> None:
    with pytest.raises(ValueError, match=r"^a\.b has elements that are NaN or infinite"):
        canary_of(0, {"a.b": ((2, 2), total)})


def test_bytes_change_as_tensors_do() -> None:
    data = np.random.default_rng(0).standard_normal(24, np.float32).view(np.uint8)
    tensor = TensorBytes(dtype="F32", shape=(4, 6), data=data)
    canary = Canary(seed=1, powers={"x": 3})
    there = altered("x", tensor, canary)
    assert digest(there.data) != digest(data)
    expected = as_tensor(tensor).clone()
    alter(expected, "x", canary)
    assert torch.equal(as_tensor(there), expected)
    assert altered("x", there, canary, back=True).data.tobytes() == data.tobytes()


def test_adapters_give_the_canary_of_what_they_add_up_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learners' merged weights, signs on the factors of the product, bit for bit those of the
    merged weight."""
    pytest.importorskip("peft")
    from emberl.rl.config.load import LoraConfig
    from emberl.rl.learner.lora import inject_adapters, merged_tensors

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    model = faulty.LocalLearners(make_tiny(tmp_path, TINY, seed=0), torch.float32).model
    inject_adapters(model, LoraConfig(rank=2, targets=("q_proj", "down_proj")))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: tensor.clone() for name, tensor in merged_tensors(model)}
    canary = canary_of(5, squares(model, 0, 1, torch.device("cpu")))
    with changed(model, canary, 0, 1):
        now = {name: tensor.clone() for name, tensor in merged_tensors(model)}
    for name, tensor in before.items():
        alter(tensor, name, canary)
        assert torch.equal(now[name], tensor), name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, faulty.LocalLearners]:
    folder = make_tiny(tmp_path_factory.mktemp("canary"), TINY, seed=0)
    return folder, faulty.LocalLearners(folder, torch.float32)


def patch_of(learners: Any, version: int) -> Any:
    tensors = {
        name: TensorBytes(
            dtype="F32",
            shape=tuple(p.shape),
            data=p.detach().clone().view(-1).view(torch.uint8).numpy(),
        )
        for name, p in learners.model.named_parameters()
    }
    return dense_patch("run", version, tensors.items())


def prove(
    world: tuple[Path, Any], kind: str, monkeypatch: Any, faults: Any, told: list[str]
) -> tuple[Any, dict[str, float]]:
    """The last engine, and the figures of a proof of all."""
    folder, learners = world

    async def run() -> tuple[Any, dict[str, float]]:
        engines: list[Any] = []
        for fault in faults:
            if kind == "vllm":
                engine: Any = faulty.pretend_vllm(folder, fault, "float32", monkeypatch)
            else:
                engine = faulty.DecodeCopyEngine(
                    folder, fault, max_num_seqs=8, max_model_len=128, dtype="float32",
                    run_id="run", version=-1,
                )  # fmt: skip
            await engine.apply(patch_of(learners, 0))
            engines.append(engine)
        pool: Any = faulty.LocalPool(services=[GroupService(engine) for engine in engines])
        source: Any = Prompts()
        check = DecodeCheck(
            proof_requests(source, slots=8, longest=128), learners, pool, told.append,
            dtype="float32", tolerance=tolerance_of("float32"),
        )  # fmt: skip
        try:
            figures = await check.prove(0)
            assert engines[-1].digests() == patch_of(learners, 0).digests
            assert engines[-1].held is not None
            return engines[-1], figures
        finally:
            for engine in engines:
                await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["embedded", "vllm"])
def test_an_honest_engine_is_proved_and_serves_what_it_served(
    world: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    before = {name: p.detach().clone() for name, p in world[1].model.named_parameters()}
    engine, figures = prove(world, kind, monkeypatch, [faulty.Fault()], told)
    assert figures["sync/canary"] == 1 and figures["sync/canary_diff"] < 1e-3
    assert told[0].startswith("canary of version 0: 24 tensors changed, 104 tokens decoded")
    assert len(told) == 1, "every tensor shows"
    for name, parameter in world[1].model.named_parameters():
        assert torch.equal(parameter, before[name]), "the learners' own are what they were"
    if kind == "vllm":
        steps = [s for s in engine._llm.steps if s in ("pause", "load", "resume")]
        assert steps == ["pause", "load", "resume"] * 3, "an update, the canary, and back"


FAULTS = {
    "one version behind": "",
    "one tensor old": "model.layers.1.self_attn.k_proj.weight",
    "tied head not packed anew": "",
    "transposed layer": "model.layers.0.self_attn.q_proj.weight",
    "cache kept from before": "",
}


@pytest.mark.parametrize("engine", ["embedded", "vllm"])
@pytest.mark.parametrize("kind", FAULTS)
def test_what_decodes_something_else_is_named(
    world: Any, engine: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker of two."""
    fault = faulty.Fault(kind=kind, tensor=FAULTS[kind])
    with pytest.raises(ActorLostError, match=r"worker 1 does not decode with .* of version 0"):
        prove(world, engine, monkeypatch, [faulty.Fault(), fault], [])


class Actor:
    """A worker's, as far as its proof alone goes."""

    def __init__(self, service: GroupService) -> None:
        self.prove_alone = SimpleNamespace(remote=service.prove_alone)


@pytest.mark.parametrize("kind", ["", *FAULTS])
def test_a_worker_in_a_lost_ones_place_is_proved_without_the_learners(
    world: Any, kind: str
) -> None:
    """They may be anywhere between two versions, and are not asked."""
    folder, learners = world
    fault = faulty.Fault(kind=kind, tensor=FAULTS.get(kind, ""))
    source: Any = Prompts()

    async def run() -> None:
        engine = faulty.DecodeCopyEngine(
            folder, fault, max_num_seqs=8, max_model_len=128, dtype="float32", run_id="run",
            version=-1,
        )  # fmt: skip
        nobody: Any = None
        pool: Any = faulty.LocalPool(services=[])
        check = DecodeCheck(
            proof_requests(source, slots=8, longest=128), nobody, pool, print,
            dtype="float32", tolerance=tolerance_of("float32"),
        )  # fmt: skip
        actor = Actor(GroupService(engine))
        await check.prove_fresh(1, actor)  # it holds nothing yet
        await engine.apply(patch_of(learners, 0))
        try:
            await check.prove_fresh(1, actor)
            assert engine.digests() == patch_of(learners, 0).digests
        finally:
            await engine.close()

    if not kind:
        asyncio.run(run())
        return
    with pytest.raises(WorkerLostError, match="worker 1, restarted, does not decode with"):
        asyncio.run(run())


def test_an_engine_that_knows_no_canary_is_said(world: Any) -> None:
    told: list[str] = []
    pool: Any = faulty.LocalPool(services=[GroupService(object())])  # type: ignore[arg-type]
    source: Any = Prompts()
    check = DecodeCheck(
        proof_requests(source, slots=8, longest=128), world[1], pool, told.append,
        dtype="float32", tolerance=0.01,
    )  # fmt: skip
    asyncio.run(check.prove(0))
    asyncio.run(check.prove(1))
    assert len(told) == 1 and "has no canary()" in told[0]


def test_requests_are_of_different_lengths_and_fit() -> None:
    source: Any = Prompts()
    requests = proof_requests(source, slots=64, longest=20)
    assert len({len(prompt.token_ids) for prompt, _, _ in requests}) > 2
    assert [n for _, n, _ in requests] == [2, 2, 2, 2, 32]
    assert all(len(p.token_ids) + s.max_tokens <= 20 for p, _, s in requests)


def test_the_tensors_of_the_last_layer_and_of_none() -> None:
    names = dict.fromkeys(("model.embed_tokens.weight", "model.layers.9.a", "model.layers.10.a"), 0)
    assert last_layer(names) == ["model.embed_tokens.weight", "model.layers.10.a"]
