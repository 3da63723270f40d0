"""Learners and engines agree on a broadcast before anybody enters it; who cannot take part has the
version another way."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels import platform
from emberl.rollout.receiver import Receiver
from emberl.rollout.vllm_backend import compat as vllm_compat
from emberl.rollout.vllm_backend import transfer as native
from emberl.rollout.vllm_backend import transfer_api
from emberl.rollout.vllm_backend.transfer import GroupMember, Rendezvous, Sender
from emberl.rollout.weights.engine_transfer import Broadcast, BroadcastGroup, EngineTransfer
from emberl.rollout.weights.patch import TensorBytes, WeightPatch, dense_patch
from emberl.rollout.weights.transport import Directory, FetchContext, TransferError, WeightUpdate
from emberl.rollout.weights.wire_format import pieces
from table_engine import TableEngine

WAIT = 10.0


def patch(version: int) -> WeightPatch:
    values = np.array([version, 2.0], np.float32)
    return dense_patch(
        "run", version, [("a", TensorBytes(dtype="F32", shape=(2,), data=values.view(np.uint8)))]
    )


class Learner:
    """What is sent lies in `sent`: no collective is entered here."""

    def __init__(self, workers: int, monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> None:
        self.rendezvous = Rendezvous("cpu", WAIT, "127.0.0.1")
        self.group: BroadcastGroup = self.rendezvous.group(workers, "gloo", ranks)
        self.sender = Sender(self.rendezvous.store, self.group)
        self.sent: list[dict[str, list[float]]] = []
        monkeypatch.setattr(native, "open_group", lambda ticket, timeout: self._keep)
        self.threads = ThreadPoolExecutor(8)

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        self.sent.append({name: tensor.tolist() for name, tensor in tensors.items()})

    def place(self, number: int, timeout: float = WAIT) -> EngineTransfer:
        whole = patch(number)
        broadcast = Broadcast(group=self.group, number=number, timeout=timeout)
        return EngineTransfer(
            broadcast=broadcast, tensors={"a": ("F32", (2,))}, digests=whole.digests
        )

    def send(self, place: EngineTransfer) -> Future[None]:
        return self.threads.submit(self.sender.send, place, patch(place.broadcast.number).tensors)


def test_ranks_follow_one_another_and_all_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(2, monkeypatch, ranks=4)
    members = [GroupMember(), GroupMember()]
    for number in range(2):
        place = learner.place(number)
        sending = learner.send(place)
        time.sleep(0.05)
        assert not sending.done()
        joined = learner.group if number else None
        ranks = [
            work.result(WAIT)
            for work in [learner.threads.submit(s.join, place.broadcast, joined) for s in members]
        ]
        sending.result(WAIT)
        assert sorted(ranks) == [1, 5]
    assert learner.sent == [{"a": [0.0, 2.0]}, {"a": [1.0, 2.0]}]
    assert (learner.place(0).described, learner.place(0).num_bytes) == ({"a": ("float32", (2,))}, 8)


def test_nobody_begins_where_an_engine_was_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, start = Learner(2, monkeypatch), time.monotonic()
    members = [GroupMember(), GroupMember()]
    for number, joined in ((0, (None, None)), (1, (learner.group, None))):
        place = learner.place(number)
        coming = [
            learner.threads.submit(s.join, place.broadcast, j)
            for s, j in zip(members, joined, strict=True)
        ]
        sending = learner.send(place)
        if number == 0:
            sending.result(WAIT)
    for work in (*coming, sending):
        with pytest.raises(TransferError, match="an engine has left weight-transfer group 1"):
            work.result(WAIT)
    assert len(learner.sent) == 1 and time.monotonic() - start < WAIT


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(2, monkeypatch)
    place = learner.place(0, timeout=0.5)
    coming, sending = (
        learner.threads.submit(GroupMember().join, place.broadcast, None),
        learner.send(place),
    )
    with pytest.raises(TransferError, match=r"1 of 2 engines were ready to receive within 0\.5 s"):
        sending.result(WAIT)
    with pytest.raises(TransferError, match="did not begin"):
        coming.result(WAIT)
    gone = replace(place.broadcast, group=replace(learner.group, port=1))
    with pytest.raises(TransferError, match="did not begin"):
        GroupMember().join(gone, None)


class FakeEngine(TableEngine):
    """Takes what the learner keeps as sent, or, `damaged`, finds that it is something else."""

    def __init__(self, learner: Learner, *, damaged: bool = False) -> None:
        super().__init__()
        self.joined: Any = None
        self.learner, self.damaged = learner, damaged

    async def apply(self, found: WeightPatch) -> int:
        tensors = found.tensors
        if found.transfer is not None:
            assert not tensors and found.base_version is None
            place = found.transfer.version
            tensors = patch(place.broadcast.number).tensors
            self.joined = place.broadcast.group
            if self.damaged:
                tensors = await asyncio.to_thread(found.transfer.fallback)
        return self.load(replace(found, tensors=tensors))

    @property
    def served(self) -> Any:
        return self.tensors["a"].data.view(np.float32).tolist()


def updates(engine: Any) -> Receiver:
    return Receiver(engine, FetchContext(timeout=WAIT))


@pytest.mark.parametrize("case", ["sent", "damaged", "never sent"])
def test_a_worker_serves_the_version_whatever_becomes_of_the_broadcast(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learner = Learner(1, monkeypatch)
    engine = FakeEngine(learner, damaged=case == "damaged")
    worker = updates(engine)
    for number in range(2):
        whole = patch(number)
        anchor = Directory(tmp_path).put(number, None, pieces(whole))
        place = learner.place(number, timeout=0.3 if case == "never sent" else WAIT)
        notice = WeightUpdate(
            run_id="run",
            attempt=0,
            version=number,
            root=whole.root,
            anchors=(anchor,),
            engines=place,
        )

        async def scenario(
            notice: WeightUpdate = notice, place: EngineTransfer = place
        ) -> dict[str, float]:
            await worker.prepare(notice)
            if case != "never sent":
                learner.send(place)
            report = await worker.commit(notice.version)
            await worker.prepare(notice)  # whatever comes twice changes nothing
            assert (await worker.commit(notice.version))["version"] == notice.version
            return report

        report = asyncio.run(scenario())
        assert (report["version"], engine.version, engine.served) == (number, number, [number, 2.0])
        assert report["wire_bytes"] == (8 if case == "sent" else anchor.size)


def test_who_catches_up_does_not_wait_for_a_broadcast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learner = Learner(1, monkeypatch)
    engine, whole = FakeEngine(learner), patch(3)
    anchor = Directory(tmp_path).put(3, None, pieces(whole))
    notice = WeightUpdate(
        run_id="run",
        attempt=0,
        version=3,
        root=whole.root,
        anchors=(anchor,),
        engines=learner.place(3, timeout=60.0),
    )
    start = time.monotonic()
    assert asyncio.run(updates(engine).catch_up(notice))["version"] == 3 and engine.joined is None
    assert time.monotonic() - start < WAIT


def test_a_silent_communicator_is_found_out() -> None:
    class PyHcclCommunicator:
        disabled = True

    with pytest.raises(
        RuntimeError, match=r"PyHcclCommunicator is disabled: .* could not load the library"
    ):
        transfer_api.check_communicator(PyHcclCommunicator())
    PyHcclCommunicator.disabled = False
    transfer_api.check_communicator(PyHcclCommunicator())
    transfer_api.check_communicator(object())


def test_what_a_user_may_ask_for() -> None:
    def backend(name: str) -> dict[str, Any]:
        return {"weight_transfer_config": {"backend": name}}

    assert (
        vllm_compat.transfer_backend({}) == ""
        and vllm_compat.transfer_backend(backend("nccl")) == "nccl"
    )
    vllm_compat.check_transfer("", platform.NPU)
    vllm_compat.check_transfer("nccl", platform.NPU)
    vllm_compat.check_transfer("gloo", platform.CPU)
    with pytest.raises(ValueError, match=r"weight_transfer_config\.backend=ipc: on npu set 'nccl'"):
        vllm_compat.check_transfer("ipc", platform.NPU)


def test_a_learner_without_vllm_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_api, "installed_version", lambda: None)
    transfer_api.check_sender("")
    transfer_api.check_sender("gloo")
    with pytest.raises(
        ValueError,
        match=r"backend=nccl: learners send by vLLM's own communicator, so vLLM .* must be",
    ):
        transfer_api.check_sender("nccl")


def test_a_learner_sends_as_vllm_0_23_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those of vLLM's and of vllm-ascend's sources, which `tests/ascend` reads."""
    group, sent = SimpleNamespace(disabled=False), []

    class Worker:
        @staticmethod
        def trainer_init(init_info: dict[str, Any]) -> Any:
            assert init_info == {"master_address": "host", "master_port": 7, "world_size": 5}
            return group

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: dict[str, Any]) -> None:
            assert trainer_args == {"group": group, "packed": True}
            sent.append([(name, tensor.tolist()) for name, tensor in iterator])

    monkeypatch.setattr(transfer_api, "installed_version", lambda: "0.23.0")
    monkeypatch.setattr(transfer_api, "_factory", SimpleNamespace)
    monkeypatch.setattr(transfer_api, "_worker_engine", lambda backend: Worker)
    send = transfer_api.open_transfer("nccl", "host", 7, 5, "cpu")
    send({"a": torch.tensor([1.0])})
    send({"a": torch.tensor([2.0]), "b": torch.tensor([3.0])})
    assert sent == [[("a", [1.0])], [("a", [2.0]), ("b", [3.0])]]
    group.disabled = True
    with pytest.raises(RuntimeError, match="is disabled"):
        transfer_api.open_transfer("nccl", "host", 7, 5, "cpu")
