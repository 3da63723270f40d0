"""The proof of decoding on real vLLM: a canary goes through the engine's own memory and back, and a
copy that stays behind when the engine decodes is found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import faulty_engines as faulty
import pytest
import torch
from emberl.rl.weights.decoding import DecodeCheck, proof_requests
from emberl.rl.weights.probe import tolerance_of
from emberl.rollout.actors import ActorLostError
from emberl.rollout.samples import Prompt
from emberl.rollout.vllm_backend import compat
from emberl.rollout.weights import canary as canaries
from emberl.rollout.worker import GroupService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        compat.installed_version() is None,
        reason="vLLM is not installed here; make test-vllm has it",
    ),
]
MakeRig = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def rig(make_rig: MakeRig) -> Iterator[Any]:
    folder, made = str(Path(__file__).parent), compat.engine_arguments
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
        patched.syspath_prepend(folder)
        stale = {"worker_extension_cls": "stale_extension.StaleExtension"}
        patched.setattr(compat, "engine_arguments", lambda *given: made(*given) | stale)
        with make_rig("vllm") as rig:
            yield rig


class Prompts:
    def train(self, position: int) -> Prompt:
        ids = tuple(range(4 + position, 20 + position))
        return Prompt(id=str(position), token_ids=ids, answer="", source="")


def prove(rig: Any, told: list[str]) -> dict[str, float]:
    learners: Any = faulty.LocalLearners(rig.old.folder, torch.float32)
    pool: Any = faulty.LocalPool(services=[GroupService(rig.engine)])
    source: Any = Prompts()
    requests = proof_requests(source, slots=4, longest=128)
    check = DecodeCheck(
        requests, learners, pool, told.append, dtype="float32", tolerance=tolerance_of("float32")
    )
    figures: dict[str, float] = rig.run(check.prove(rig.engine.version))
    return figures


@pytest.mark.parametrize("most", [0, 60_000, 1 << 27])
def test_an_honest_engine_decodes_its_canary(
    rig: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """most: elements that its processes write into their own memory, none, those of some tensors,
    all; the others are loaded."""
    monkeypatch.setattr(canaries, "MOST_IN_PLACE", most)
    version, told = rig.serve(rig.old), list[str]()
    written: list[int] = []
    in_place = rig.engine._weights.processes.in_place
    find = in_place.find

    async def counted(changes: Any) -> None:
        written.append(len(changes))
        await find(changes)

    monkeypatch.setattr(in_place, "find", counted)
    figures = prove(rig, told)
    assert figures["sync/canary"] == 1 and figures["sync/canary_diff"] < 1e-3
    assert rig.engine.digests() == rig.old.patch(0).digests
    assert rig.engine.version == version
    names = rig.old.tensors().keys()
    assert in_place.elsewhere in ({}, None) and not in_place._off
    assert (sum(written) == 0, sum(written) >= len(names)) == (most == 0, most == 1 << 27)


def test_a_copy_that_stays_behind_when_it_decodes_is_found(rig: Any) -> None:
    version = rig.serve(rig.old)
    prove(rig, [])
    [copies] = rig.run(rig.engine._llm.call_workers("emberl_stay_behind"))
    assert copies > 4, "the matrices of two layers"
    with pytest.raises(
        ActorLostError, match=f"does not decode .* of version {version}.: .*decoded"
    ):
        prove(rig, [])
