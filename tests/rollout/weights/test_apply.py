"""Applying patches: nothing is half done, nothing is done twice, and what is held afterwards is
what the learners hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emberl.rollout.weights.apply import advance, materialise
from emberl.rollout.weights.diff import Shard, TensorPart, diff, encode, join
from emberl.rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    TensorDelta,
    VersionError,
    VersionGap,
    WeightPatch,
    Weights,
    dense_patch,
    digest,
)
from emberl.rollout.weights.wire_format import from_bytes, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

Tensors = Mapping[str, TensorBytes]


def tensor(values: Any, dtype: str = "BF16") -> TensorBytes:
    array = np.asarray(values, {"BF16": np.uint16, "F32": np.uint32}[dtype])
    return TensorBytes(dtype=dtype, shape=array.shape, data=array.reshape(-1).view(np.uint8).copy())


def numbers(held: TensorBytes) -> list[int]:
    width = {"BF16": np.uint16, "F32": np.uint32}[held.dtype]
    return [int(x) for x in held.data.view(width)]


def history(versions: int, size: int = 300, seed: int = 0) -> list[dict[str, TensorBytes]]:
    """The tensors of each version: one that changes a little, one that changes now and then, one
    that never does."""
    rng = np.random.default_rng(seed)
    up, norm = rng.integers(0x3C00, 0x3D00, size), rng.integers(0, 2**32, 7)
    tensors = []
    for version in range(versions):
        tensors.append({"up": tensor(up), "norm": tensor(norm, "F32"), "rope": tensor([1, 2, 3])})
        up = up + rng.choice([-1, 0, 0, 0, 1], size)
        norm = rng.integers(0, 2**32, 7) if version % 3 == 0 else norm
    return tensors


def bytes_of(tensors: Tensors) -> dict[str, bytes]:
    return {name: held.data.tobytes() for name, held in tensors.items()}


def anchored(tensors: Tensors, version: int = 0, run_id: str = "run") -> Weights:
    return advance(None, materialise(dense_patch(run_id, version, tensors.items()), None))


def test_a_patch_holds_what_changed_and_the_digest_of_everything() -> None:
    old, new = history(3)[1:]
    base = anchored(old, 1)
    patch = encode(base, new, run_id="run", version=2)
    assert patch.deltas.keys() == {"up"} and patch.tensors == {}
    assert (patch.base_version, patch.base_root) == (1, base.root)
    assert patch.digests == {name: digest(held.data) for name, held in new.items()}
    assert 0 < patch.num_bytes < 300 * 2 / 3


def test_prepare_stands_beside_and_commit_swaps() -> None:
    old, new = history(2)
    held = anchored(old)
    before = bytes_of(held.tensors)
    prepared = materialise(encode(held, new, run_id="run", version=1), held, threads=2)
    assert prepared.tensors.keys() == {"up", "norm"}
    assert bytes_of(held.tensors) == before and held.version == 0
    after = advance(held, prepared)
    assert (after.version, bytes_of(after.tensors)) == (1, bytes_of(new))
    assert bytes_of(held.tensors) == before
    assert after.tensors["rope"] is held.tensors["rope"]
    assert numbers(after.tensors["up"]) == numbers(new["up"])


def test_applied_and_late_patches_do_nothing() -> None:
    tensors = history(4)
    held = anchored(tensors[0])
    patches = []
    for version in (1, 2, 3):
        patches.append(encode(held, tensors[version], run_id="run", version=version))
        held = advance(held, materialise(patches[-1], held))
    for patch in [
        *patches,
        dense_patch("run", 2, tensors[2].items()),
        dense_patch("run", 3, tensors[3].items()),
    ]:
        prepared = materialise(patch, held)
        assert (prepared.version, prepared.tensors) == (3, {})
        assert advance(held, prepared) is held
    # prepared before the newer ones were committed
    stale = dense_patch("run", 2, tensors[2].items())
    assert advance(held, stale) is held


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    tensors = history(4)
    held = anchored(tensors[1], 1)
    other = anchored(history(4, seed=1)[1], 1)
    good = encode(held, tensors[2], run_id="run", version=2)
    chunk = good.deltas["up"].chunks[0]
    flipped = chunk.payload.copy()
    flipped[5] ^= 4
    damaged = replace(good.deltas["up"], chunks=(replace(chunk, payload=flipped),))
    longer = replace(good.deltas["up"], shape=(301,))
    whole = dense_patch("run", 2, tensors[2].items())
    cases: list[tuple[WeightPatch, Weights | None, type[Exception], str]] = [
        (good, None, VersionGap, "builds on version 1, but nothing is held"),
        (
            replace(good, base_version=0),
            held,
            VersionGap,
            "builds on version 0, but version 1 is held",
        ),
        (
            replace(good, base_version=2, version=3),
            held,
            VersionGap,
            "builds on version 2, but version 1 is held",
        ),
        (good, other, VersionGap, "another version 1 than the one that is held"),
        (
            replace(good, run_id="new"),
            held,
            VersionError,
            "run new, but these weights are of run run",
        ),
        (replace(whole, version=1), held, DigestMismatchError, "tensor up of version 1"),
        (
            replace(good, deltas={"up": damaged}),
            held,
            CorruptPatchError,
            "tensor up, chunk 0: its .* CRC",
        ),
        (
            replace(good, deltas={"up": longer}),
            held,
            CorruptPatchError,
            "tensor up: chunks of 300 elements for 301",
        ),
        (replace(good, deltas={}), held, DigestMismatchError, "tensor up of version 2"),
        (
            replace(good, digests={**good.digests, "rope": "0" * 32}),
            held,
            DigestMismatchError,
            "tensor rope of",
        ),
        (
            replace(good, digests={**good.digests, "more": "0" * 32}),
            held,
            DigestMismatchError,
            "holds nothing",
        ),
        (
            replace(good, deltas={"down": good.deltas["up"]}),
            held,
            ValueError,
            "down: .* nothing here",
        ),
        (
            replace(good, deltas={"rope": good.deltas["up"]}),
            held,
            ValueError,
            r"rope: .*\(300,\) of .*\(3,\)",
        ),
        (
            replace(whole, base_version=1, tensors={"up": tensor([1], "F32")}),
            held,
            ValueError,
            "up: .* F32",
        ),
        (
            replace(whole, tensors={**tensors[2], "up": tensors[1]["up"]}),
            held,
            DigestMismatchError,
            "tensor up of",
        ),
    ]
    for patch, base, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            materialise(patch, base)
        assert raised.type is error
        assert bytes_of(held.tensors) == bytes_of(tensors[1])
    assert bytes_of(advance(held, materialise(good, held)).tensors) == bytes_of(tensors[2])


def test_what_was_prepared_against_other_weights_is_not_committed() -> None:
    tensors = history(3)
    held, other = anchored(tensors[0]), anchored(history(3, seed=1)[0])
    prepared = materialise(encode(held, tensors[2], run_id="run", version=2), held)
    newer = advance(held, materialise(encode(held, tensors[1], run_id="run", version=1), held))
    for now, error, words in [
        (newer, VersionGap, "builds on version 0, but version 1 is held"),
        (other, VersionGap, "another version 0"),
        (None, VersionGap, "nothing is held"),
        (
            anchored(tensors[0], run_id="new"),
            VersionError,
            "run run, but these weights are of run new",
        ),
    ]:
        with pytest.raises(error, match=words):
            advance(now, prepared)


def test_an_anchor_follows_anything() -> None:
    tensors = history(5)
    for make in (
        lambda version: dense_patch("run", version, tensors[version].items()),
        lambda version: encode(None, tensors[version], run_id="run", version=version),
    ):
        for held in (None, anchored(tensors[1], 1), anchored({"old": tensors[0]["rope"]})):
            after = advance(held, materialise(from_bytes(to_bytes(make(4))), held))
            assert (after.version, bytes_of(after.tensors)) == (4, bytes_of(tensors[4]))
    lacking = dense_patch("run", 4, tensors[4].items())
    with pytest.raises(
        DigestMismatchError, match="tensor rope of version 4: the engine holds nothing"
    ):
        materialise(
            replace(lacking, tensors={k: v for k, v in tensors[4].items() if k != "rope"}),
            anchored(tensors[1], 1),
        )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9),
    deliveries=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=30),
)
def test_whatever_arrives_in_whatever_order_only_true_versions_are_held(
    seed: int, deliveries: list[tuple[int, bool]]
) -> None:
    tensors = history(8, size=200, seed=seed)
    versions = [anchored(of, version) for version, of in enumerate(tensors)]
    patches = [encode(versions[v - 1], tensors[v], run_id="run", version=v) for v in range(1, 8)]
    held: Weights | None = None
    for version, anchor in deliveries:
        patch = (
            dense_patch("run", version, tensors[version].items())
            if anchor
            else patches[max(0, version - 1)]
        )
        before = -1 if held is None else held.version
        try:
            held = advance(held, materialise(patch, held))
        except VersionGap:
            assert patch.base_version not in (None, before) and patch.version > before
            continue
        assert held.version == max(before, patch.version)
        assert bytes_of(held.tensors) == bytes_of(tensors[held.version])


def part_of(
    rows: tuple[int, int], old: TensorBytes, new: TensorBytes, shape: tuple[int, ...] = (300,)
) -> dict[str, TensorPart]:
    part = slice(2 * rows[0], 2 * rows[1])
    shard = Shard(dtype="BF16", shape=shape, start=rows[0], data=new.data[part])
    return diff({"up": old.data[part]}, {"up": shard})


def test_parts_that_do_not_make_the_tensor_are_refused() -> None:
    before, after = history(2)
    old, new = before["up"], after["up"]
    held = anchored({"up": old})
    for rows, words in [
        ([(0, 100)], "end at element 100 of 300"),
        ([(0, 100), (150, 300)], "begins at element 150 where 100 is the next"),
        ([(0, 200), (100, 300)], "begins at element 100 where 200 is the next"),
        ([], "up; only an anchor"),
    ]:
        with pytest.raises(ValueError, match=words):
            join([part_of(row, old, new) for row in rows], held, run_id="run", version=1)
    with pytest.raises(ValueError, match=r"up is BF16 \(3, 100\) and BF16 \(300,\) at once"):
        join([part_of((0, 300), old, new, (3, 100))], held, run_id="run", version=1)
    with pytest.raises(ValueError, match=r"up: 600 bytes of BF16 cannot follow 598 bytes"):
        diff(
            {"up": old.data[2:]}, {"up": Shard(dtype="BF16", shape=(300,), start=0, data=new.data)}
        )
    with pytest.raises(ValueError, match="dtype F4"):
        diff(None, {"up": Shard(dtype="F4", shape=(300,), start=0, data=new.data)})
    for version, run_id in ((0, "run"), (1, "new")):
        with pytest.raises(
            VersionError, match=f"version {version} of run {run_id} cannot follow 0 of run run"
        ):
            join([part_of((0, 300), old, new)], held, run_id=run_id, version=version)


def test_a_rank_that_remembers_other_weights_is_found() -> None:
    before, after = history(2)
    old, new = before["up"], after["up"]
    strayed = tensor([x ^ (i == 250) for i, x in enumerate(numbers(old))])
    parts = [part_of((0, 100), strayed, new), part_of((100, 300), strayed, new)]
    with pytest.raises(DigestMismatchError, match="tensor up: the part from element 100"):
        join(parts, anchored({"up": old}), run_id="run", version=1)
    whole = join([part_of((0, 300), strayed, new)], anchored({"up": old}), run_id="run", version=1)
    with pytest.raises(DigestMismatchError, match="tensor up of version 1"):
        materialise(whole, anchored({"up": old}))


def test_a_tensor_without_elements_and_ranks_without_a_share() -> None:
    before, after = history(2)
    old, new = before["up"], after["up"]
    parts = [part_of((300, 300), old, new), part_of((0, 300), old, new), part_of((0, 0), old, new)]
    assert join(parts, anchored({"up": old}), run_id="run", version=1).deltas["up"].shape == (300,)
    nothing = {"none": tensor(np.empty((0, 4)))}
    for base in (None, anchored(nothing)):
        patch = encode(base, nothing, run_id="run", version=1)
        assert advance(base, materialise(from_bytes(to_bytes(patch)), base)).tensors[
            "none"
        ].shape == (
            0,
            4,
        )
        assert isinstance(patch.deltas.get("none"), TensorDelta) == (base is None)
