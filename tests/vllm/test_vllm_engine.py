"""What only vLLM can get wrong: weights in other processes, and those processes themselves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.vllm_backend import compat as vllm_compat
from emberl.rollout.weights.apply import advance, materialise
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import DigestMismatchError, WeightPatch, Weights, dense_patch

MakePrompt = Callable[..., Prompt]
MakeRig = Callable[..., AbstractContextManager[Any]]
LONG = Sampling(max_tokens=200)
UPDATES = int(os.environ.get("EMBERL_UPDATES", "50"))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_compat.installed_version() is None,
        reason="vLLM is not installed here; make test-vllm has it",
    ),
]


@pytest.fixture(scope="module")
def rig(make_rig: MakeRig) -> Iterator[Any]:
    with make_rig("vllm") as made:
        yield made


@pytest.fixture(scope="module")
def half(make_rig: MakeRig) -> Iterator[Any]:
    """In bfloat16, with a short deadline; the last test ends its processes."""
    with make_rig("vllm", dtype="bfloat16", deadline_s=5.0, max_restarts=2) as made:
        yield made


async def collect(engine: Any, prompt: Prompt, n: int, sampling: Sampling) -> list[Completion]:
    return [completion async for completion in engine.generate_all([(prompt, n, sampling)])]


def test_weights_damaged_on_their_way_are_never_served(
    rig: Any, make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rig.serve(rig.old)
    mirror = rig.engine._weights.mirror
    name = "model.layers.0.mlp.down_proj.weight"

    def damage(tensors: Any) -> None:
        type(mirror).write(mirror, tensors)
        mirror._bytes(mirror.entries[name])[7] ^= 1

    async def scenario() -> None:
        task = asyncio.create_task(collect(rig.engine, make_prompt("damaged"), 3, LONG))
        await rig.until_tokens(20)
        with monkeypatch.context() as patched:
            patched.setattr(mirror, "write", damage)
            with pytest.raises(DigestMismatchError, match=name.replace(".", r"\.")):
                await rig.engine.apply(rig.new.patch(before + 1))
        with pytest.raises(DigestMismatchError, match=name.replace(".", r"\.")):
            await task
        with pytest.raises(
            DigestMismatchError, match=f"serves nothing: tensor {name} of version {before + 1}"
        ):
            await collect(rig.engine, make_prompt("after"), 1, LONG)
        assert rig.engine.version == before

    rig.run(scenario())
    assert rig.serve(rig.new) == before + 1
    [completion] = rig.run(collect(rig.engine, make_prompt("after"), 1, Sampling(max_tokens=30)))
    ids = [*make_prompt("after").token_ids, *completion.token_ids.tolist()]
    expected = (
        rig.new.logits(ids)
        .log_softmax(-1)[4:-1]
        .gather(-1, torch.tensor(ids[5:])[:, None])
        .squeeze(-1)
    )
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


def test_many_updates_leave_no_memory_behind(rig: Any, make_prompt: MakePrompt) -> None:
    """Whole weights and deltas of the last version in turn, with decoding going on; each is proved
    bit for bit by digest, and by a probe."""
    import psutil

    me = psutil.Process()
    probe = list(make_prompt("probe", 20).token_ids)
    expected = {
        model: (
            model.logits(probe)[:-1]
            .log_softmax(-1)
            .gather(-1, torch.tensor(probe[1:])[:, None])
            .squeeze(-1)
        )
        for model in (rig.old, rig.new)
    }
    resident: list[int] = []
    times: list[float] = []

    async def feed(stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            count += len(await collect(rig.engine, make_prompt(f"feed{count}", 40), 3, LONG))
        return count

    async def scenario() -> int:
        held: Weights | None = None
        stop = asyncio.Event()
        feeding = asyncio.create_task(feed(stop))
        for i in range(UPDATES + 10):
            model = rig.new if i % 2 else rig.old
            whole = patch = model.patch(rig.engine.version + 1)
            if held is not None and i % 4 >= 2:
                delta = encode(held, whole.tensors, run_id="run", version=whole.version)
                assert delta.deltas and not delta.tensors and delta.digests == whole.digests
                prepared = materialise(delta, held)
                held, patch = advance(held, prepared), prepared
                assert patch.base_version == rig.engine.version
            else:
                held = advance(held, materialise(whole, held))
            start = time.perf_counter()
            assert await rig.engine.apply(patch) == patch.version
            times.append(time.perf_counter() - start)
            assert rig.engine.digests() == whole.digests
            np.testing.assert_allclose(
                await rig.engine.probe(probe), expected[model], atol=1e-4, rtol=0
            )
            await asyncio.wait(
                {feeding, asyncio.ensure_future(rig.until_tokens(20))},
                return_when="FIRST_COMPLETED",
            )
            assert not feeding.done()
            resident.append(sum(p.memory_info().rss for p in [me, *rig.processes()]))
        stop.set()
        return await feeding

    done = rig.run(scenario(), timeout=200)
    growth = resident[-1] / resident[10] - 1
    print(
        f"{len(times)} updates, {1e3 * np.median(times):.0f} ms each, {done} completions meanwhile;"
        f" {resident[10] / 2**20:.0f} MiB resident, {100 * growth:+.2f} %"
    )
    assert done >= UPDATES / 20
    assert growth < 0.02


def test_a_prompt_is_computed_once_for_its_group(
    rig: Any, make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By vLLM's own count of the prompt tokens that it found in its cache: the first sample reads
    the prompt, each other one what lies beyond the last whole block, and no sample anything that
    other weights computed."""
    block = rig.engine._settings.engine_args["block_size"]
    prompt, cached = make_prompt("shared", 3 * block + 5), []
    final = rig.engine._llm._final

    async def counting(*arguments: Any) -> Any:
        output = await final(*arguments)
        cached.append(output.num_cached_tokens)
        return output

    monkeypatch.setattr(rig.engine._llm, "_final", counting)
    for model in (rig.old, rig.new):
        rig.serve(model)
        cached.clear()
        assert len(rig.run(collect(rig.engine, prompt, 8, Sampling(max_tokens=3)))) == 8
        assert sorted(cached) == [0, *[3 * block] * 7]


def test_names_and_values_of_engine_args_are_vllms(make_rig: MakeRig) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert vllm_compat.argument_names() == set(AsyncEngineArgs.__dataclass_fields__)
    with (
        pytest.raises(
            ValueError,
            match=r"engine_args\.max_num_seq: .* did you mean rollout\.engine_args\.max_num_seqs",
        ),
        make_rig("vllm", max_num_seq=3),
    ):
        pass
    with (
        pytest.raises(ValueError, match="gpu_memory_utilization"),
        make_rig("vllm", gpu_memory_utilization=7.0),
    ):
        pass


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_nothing_is_decoded_and_an_update_or_wake_ends_it(
    level: int, rig: Any, make_prompt: MakePrompt
) -> None:
    """vLLM on a CPU ignores the levels, not the order: it decodes nothing, and says so, until all
    is awake again."""
    before = rig.serve(rig.old)
    llm = rig.engine._llm._llm

    async def scenario() -> tuple[list[Completion], list[Completion]]:
        await rig.engine.sleep(level)
        await rig.engine.sleep(level)
        assert rig.engine._weights.state == "asleep"
        waiting = asyncio.create_task(
            collect(rig.engine, make_prompt("asleep"), 2, Sampling(max_tokens=4))
        )
        await asyncio.sleep(0.2)
        assert not waiting.done() and await llm.is_sleeping()
        await rig.engine.apply(rig.new.patch(before + 1))
        assert not await llm.is_sleeping()
        first = await waiting
        await rig.engine.sleep(level)
        await rig.engine.wake()
        assert rig.engine._weights.state == "serving"
        await rig.engine.wake()
        return first, await collect(rig.engine, make_prompt("asleep"), 2, Sampling(max_tokens=4))

    first, second = rig.run(scenario())
    assert {completion.spans for completion in first + second} == {(Span(before + 1, 0, 4),)}
    drawn = [
        {c.sample: c.token_ids.tolist() for c in completions} for completions in (first, second)
    ]
    assert drawn[0] == drawn[1]
    assert rig.engine.digests() == rig.new.patch(0).digests


def test_bfloat16_agrees_with_transformers_in_bfloat16(half: Any, make_prompt: MakePrompt) -> None:
    """The two round in different places: log-probs agree within hundredths."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(half.old.folder, dtype=torch.bfloat16)
    prompt = make_prompt("half", 30)
    differences = []
    for completion in half.run(collect(half.engine, prompt, 4, LONG)):
        ids = [*prompt.token_ids, *completion.token_ids.tolist()]
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0].float()
        exact = (
            logits.log_softmax(-1)[29:-1]
            .gather(-1, torch.tensor(ids[30:])[:, None])
            .squeeze(-1)
            .numpy()
        )
        differences.append(np.abs(completion.logprobs - exact))
    worst, mean = np.max(differences), np.mean(differences)
    print(f"bfloat16: log-probs differ by {worst:.4f} at most, {mean:.4f} on average")
    assert worst < 0.2 and mean < 0.02


def test_an_engine_of_one_dtype_refuses_another(half: Any) -> None:
    with pytest.raises(ValueError, match=r"got F32 .* the engine serves BF16"):
        half.serve(half.new)


def test_an_engine_that_is_lost_is_started_anew_with_the_weights_it_served(
    half: Any, make_prompt: MakePrompt
) -> None:
    """It hangs in an update; it dies while it decodes; and when it hangs once more than is allowed
    the run learns why."""
    engine, prompt = half.engine, make_prompt("lost")
    patch = bfloat16_patch(half.new, engine.version + 1)

    worker = worker_of(half)
    worker.suspend()
    assert half.run(engine.apply(patch)) == patch.version and engine.restarts == 1
    assert not worker.is_running()
    [undisturbed] = half.run(collect(engine, prompt, 1, LONG))

    async def with_a_loss() -> list[Completion]:
        task = asyncio.create_task(collect(engine, prompt, 1, LONG))
        await half.until_tokens(20)
        worker = worker_of(half)
        worker.kill()
        return await task

    [completion] = half.run(with_a_loss())
    assert engine.restarts == 2 and completion.spans == (Span(patch.version, 0, 200),)
    np.testing.assert_array_equal(completion.token_ids, undisturbed.token_ids)
    assert engine.digests() == patch.digests

    async def once_too_often() -> None:
        task = asyncio.create_task(collect(engine, prompt, 3, LONG))
        await half.until_tokens(20)
        worker = worker_of(half)
        worker.suspend()
        words = (
            r"lost 3 times, more than rollout\.max_restarts=2: no token came within 5 s; its last"
            r" lines: .+"
        )
        with pytest.raises(RuntimeError, match=words):
            await task
        with pytest.raises(RuntimeError, match=f"serves nothing: vLLM was {words}"):
            await collect(engine, prompt, 1, LONG)

    half.run(once_too_often())


def worker_of(rig: Any) -> Any:
    [worker] = [p for p in rig.processes() if "Worker" in p.name() and p.is_running()]
    return worker


def bfloat16_patch(model: Any, version: int) -> WeightPatch:
    tensors = {}
    for name, tensor in model.tensors().items():
        values = torch.from_numpy(tensor.data.view(np.float32).copy()).bfloat16()
        tensors[name] = replace(tensor, dtype="BF16", data=values.view(torch.uint8).numpy())
    return dense_patch("run", version, tensors.items())


OWNER = """
import sys
from emberl.rollout.vllm_backend.compat import EngineSettings
from emberl.rollout.vllm_backend.engine import VLLMEngine

if __name__ == "__main__":
    eager = {"enforce_eager": True}
    engine = VLLMEngine(
        EngineSettings(model=sys.argv[1], max_model_len=64, dtype="float32", engine_args=eager)
    )
    print("up", flush=True)
    sys.stdin.read()
"""


def test_nothing_outlives_a_killed_owner(models: tuple[Any, Any], tmp_path: Path) -> None:
    import psutil

    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, str(script), str(models[0].folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert any(line == "up\n" for line in owner.stdout)
        children = psutil.Process(owner.pid).children(recursive=True)
        assert sum(child.name().startswith("VLLM") for child in children) >= 2
        owner.send_signal(signal.SIGKILL)
    _, there = psutil.wait_procs(children, timeout=30)
    alive = [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for child in alive:
        child.kill()
    assert alive == []
