"""The engine's protocol: streams, updates in flight, and what it refuses to serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.embedded import packed
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.kv_cache import KVCache, PromptState
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.engine import Engine
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    VersionError,
    WeightPatch,
    dense_patch,
)

MakeDecoder = Callable[..., Decoder]
MakePrompt = Callable[..., Prompt]
LONG = Sampling(max_tokens=200)


def patch_of(decoder: Decoder, version: int, run_id: str = "run") -> WeightPatch:
    copied = {name: decoder.tensor_bytes(name) for name in decoder.weights}
    return dense_patch(
        run_id,
        version,
        [(name, replace(tensor, data=tensor.data.copy())) for name, tensor in copied.items()],
    )


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def collect(engine: Engine, prompt: Prompt, n: int, sampling: Sampling) -> list[Completion]:
    return [completion async for completion in engine.generate_all([(prompt, n, sampling)])]


async def until_steps(engine: EmbeddedEngine, steps: int) -> None:
    while engine.counters.decode_steps < steps:
        await asyncio.sleep(0.001)


def replayed(decoders: dict[int, Decoder], prompt: Prompt, completion: Completion) -> np.ndarray:
    """Log-probs of a completion decoded one token at a time, each by the weights of its version on
    the kept cache."""
    ids = torch.tensor([*prompt.token_ids, *completion.token_ids.tolist()])
    version_of = np.concatenate(
        [np.full(span.stop - span.start, span.version) for span in completion.spans]
    )
    start = len(prompt.token_ids)
    arch = decoders[0].arch
    cache = KVCache(arch, 1, len(ids), torch.float64, torch.device("cpu"))
    empty = torch.zeros(arch.num_layers, arch.num_kv_heads, 0, arch.head_dim, dtype=torch.float64)
    cache.fill(0, 1, PromptState(keys=empty, values=empty, logits=empty))
    logprobs = []
    with torch.inference_mode():
        for position in range(len(ids) - 1):
            decoder = decoders[int(version_of[max(0, position + 1 - start)])]
            decoder.reserve(len(ids))
            cache.fit(position + 1, 1)
            where = torch.tensor([position])
            cache.open(where)
            logits = decoder.logits(
                decoder.forward(ids[position : position + 1], where, cache.attend)
            )
            logprobs.append(torch.log_softmax(logits, -1)[0, ids[position + 1]].item())
    return np.array(logprobs[start - 1 :])


def test_streams_run_side_by_side_and_repeat_bit_for_bit(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    sampling = Sampling(max_tokens=30, stop_token_ids=(5,))

    async def several() -> list[list[Completion]]:
        engine = EmbeddedEngine(
            make_decoder(dtype=torch.bfloat16), max_num_seqs=6, max_model_len=64
        )
        prompts = [make_prompt(f"p{i}", 3 + i) for i in range(5)]
        results = await asyncio.gather(
            *(collect(engine, prompt, 4, sampling) for prompt in prompts)
        )
        await engine.close()
        return results

    async def at_once() -> list[Completion]:
        engine = EmbeddedEngine(
            make_decoder(dtype=torch.bfloat16), max_num_seqs=6, max_model_len=64
        )
        requests = [(make_prompt(f"p{i}", 3 + i), 4, sampling) for i in range(5)]
        results = [completion async for completion in engine.generate_all(requests)]
        await engine.close()
        return results

    streams = run(several())
    together = {
        (completion.prompt_id, completion.sample): completion for completion in run(at_once())
    }
    for i, stream in enumerate(streams):
        assert {(completion.prompt_id, completion.sample) for completion in stream} == {
            (f"p{i}", s) for s in range(4)
        }
        for completion in stream:
            other = together.pop((completion.prompt_id, completion.sample))
            np.testing.assert_array_equal(completion.token_ids, other.token_ids)
            np.testing.assert_array_equal(completion.logprobs, other.logprobs)
    assert not together


def test_an_update_in_flight_keeps_requests_and_cache(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    new = make_decoder(1)

    async def scenario() -> list[list[Completion]]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=4, max_model_len=220, run_id="run")
        groups = [
            asyncio.create_task(collect(engine, make_prompt(f"p{i}"), 3, LONG)) for i in range(2)
        ]
        await until_steps(engine, 10)
        assert await engine.apply(patch_of(new, 1)) == 1
        results = await asyncio.gather(*groups)
        await engine.close()
        return [list(result) for result in results]

    groups = run(scenario())
    completions = [completion for group in groups for completion in group]
    assert len(completions) == 6
    split = {completion.spans for completion in completions}
    assert len(split) == 2  # four were in flight, two had not begun
    assert (Span(1, 0, 200),) in split
    (both,) = split - {(Span(1, 0, 200),)}
    assert [span.version for span in both] == [0, 1] and both[0].stop == both[1].start >= 10
    decoders = {0: make_decoder(0), 1: new}
    for completion in completions:
        exact = replayed(decoders, make_prompt(completion.prompt_id), completion)
        np.testing.assert_allclose(completion.logprobs, exact, atol=2e-6, rtol=0)
        edge = completion.spans[0].stop
        prompt = make_prompt(completion.prompt_id)
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        by_first = (
            decoders[completion.spans[0].version]
            .token_logprobs(ids)[0, len(prompt.token_ids) - 1 :]
            .numpy()
        )
        np.testing.assert_allclose(completion.logprobs[:edge], by_first[:edge], atol=2e-6, rtol=0)


def test_update_without_pause_takes_effect_between_two_tokens(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    async def scenario() -> list[Completion]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=4, max_model_len=220, run_id="run")
        group = asyncio.create_task(collect(engine, make_prompt("p"), 4, LONG))
        for version in (1, 2, 3):
            await until_steps(engine, 20 * version)
            assert (
                await engine.apply(patch_of(make_decoder(version), version))
                == version
                == engine.version
            )
        result = await group
        await engine.close()
        return result

    for completion in run(scenario()):
        assert [span.version for span in completion.spans] == [0, 1, 2, 3]
        exact = replayed({v: make_decoder(v) for v in range(4)}, make_prompt("p"), completion)
        np.testing.assert_allclose(completion.logprobs, exact, atol=2e-6, rtol=0)


def test_abort_returns_what_was_decoded_and_ends_the_stream(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    async def scenario() -> tuple[list[Completion], list[Completion], list[Completion]]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=4, max_model_len=220)
        gone = asyncio.create_task(collect(engine, make_prompt("gone"), 6, LONG))
        kept = asyncio.create_task(collect(engine, make_prompt("kept"), 2, LONG))
        await until_steps(engine, 15)
        partial = await engine.abort(["gone", "unknown"])
        assert await engine.abort(["gone"]) == []
        results = partial, await gone, await kept
        await engine.close()
        return results

    partial, gone, kept = run(scenario())
    assert gone == []
    assert len(kept) == 2 and all(len(completion) == 200 for completion in kept)
    assert sorted(completion.sample for completion in partial) == list(range(6))
    assert {completion.finish_reason for completion in partial} == {"abort"}
    lengths = {completion.sample: len(completion) for completion in partial}
    assert all(15 <= lengths[s] < 200 for s in range(4)) and lengths[4] == lengths[5] == 0
    decoder = make_decoder(0)
    for completion in partial:
        if len(completion):
            exact = replayed({0: decoder}, make_prompt("gone"), completion)
            np.testing.assert_allclose(completion.logprobs, exact, atol=2e-6, rtol=0)


def test_an_aborted_sample_goes_on_as_if_nothing_had_happened(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    """By the same weights the tokens are those of the run that was not interrupted; by new ones,
    what follows is theirs, read anew from the first token on."""
    new, prompt = make_decoder(1), make_prompt("p")

    async def scenario(patch: WeightPatch | None) -> tuple[list[Completion], list[Completion]]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=2, max_model_len=220, run_id="run")
        group = asyncio.create_task(collect(engine, prompt, 3, LONG))
        await until_steps(engine, 20)
        parts = await engine.abort(["p"])
        await group
        if patch is not None:
            await engine.apply(patch)
        stream = engine.generate_all([(prompt, 3, LONG)], {"p": parts})
        whole = sorted([completion async for completion in stream], key=lambda c: c.sample)
        await engine.close()
        return sorted(parts, key=lambda c: c.sample), whole

    uninterrupted = EmbeddedEngine(make_decoder(0), max_num_seqs=2, max_model_len=220)
    uninterrupted.submit(prompt, 3, LONG)
    expected = sorted(uninterrupted.run(), key=lambda c: c.sample)
    parts, same = run(scenario(None))
    assert [len(part) >= 20 for part in parts] == [True, True, False], "the third had no slot yet"
    for completion, reference in zip(same, expected, strict=True):
        np.testing.assert_array_equal(completion.token_ids, reference.token_ids)
        np.testing.assert_allclose(completion.logprobs, reference.logprobs, atol=1e-6)
        assert (completion.sample, completion.spans) == (reference.sample, (Span(0, 0, 200),))

    parts, changed = run(scenario(patch_of(new, 1)))
    for part, completion in zip(parts, changed, strict=True):
        have = len(part)
        np.testing.assert_array_equal(completion.token_ids[:have], part.token_ids)
        np.testing.assert_array_equal(completion.logprobs[:have], part.logprobs)
        assert completion.spans == (
            (Span(0, 0, have), Span(1, have, 200)) if have else (Span(1, 0, 200),)
        )
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        by_new = new.token_logprobs(ids)[0, len(prompt.token_ids) - 1 :].numpy()
        np.testing.assert_allclose(completion.logprobs[have:], by_new[have:], atol=2e-6, rtol=0)


def test_a_consumer_that_leaves_frees_its_slots(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    async def scenario() -> int:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=2, max_model_len=1000)
        task = asyncio.create_task(
            collect(engine, make_prompt("left"), 2, Sampling(max_tokens=900))
        )
        await until_steps(engine, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (completion,) = await collect(engine, make_prompt("next"), 1, Sampling(max_tokens=3))
        assert len(completion) == 3
        steps = engine.counters.decode_steps
        await engine.close()
        return steps

    assert run(scenario()) < 900


def test_what_is_refused_leaves_the_old_weights_served(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    old, new = make_decoder(0), make_decoder(1)
    good = patch_of(new, 6)
    name = "model.layers.1.self_attn.k_proj.weight"
    flipped = good.tensors[name].data.copy()
    flipped[100] ^= 1
    damaged = replace(
        good, tensors={**good.tensors, name: replace(good.tensors[name], data=flipped)}
    )
    lacking = replace(
        good, tensors={key: tensor for key, tensor in good.tensors.items() if key != name}
    )
    unknown = replace(good, digests={**good.digests, "lm_head.weight": "0" * 32})
    cases: list[tuple[WeightPatch, type[Exception], str]] = [
        (damaged, DigestMismatchError, name),
        (lacking, DigestMismatchError, name),
        (unknown, DigestMismatchError, r"lm_head\.weight"),
        (replace(good, run_id="other"), VersionError, "run other.*run run"),
        (replace(good, version=4), VersionError, "4 after 5"),
        (replace(good, base_version=4), VersionError, "builds on 4.*serves 5"),
        (replace(good, version=5), DigestMismatchError, "version 5"),
        (
            replace(good, tensors={**good.tensors, name: replace(good.tensors[name], dtype="F32")}),
            ValueError,
            "got F32",
        ),
    ]

    async def scenario() -> None:
        engine = EmbeddedEngine(make_decoder(0), max_model_len=64, run_id="run", version=5)
        for patch, error, words in cases:
            with pytest.raises(error, match=words):
                await engine.apply(patch)
            assert engine.version == 5
            assert engine.digests() == old.digests()
        (completion,) = await collect(engine, make_prompt("p"), 1, Sampling(max_tokens=20))
        assert completion.spans == (Span(5, 0, 20),)
        exact = replayed({0: old, 5: old}, make_prompt("p"), completion)
        np.testing.assert_allclose(completion.logprobs, exact, atol=2e-6, rtol=0)

        assert await engine.apply(good) == 6
        assert await engine.apply(good) == 6
        assert engine.digests() == new.digests()
        await engine.close()

    run(scenario())


def a_few(old: Decoder, new: Decoder, version: int, every: int = 7) -> WeightPatch:
    """From `old` to what has every seventh element of `new`, as positions and values."""
    before = patch_of(old, version - 1)
    changes, after = {}, {}
    for name, tensor in before.tensors.items():
        kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[old.dtype.itemsize]
        data = tensor.data.copy()
        data.view(kind)[::every] = new.tensor_bytes(name).data.view(kind)[::every]
        after[name] = replace(tensor, data=data)
        changes[name] = between(tensor, after[name])
    whole = dense_patch("run", version, after.items())
    return replace(whole, tensors={}, changes=changes, base_version=version - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("tied", "told"), [(True, True), (False, True), (True, False)])
def test_positions_and_values_are_written_where_the_engine_reads(
    make_decoder: MakeDecoder,
    make_prompt: MakePrompt,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tied: bool,
    told: bool,
) -> None:
    """Into fused matrices, their copies for matrix units and a tied head: what it says afterwards
    is, bit for bit, what a decoder that loads the same bytes says. 64 hidden units: copies have
    blocks of 16 and 64. told: whether the layout of the copies can be."""
    if not told:
        monkeypatch.setattr(packed, "layout", lambda *_: None)
    shape = {"hidden_size": 64, "vocab_size": 100, "tie_word_embeddings": tied}
    old, new = (make_decoder(seed, dtype=dtype, **shape) for seed in (0, 1))
    old.pack()
    first = a_few(old, new, 6)
    ids = [3, 9, 90, 41, 7, 55]

    async def scenario() -> None:
        spare = make_decoder(0, dtype=dtype, **shape)
        spare.pack()
        warm = EmbeddedEngine(spare, max_model_len=220, run_id="run", version=5)
        await warm.apply(
            first
        )  # compiles, and learns the layouts, which takes longer than decoding
        await warm.close()
        engine = EmbeddedEngine(old, max_model_len=220, run_id="run", version=5)
        under_way = asyncio.create_task(collect(engine, make_prompt("p"), 2, LONG))
        await until_steps(engine, 5)
        assert await engine.apply(first) == 6
        assert engine.digests() == first.digests
        fresh = Decoder(old.arch, dtype)
        for name in old.weights:
            fresh.load(name, old.tensor_bytes(name))
        fresh.pack()
        expected = fresh.token_logprobs(torch.tensor([ids]))[0].float().numpy()
        np.testing.assert_array_equal(await engine.probe(ids), expected)
        for completion in await under_way:
            assert [span.version for span in completion.spans] == [5, 6]
        await engine.close()

    run(scenario())


def test_bad_positions_leave_the_old_weights_served(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    old, name = make_decoder(0, dtype=torch.float32), "model.layers.1.self_attn.k_proj.weight"
    old.pack()
    good = a_few(old, make_decoder(1, dtype=torch.float32), 6)
    change, before = good.changes[name], old.digests()

    def bad(**what: Any) -> WeightPatch:
        return replace(good, changes={**good.changes, name: replace(change, **what)})

    positions = change.positions
    cases: list[tuple[WeightPatch, type[Exception], str]] = [
        (bad(positions=positions + 10_000), CorruptPatchError, f"{name}: .*outside"),
        (bad(positions=positions[::-1].copy()), CorruptPatchError, f"{name}: .*ascend"),
        (bad(positions=positions // 8 * 8), CorruptPatchError, f"{name}: .*repeating"),
        (bad(checksum=change.checksum + 1), CorruptPatchError, f"{name}: .*checksum"),
        (bad(new=change.new[::-1].copy()), CorruptPatchError, f"{name}: .*checksum"),
        (bad(shape=(1, *change.shape)), ValueError, name),
        (
            replace(good, changes={**good.changes, "model.rope.weight": change}),
            ValueError,
            r"model\.rope\.weight is not a tensor of this",
        ),
        (
            replace(good, changes={k: v for k, v in good.changes.items() if k != name}),
            DigestMismatchError,
            name,
        ),
    ]

    async def scenario() -> None:
        engine = EmbeddedEngine(old, max_model_len=64, run_id="run", version=5)
        for patch, error, words in cases:
            for verified in (False, True):
                with pytest.raises(error, match=words):
                    await engine.apply(replace(patch, verified=verified))
                assert (engine.version, engine.digests()) == (5, before)
        (completion,) = await collect(engine, make_prompt("p"), 1, Sampling(max_tokens=20))
        assert completion.spans == (Span(5, 0, 20),)
        # what lies there is not what the change was made for: nothing is half written
        kept = old.weights["model.norm.weight"].clone()
        old.weights["model.norm.weight"][0] += 1
        with pytest.raises(DigestMismatchError, match=r"model\.norm\.weight: element 0"):
            await engine.apply(replace(good, verified=True))
        old.weights["model.norm.weight"].copy_(kept)
        assert engine.digests() == before
        with pytest.raises(DigestMismatchError, match="serves nothing"):
            await collect(engine, make_prompt("p"), 1, Sampling(max_tokens=2))
        await engine.close()

    run(scenario())


def test_the_version_already_served_is_not_loaded_again(make_decoder: MakeDecoder) -> None:
    loaded: list[str] = []

    class Recording(Decoder):
        def load(self, name: str, tensor: Any) -> None:
            loaded.append(name)
            super().load(name, tensor)

    source = make_decoder(0)
    decoder = Recording(source.arch, torch.float64)

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, version=-1)
        patch = patch_of(source, 0)
        assert await engine.apply(patch) == 0
        assert sorted(loaded) == sorted(source.weights)
        assert await engine.apply(patch) == 0
        assert len(loaded) == len(source.weights)
        assert engine.run_id == "run"
        with pytest.raises(VersionError, match="run other"):
            await engine.apply(replace(patch, run_id="other", version=1))
        await engine.close()

    run(scenario())


def test_weights_damaged_while_loading_are_never_served(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    class Faulty(Decoder):
        broken = True

        def load(self, name: str, tensor: Any) -> None:
            super().load(name, tensor)
            if self.broken and name == "model.norm.weight":
                self.norm[3] += 1

    source = make_decoder(1)
    decoder = Faulty(source.arch, torch.float64)
    for name in source.weights:
        Decoder.load(decoder, name, make_decoder(0).tensor_bytes(name))

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=220, run_id="run")
        with pytest.raises(DigestMismatchError, match=r"model\.norm\.weight"):
            await engine.apply(patch_of(source, 1))
        with pytest.raises(DigestMismatchError, match="serves nothing"):
            await collect(engine, make_prompt("q"), 1, Sampling(max_tokens=2))
        decoder.broken = False
        # anchored anew, it goes on with what it had
        assert await engine.apply(patch_of(source, 1)) == 1
        group = await collect(engine, make_prompt("p"), 2, Sampling(max_tokens=10))
        assert all(completion.spans == (Span(1, 0, 10),) for completion in group)
        await engine.close()

    run(scenario())


def test_errors_and_the_end_reach_every_stream(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    class Failing(Decoder):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            raise MemoryError("no room")

    source = make_decoder(0)
    failing = Failing(source.arch, torch.float64)
    for name in source.weights:
        failing.load(name, source.tensor_bytes(name))

    async def scenario() -> None:
        engine = EmbeddedEngine(failing, max_model_len=220)
        streams = [collect(engine, make_prompt(f"p{i}"), 1, LONG) for i in range(3)]
        for outcome in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(outcome, MemoryError)
        await engine.close()

        engine = EmbeddedEngine(make_decoder(0), max_model_len=5000)
        with pytest.raises(ValueError, match="max_model_len=5000"):
            await collect(engine, make_prompt("long"), 1, Sampling(max_tokens=5000))
        stream = asyncio.create_task(
            collect(engine, make_prompt("p"), 1, Sampling(max_tokens=4900))
        )
        await until_steps(engine, 3)
        await engine.close()
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await stream
        with pytest.raises(RuntimeError, match="closed"):
            await collect(engine, make_prompt("p"), 1, LONG)

    run(scenario())


def test_a_burst_beyond_its_deadline_is_an_error(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    class Stuck(Decoder):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            time.sleep(0.5)
            return super().logits(hidden)

    source = make_decoder(0)
    stuck = Stuck(source.arch, torch.float64)
    for name in source.weights:
        stuck.load(name, source.tensor_bytes(name))

    async def scenario() -> None:
        engine = EmbeddedEngine(stuck, max_model_len=220, deadline_s=0.1)
        with pytest.raises(TimeoutError, match=r"deadline_s"):
            await collect(engine, make_prompt("p"), 1, LONG)
        await engine.close()

    run(scenario())


def test_a_token_rate_holds_every_answer_to_it(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    """20 tokens at 100 a second, of four answers at once: the first comes with the prompt, 19 steps
    are 10 ms apart."""

    async def scenario() -> float:
        engine = EmbeddedEngine(make_decoder(0), max_model_len=64, token_rate=100)
        start = time.monotonic()
        await collect(engine, make_prompt("p"), 4, Sampling(max_tokens=20))
        seconds = time.monotonic() - start
        await engine.close()
        return seconds

    assert 0.18 <= run(scenario()) < 0.5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_num_seqs=0"):
        EmbeddedEngine("nowhere", max_num_seqs=0)
    with pytest.raises(ValueError, match="dtype=float16"):
        EmbeddedEngine("nowhere", dtype="float16")
