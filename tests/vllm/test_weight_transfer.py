"""Weights through vLLM's own weight-transfer engines: a real group of a learner and an engine's
processes, over gloo."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.vllm_backend import compat as vllm_compat
from emberl.rollout.vllm_backend import transfer_api
from emberl.rollout.vllm_backend.transfer import GroupMember, Rendezvous, Sender
from emberl.rollout.weights.engine_transfer import Broadcast, BroadcastGroup, EngineTransfer
from emberl.rollout.weights.patch import TensorBytes, Transfer, WeightPatch, dense_patch
from emberl.rollout.weights.tensors import as_tensor
from emberl.rollout.weights.transport import TransferError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_compat.installed_version() is None,
        reason="vLLM is not installed here; make test-vllm has it",
    ),
]
MakePrompt = Callable[..., Prompt]
LONG = Sampling(max_tokens=200)
WAIT = 30.0


@pytest.fixture(scope="module")
def rig(make_rig: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    settings = {"weight_transfer_config": {"backend": "gloo"}, "tensor_parallel_size": 2}
    with make_rig("vllm", max_restarts=1, **settings) as made:
        yield made


class Learner:
    """Rank 0's end: one group, and the versions that go through it."""

    def __init__(self) -> None:
        self.rendezvous = Rendezvous("cpu", WAIT, "127.0.0.1")
        self.meet()

    def meet(self) -> None:
        self.group: BroadcastGroup = self.rendezvous.group(1, "gloo", 2)
        self.sender, self.sent = Sender(self.rendezvous.store, self.group), 0
        self.member = GroupMember()

    def place(self, patch: WeightPatch, timeout: float = WAIT) -> EngineTransfer:
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in patch.tensors.items()}
        self.sent += 1
        broadcast = Broadcast(group=self.group, number=self.sent - 1, timeout=timeout)
        return EngineTransfer(broadcast=broadcast, tensors=layout, digests=patch.digests)

    @contextmanager
    def sending(self, place: EngineTransfer, tensors: dict[str, TensorBytes]) -> Iterator[None]:
        failures: list[BaseException] = []

        def send() -> None:
            try:
                self.sender.send(place, tensors)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        yield
        thread.join(WAIT)
        assert not thread.is_alive() and not failures, failures


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner()


def never() -> dict[str, TensorBytes]:
    raise AssertionError("the tensors were asked for another way")


async def receive(
    rig: Any, learner: Learner, whole: WeightPatch, instead: Callable[[], Any] = never
) -> int:
    place = learner.place(whole)
    with learner.sending(place, dict(whole.tensors)):
        rank = await asyncio.to_thread(learner.member.join, place.broadcast, rig.engine.joined)
        transfer = Transfer(version=place, rank=rank, fallback=instead)
        return int(await rig.engine.apply(replace(whole, tensors={}, transfer=transfer)))


async def collect(engine: Any, prompt: Prompt, n: int, sampling: Sampling) -> list[Completion]:
    return [completion async for completion in engine.generate_all([(prompt, n, sampling)])]


def expected_logprobs(model: Any, ids: list[int], start: int) -> Any:
    return (
        model.logits(ids)
        .log_softmax(-1)[start - 1 : -1]
        .gather(-1, torch.tensor(ids[start:])[:, None])
        .squeeze(-1)
    )


def test_two_processes_of_one_model_decode_what_one_would(
    rig: Any, make_prompt: MakePrompt
) -> None:
    prompt = make_prompt("sharded", 40)
    assert len([p for p in rig.processes() if "Worker" in p.name()]) == 2
    rig.serve(rig.old)
    [greedy] = rig.run(collect(rig.engine, prompt, 1, Sampling(max_tokens=40, temperature=0.0)))
    ids = [*prompt.token_ids, *greedy.token_ids.tolist()]
    exact = rig.old.logits(ids)[39:-1]
    assert exact.argmax(-1).tolist() == greedy.token_ids.tolist()
    np.testing.assert_allclose(
        greedy.logprobs, expected_logprobs(rig.old, ids, 40), atol=1e-4, rtol=0
    )
    rig.serve(rig.new)
    probe = list(prompt.token_ids)
    np.testing.assert_allclose(
        rig.run(rig.engine.probe(probe)), expected_logprobs(rig.new, probe, 1), atol=1e-4, rtol=0
    )


def test_what_the_learners_send_is_served_and_proved(
    rig: Any, learner: Learner, make_prompt: MakePrompt
) -> None:
    """In flight: tokens of both versions, each with the log-prob of its own weights; then again
    through the same group."""
    before = rig.serve(rig.old)

    async def scenario() -> Completion:
        task = asyncio.create_task(collect(rig.engine, make_prompt("sent"), 1, LONG))
        await rig.until_tokens(20)
        assert await receive(rig, learner, rig.new.patch(before + 1)) == before + 1
        [completion] = await task
        return completion

    completion = rig.run(scenario())
    first, second = completion.spans
    assert (first.version, second) == (
        before,
        Span(before + 1, first.stop, 200),
    ) and first.stop >= 20
    assert rig.engine.digests() == rig.new.patch(0).digests, (
        "the mirror has what the processes received"
    )
    probe = list(make_prompt("probe", 30).token_ids)
    for model in (rig.new, rig.old, rig.new):
        rig.run(receive(rig, learner, model.patch(rig.engine.version + 1)))
        found = rig.run(rig.engine.probe(probe))
        np.testing.assert_allclose(found, expected_logprobs(model, probe, 1), atol=1e-4, rtol=0)
    assert learner.member.rank == 1 and rig.engine.joined == learner.group


def test_a_patch_builds_on_what_was_sent(rig: Any, learner: Learner) -> None:
    """The extension's way and vLLM's own change the same weights, in all processes."""
    rig.run(receive(rig, learner, rig.old.patch(rig.engine.version + 1)))
    # split along its rows' inputs, so each process has a part
    name = "model.layers.0.mlp.down_proj.weight"
    whole = rig.old.patch(rig.engine.version + 1)
    tensors = dict(whole.tensors)
    tensors[name] = rig.new.tensors()[name]
    mixed = dense_patch("run", whole.version, tensors.items())
    delta = replace(mixed, tensors={name: tensors[name]}, base_version=rig.engine.version)
    assert (
        rig.run(rig.engine.apply(delta)) == mixed.version and rig.engine.digests() == mixed.digests
    )
    rig.old.reference.load_state_dict({name: as_tensor(tensors[name])}, strict=False)
    try:
        probe = list(range(4, 20))
        np.testing.assert_allclose(
            rig.run(rig.engine.probe(probe)),
            expected_logprobs(rig.old, probe, 1),
            atol=1e-4,
            rtol=0,
        )
    finally:
        rig.old.reference.load_state_dict({name: as_tensor(rig.old.tensors()[name])}, strict=False)


def test_bytes_that_differ_are_had_another_way(
    rig: Any, learner: Learner, make_prompt: MakePrompt
) -> None:
    before = rig.serve(rig.old)
    whole = rig.new.patch(before + 1)
    place = learner.place(whole)

    async def scenario() -> Completion:
        task = asyncio.create_task(collect(rig.engine, make_prompt("differ"), 1, LONG))
        await rig.until_tokens(20)
        with learner.sending(place, rig.old.tensors()):
            rank = await asyncio.to_thread(learner.member.join, place.broadcast, rig.engine.joined)
            transfer = Transfer(version=place, rank=rank, fallback=lambda: whole.tensors)
            await rig.engine.apply(replace(whole, tensors={}, transfer=transfer))
        [completion] = await task
        return completion

    completion = rig.run(scenario())
    assert [span.version for span in completion.spans] == [
        before,
        before + 1,
    ] and rig.engine.restarts == 0
    assert rig.engine.digests() == whole.digests
    probe = list(make_prompt("probe", 30).token_ids)
    np.testing.assert_allclose(
        rig.run(rig.engine.probe(probe)), expected_logprobs(rig.new, probe, 1), atol=1e-4, rtol=0
    )


DYING = """
import os, sys, torch
from emberl.kernels import platform
group = platform.meet(platform.CPU, "127.0.0.1", int(sys.argv[1]), 0, 3, 30.0)
platform.broadcast(group, torch.zeros([int(n) for n in sys.argv[2:]]), 30.0)
os._exit(0)
"""


def test_a_learner_that_dies_while_it_sends(rig: Any, learner: Learner) -> None:
    """Half a model was received: the engine is started anew, has the version another way, and is of
    no group any more."""
    whole = rig.new.patch(rig.serve(rig.old) + 1)
    learner.meet()
    place = learner.place(whole)
    shape = next(iter(whole.tensors.values())).shape
    command = [sys.executable, "-c", DYING, str(learner.group.engine_port), *map(str, shape)]
    with subprocess.Popen(command) as dying:
        transfer = Transfer(version=place, rank=1, fallback=lambda: whole.tensors)
        head = replace(whole, tensors={}, transfer=transfer)
        assert rig.run(rig.engine.apply(head), timeout=300) == whole.version
        assert dying.wait(WAIT) == 0
    assert rig.engine.restarts == 1 and rig.engine.joined is None
    assert rig.engine.digests() == whole.digests
    with pytest.raises(TransferError, match="an engine has left"):
        learner.member.join(learner.place(whole).broadcast, rig.engine.joined)
    learner.meet()
    rig.run(receive(rig, learner, rig.old.patch(whole.version + 1)))
    assert rig.engine.digests() == rig.old.patch(0).digests


def test_vllms_own_sender_is_driven_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """No devices here: what it would broadcast is kept, and everything else is vLLM's."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    kept: list[tuple[str, list[float]]] = []
    packed: list[dict[str, Any]] = []
    group = SimpleNamespace(disabled=False)

    def broadcast(iterator: Any, group: Any, src: int, post_iter_func: Any, **sizes: Any) -> None:
        packed.append(sizes)
        kept.extend((pair[0], post_iter_func(pair).tolist()) for pair in iterator)

    met: list[Any] = []
    engine = nccl_engine.NCCLWeightTransferEngine
    to_027 = hasattr(engine, "trainer_send_weights")
    if to_027:
        meet = staticmethod(lambda info: met.append(SimpleNamespace(**info)) or group)
        monkeypatch.setattr(engine, "trainer_init", meet)
    else:
        monkeypatch.setattr(
            nccl_engine, "open_trainer_endpoint", lambda info: met.append(info) or group
        )
    looked_up_in = packed_tensor if to_027 else nccl_engine
    monkeypatch.setattr(looked_up_in, "packed_nccl_broadcast_producer", broadcast)
    send = transfer_api.open_transfer("nccl", "host", 7, 5, "cpu")
    for value in (1.0, 2.0):
        send({"a": torch.tensor([value]), "b": torch.tensor([3.0])})
    assert kept == [("a", [1.0]), ("b", [3.0]), ("a", [2.0]), ("b", [3.0])]
    assert [(info.master_address, info.master_port, info.world_size) for info in met] == [
        ("host", 7, 5)
    ]
    joining = engine.init_info_cls(**transfer_api.transfer_init("nccl", "host", 7, 3, 5))
    assert (joining.rank_offset, joining.world_size) == (3, 5)
    update = engine.update_info_cls(
        **transfer_api.transfer_update("nccl", {"a": ("float32", (1,))})
    )
    assert (update.names, update.dtype_names, update.shapes) == (["a"], ["float32"], [[1]])
    said = update if to_027 else joining
    assert said.packed, "as what is sent"
    sizes = {
        "buffer_size_bytes": said.packed_buffer_size_bytes,
        "num_buffers": said.packed_num_buffers,
    }
    assert packed == [sizes, sizes]
    group.disabled = True
    with pytest.raises(RuntimeError, match="is disabled"):
        transfer_api.open_transfer("nccl", "host", 7, 5, "cpu")


CONFIG = """\
name: native
stages: [sft, rl]
model: {path: MODEL, dtype: float32}
data: {source: arithmetic, kinds: {chain: 1}, terms: [2, 2], largest_total: 20, steps: short, heldout: 4, max_prompt_length: 16}
sft: {steps: 60, batch_size: 64, lr: 5.0e-3, warmup_steps: 5}
rollout:
  engine: vllm
  engine_args: {enforce_eager: true, tensor_parallel_size: 2, weight_transfer_config: {backend: gloo}}
  group_size: 4
  max_response_length: 12
schedule: {steps: 2, prompts_per_step: 16}
filter: {zero_variance: false}
sync: {mode: dense, transport: collective}
eval: {every: 0, size: 4}
tracking: {wandb: disabled}
cluster: {device: cpu, learners: 1, rollouts: 1, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}
"""


def test_a_run_sends_every_version_into_a_tensor_parallel_engine(
    models: tuple[Any, Any], tmp_path: Path
) -> None:
    """In an actor of a placement group, where vLLM's own choice for two processes would be Ray."""
    (tmp_path / "native.yaml").write_text(CONFIG.replace("MODEL", str(models[0].folder)))
    command = [str(Path(sys.executable).with_name("emberl")), "train", "native.yaml", "run_dir=run"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "instead" not in done.stdout, "no version went another way"
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if row["axis"] == "train" and row["stage"] == "rl"]
    size = sum(tensor.data.nbytes for tensor in models[0].tensors().values())
    assert [(row["sync/version"], row["sync/wire_bytes"]) for row in steps] == [
        (2, size),
        (3, size),
    ]
    for row in steps:
        assert (
            row["rollout_corr/log_ppl_abs_diff"] < 1e-4
            and row["training/rollout_probs_diff_max"] < 1e-4
        )
        assert 0 < row["sync/probe_diff_max"] < 1e-4 and row["sync/reloads"] == 0
