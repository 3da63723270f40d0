"""A change of version, step by step: what is refused before it, what it leaves, and a canary that
goes the way of updates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.matrix import packable
from emberl.rollout.embedded.model import AUDIT, Decoder
from emberl.rollout.samples import Prompt, Sampling
from emberl.rollout.weights import canary as canaries
from emberl.rollout.weights.canary import altered, canary_of, written_in_place
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    DigestMismatchError,
    MovedError,
    TensorBytes,
    VersionError,
    WeightPatch,
    dense_patch,
    digest,
)

MakeDecoder = Callable[..., Decoder]
IDS = [3, 9, 50, 41, 7, 55]
NAME = "model.layers.1.self_attn.k_proj.weight"


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 180))


def packed(make_decoder: MakeDecoder, seed: int = 0) -> Decoder:
    decoder = make_decoder(seed, dtype=torch.float32, hidden_size=64, vocab_size=100)
    decoder.pack()
    return decoder


def one_changed(decoder: Decoder, version: int) -> WeightPatch:
    """Elements 5 and 6 of one tensor change places, as positions and values."""
    held = decoder.tensor_bytes(NAME)
    data = held.data.copy()
    data.view(np.float32)[5:7] = data.view(np.float32)[6:4:-1].copy()
    after = TensorBytes(dtype=held.dtype, shape=held.shape, data=data)
    return replace(
        dense_patch("run", version, {}.items()),
        digests=decoder.digests() | {NAME: digest(data)},
        changes={NAME: between(held, after)},
        base_version=version - 1,
        verified=True,
    )


def test_a_tensor_that_lies_elsewhere_is_refused_by_name_and_the_old_version_serves(
    make_decoder: MakeDecoder,
) -> None:
    """Somebody made it anew: what decodes reads where it was."""
    decoder = packed(make_decoder)
    patch = one_changed(decoder, 6)

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=5)
        served, held = await engine.probe(IDS), decoder.weights
        decoder.weights = {**held, NAME: held[NAME].clone()}
        for refused in (patch, dense_patch("run", 6, {NAME: decoder.tensor_bytes(NAME)}.items())):
            with pytest.raises(MovedError, match=rf"version 6: {NAME} lies elsewhere"):
                await engine.apply(refused)
        assert engine.version == 5
        np.testing.assert_array_equal(await engine.probe(IDS), served)
        decoder.weights = held
        assert await engine.apply(patch) == 6
        assert np.abs(await engine.probe(IDS) - served).max() > 0
        await engine.close()

    run(scenario())


def layer_norm(decoder: Decoder) -> str:
    decoder.layers[1].mlp_norm = decoder.layers[1].mlp_norm.clone()
    return "model.layers.1.post_attention_layernorm.weight"


def fused_matrix(decoder: Decoder) -> str:
    matrix = decoder.layers[0].qkv
    matrix.weight = matrix.weight.clone()
    matrix.repack()
    return "model.layers.0.self_attn.q_proj.weight"


def tied_head(decoder: Decoder) -> str:
    decoder.head.weight = decoder.embedding.clone()
    decoder.head.repack()
    return "lm_head.weight"


@pytest.mark.parametrize("replaced", [layer_norm, fused_matrix, tied_head])
def test_what_passes_read_made_anew_is_refused_at_the_next_update(
    make_decoder: MakeDecoder, replaced: Any
) -> None:
    """What is written stays where it was, so all digests would be right."""
    decoder = packed(make_decoder)
    patch = one_changed(decoder, 6)

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=5)
        served = await engine.probe(IDS)
        name = replaced(decoder)
        with pytest.raises(MovedError, match=rf"version 6: {name} lies elsewhere"):
            await engine.apply(patch)
        assert engine.version == 5
        np.testing.assert_array_equal(await engine.probe(IDS), served)
        await engine.close()

    run(scenario())


def whole_patch(decoder: Decoder, version: int, **changed: Any) -> WeightPatch:
    """Of all tensors as they are, but for `changed` fields of `NAME`."""
    tensors = {name: decoder.tensor_bytes(name) for name in decoder.weights}
    tensors = {n: replace(t, data=t.data.copy()) for n, t in tensors.items()}
    tensors[NAME] = replace(tensors[NAME], **changed)
    return dense_patch("run", version, tensors.items())


def test_a_patch_that_cannot_be_is_refused_by_name_and_the_old_version_serves(
    make_decoder: MakeDecoder,
) -> None:
    decoder = packed(make_decoder)
    held, good = decoder.tensor_bytes(NAME), one_changed(decoder, 6)
    wide = held.data.view(np.uint16)
    fewer = {n: d for n, d in good.digests.items() if n != NAME}
    bad: list[tuple[WeightPatch, type[Exception], str]] = [
        (whole_patch(decoder, 6, data=held.data[:-4]), ValueError, f"{NAME}: F32 .* bytes, got"),
        (whole_patch(decoder, 6, data=wide), ValueError, f"{NAME}: its data must be bytes"),
        (replace(good, tensors={NAME: held}), ValueError, f"{NAME} comes twice in patch 6"),
        (replace(good, digests=fewer), DigestMismatchError, f"tensor {NAME} .* hold nothing"),
        (
            replace(good, digests={**good.digests, "x": "00" * 16}),
            DigestMismatchError,
            "tensor x of version 6: the engine holds nothing",
        ),
        (replace(good, base_root="00" * 16), VersionError, "6 builds on another version 5"),
    ]

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=-1)
        await engine.apply(whole_patch(decoder, 5))
        served = await engine.probe(IDS)
        for patch, error, words in bad:
            with pytest.raises(error, match=words):
                await engine.apply(patch)
            np.testing.assert_array_equal(await engine.probe(IDS), served)
        assert engine.version == 5 and await engine.apply(good) == 6
        await engine.close()

    run(scenario())


@pytest.mark.skipif(not packable(torch.float32), reason="this build of torch packs no matrices")
@pytest.mark.parametrize("damaged", [False, True])
def test_a_change_made_for_other_weights_leaves_the_old_version_where_that_is_whole(
    make_decoder: MakeDecoder, damaged: bool
) -> None:
    """damaged: it is the copy that decodes which has something else."""
    decoder = packed(make_decoder)
    held, patch = decoder.tensor_bytes(NAME), one_changed(decoder, 6)

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=-1)
        await engine.apply(whole_patch(decoder, 5))
        decoder.places(NAME)  # where it lies is known before it is damaged
        other = replace(held, data=held.data.copy())
        other.data[20] ^= 1  # of element 5
        if damaged:
            place = decoder.places(NAME)[0][1]
            place.memory[place.columns[5] + place.rows[0]] ^= 1
            refused = patch
        else:
            after = replace(held, data=held.data.copy())
            after.data[20] ^= 2
            digests = {**patch.digests, NAME: digest(after.data)}
            refused = replace(patch, changes={NAME: between(other, after)}, digests=digests)
        served = await engine.probe(IDS)
        with pytest.raises(DigestMismatchError, match=f"{NAME}: element 5 .* was made for"):
            await engine.apply(refused)
        if damaged:
            with pytest.raises(DigestMismatchError, match="serves nothing"):
                await engine.probe(IDS)
            assert await engine.apply(whole_patch(decoder, 6)) == 6
        else:
            np.testing.assert_array_equal(await engine.probe(IDS), served)
            assert engine.held is not None and await engine.apply(patch) == 6
        await engine.close()

    run(scenario())


@pytest.mark.skipif(not packable(torch.float32), reason="this build of torch packs no matrices")
def test_a_copy_with_one_other_element_is_found_within_some_updates(
    make_decoder: MakeDecoder,
) -> None:
    """Which no update writes and no comparison of log-probs sees."""
    decoder = packed(make_decoder)
    down = "model.layers.0.mlp.down_proj.weight"

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=0)
        place = decoder.places(down)[0][1]
        place.memory[place.rows[3] + place.columns[3]] ^= 1
        for version in range(1, AUDIT + 1):
            try:
                await engine.apply(one_changed(decoder, version))
            except DigestMismatchError as error:
                found = str(error)
                break
        assert f"tensor {down}: the copy of its matrix that is multiplied" in found
        await engine.apply(whole_patch(decoder, version))
        for later in range(1, AUDIT + 1):
            await engine.apply(one_changed(decoder, version + later))
        await engine.close()

    run(scenario())


def test_what_does_not_lie_where_it_was_written_is_served_to_nobody(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read back before a token is decoded with it; who waits for tokens gets the error."""
    decoder = packed(make_decoder)
    patch = one_changed(decoder, 6)
    whole = {name: decoder.tensor_bytes(name) for name in decoder.weights}

    async def scenario() -> None:
        engine = EmbeddedEngine(decoder, max_model_len=220, run_id="run", version=5)
        prompt = Prompt(id="p", token_ids=(3, 9), answer="", source="")
        request = (prompt, 1, Sampling(max_tokens=200))
        places = decoder.places

        def damaged(name: str) -> Any:
            """Two elements lie in one place."""
            found, stale = places(name)
            place = replace(found[0], columns=found[0].columns.clone())
            place.columns[6] = place.columns[5]
            return [place, *found[1:]], stale

        async def decode() -> list[Any]:
            return [completion async for completion in engine.generate_all([request])]

        under_way = asyncio.create_task(decode())
        await asyncio.sleep(0.01)
        monkeypatch.setattr(decoder, "places", damaged)
        monkeypatch.setattr(engine._batch, "weights_changed", pytest.fail)
        with pytest.raises(DigestMismatchError, match=f"{NAME}: element 5 .* does not hold"):
            await engine.apply(patch)
        for tokens in (under_way, decode()):
            with pytest.raises(DigestMismatchError):
                await tokens
        monkeypatch.undo()
        assert await engine.apply(dense_patch("run", 6, whole.items())) == 6
        assert len(await decode()) == 1
        await engine.close()

    run(scenario())


@pytest.mark.skipif(not packable(torch.float32), reason="this build of torch packs no matrices")
@pytest.mark.parametrize("most", [0, 5000, 1 << 27])
def test_a_canary_goes_both_ways_that_updates_go(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """most: elements that are written in place, none, those of some tensors, of all."""
    monkeypatch.setattr(canaries, "MOST_IN_PLACE", most)
    decoder, twin = packed(make_decoder), packed(make_decoder)
    squares = {n: (tuple(t.shape), float(t.square().sum())) for n, t in decoder.weights.items()}
    canary = canary_of(7, squares)
    sizes = {name: tensor.numel() for name, tensor in decoder.weights.items()}
    written = written_in_place(sizes, canary)
    assert len(written) == {0: 0, 1 << 27: len(sizes)}.get(most, len(written))
    if most == 5000:
        assert 0 < len(written) < len(sizes)
        assert written != written_in_place(sizes, replace(canary, seed=8)), "others each time"
    for name in twin.weights:
        twin.load(name, altered(name, twin.tensor_bytes(name), canary))
    twin.pack()
    expected = twin.token_logprobs(torch.tensor([IDS]))[0].numpy()
    first, found = decoder.tensor_bytes, []
    whole = {name: replace(first(name), data=first(name).data.copy()) for name in sizes}

    async def scenario(*, reaches_copies: bool) -> None:
        engine = EmbeddedEngine(decoder, max_model_len=64, run_id="run", version=-1)
        await engine.apply(dense_patch("run", 5, whole.items()))
        served = await engine.probe(IDS)
        places = decoder.places
        if not reaches_copies:
            monkeypatch.setattr(decoder, "places", lambda n: (places(n)[0][:1], []))
        await engine.canary(canary)
        found.append(np.array_equal(await engine.probe(IDS), expected))
        await engine.canary(None)
        np.testing.assert_array_equal(await engine.probe(IDS), served)
        await engine.close()

    run(scenario(reaches_copies=True))
    run(scenario(reaches_copies=False))
    assert found == [True, most == 0], "what does not reach a copy shows"
