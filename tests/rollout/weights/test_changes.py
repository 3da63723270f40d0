"""Positions and values: what is found is what changed, what is bad is refused by name, and what is
written lies in every place or in none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.patch_coding import scatter
from emberl.rollout.weights import changes
from emberl.rollout.weights.apply import advance, materialise, merge, resolve
from emberl.rollout.weights.changes import MOST, between, check, merged, patched, piecewise
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.in_place import PIECE, Place, Writing, plain, signed, weight
from emberl.rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    TensorChange,
    Weights,
    dense_patch,
    digest,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def tensor(values: Any, dtype: str = "BF16") -> TensorBytes:
    array = np.asarray(values, {"BF16": np.uint16, "F32": np.uint32}[dtype])
    data = array.reshape(-1).view(np.uint8).copy()
    return TensorBytes(dtype=dtype, shape=array.shape, data=data)


def anchored(tensors: dict[str, TensorBytes]) -> Weights:
    return advance(None, materialise(dense_patch("run", 0, tensors.items()), None))


CHANGE = between(tensor([5, 6, 7, 8, 9]), tensor([5, 7, 7, 8, 4]))


def test_what_changed_in_numbers() -> None:
    assert (CHANGE.positions.tolist(), CHANGE.old.tolist(), CHANGE.new.tolist()) == (
        [1, 4],
        [6, 9],
        [7, 4],
    )
    assert CHANGE.positions.dtype == np.int32
    weights = [signed(int(scatter.weight(p))) for p in (1, 4)]
    assert all(w % 2 for w in weights)
    assert CHANGE.checksum == signed(weights[0] * (7 - 6) + weights[1] * (4 - 9))
    # 0x9E3779B97F4A7C15 * 2, folded, times the second factor, made odd: by hand of Python's integers
    mixed = 2 * 0x9E3779B97F4A7C15 % 2**64
    assert weights[0] % 2**64 == (mixed ^ mixed >> 32) * 0xB4B82F3A5D5B4E25 % 2**64 | 1


def test_a_checksum_follows_its_tensor_on_every_device() -> None:
    rng = np.random.default_rng(0)
    before = tensor(rng.integers(0, 1 << 16, (7, 11)))
    after = tensor(rng.integers(0, 1 << 16, (7, 11)))

    def whole(side: TensorBytes) -> int:
        held = torch.from_numpy(side.data).view(torch.bfloat16).view(7, 11)
        positions = torch.arange(77)
        elements = held.reshape(-1).view(torch.int16).long() & 0xFFFF
        on_device = int((weight(positions) * elements).sum())
        parts = [plain(held[:3], (7, 11)), plain(held[3:, :4], (7, 11), (3, 0))]
        parts.append(plain(held[3:, 4:], (7, 11), (3, 4)))
        assert signed(sum(part.checksum() for part in parts)) == on_device
        return on_device

    assert signed(whole(before) + between(before, after).checksum) == whole(after)


def test_a_patch_is_resolved_to_what_changed_and_proved_by_the_tensor_it_gives() -> None:
    rng = np.random.default_rng(1)
    old = {"up": tensor(rng.integers(0x3C00, 0x3D00, 4000)), "norm": tensor([1, 2, 3, 4])}
    rows = old["up"].data.view(np.uint16).copy()
    rows[[3, 70, 3999]] += 1
    new = {"up": tensor(rows), "norm": tensor([5, 6, 3, 4])}
    held = anchored(old)
    coded = encode(held, new, run_id="run", version=1)
    patch = resolve(coded, held)
    assert patch.verified and patch.tensors.keys() == {"norm"}, f"beyond {MOST} it comes whole"
    assert patch.changes["up"].positions.tolist() == [3, 70, 3999]
    assert digest(patched(old["up"], patch.changes["up"]).data) == patch.digests["up"]
    # the bytes that it was made for are damaged where it changes nothing
    held.tensors["up"].data[999] ^= 1
    with pytest.raises(DigestMismatchError, match="tensor up of version 1"):
        resolve(coded, held)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 20), st.floats(0, 0.3), st.floats(0, 0.3))
def test_two_patches_as_one(seed: int, first: float, second: float) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 1 << 16, 200)]
    for share in (first, second):
        rows.append(np.where(rng.random(200) < share, rng.integers(0, 1 << 16, 200), rows[-1]))
    held = anchored({"a": tensor(rows[0])})
    one = resolve(encode(held, {"a": tensor(rows[1])}, run_id="run", version=1), held)
    there = anchored({"a": tensor(rows[1])})
    there = replace(there, version=1)
    two = resolve(encode(there, {"a": tensor(rows[2])}, run_id="run", version=2), there)
    both = merge(one, two)
    assert (both.base_version, both.version) == (0, 2)
    final = both.tensors.get("a")
    if "a" in both.changes:
        check("a", both.changes["a"], "BF16", (200,))
        assert np.array_equal(
            both.changes["a"].old, tensor(rows[0]).data.view(np.uint16)[both.changes["a"].positions]
        )
        final = patched(tensor(rows[0]), both.changes["a"])
    if final is not None:
        assert digest(final.data) == two.digests["a"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"positions": np.array([1, 5], np.int32)}, "position 5 is outside of its 5 elements"),
        ({"positions": np.array([-1, 4], np.int32)}, "position -1 is outside"),
        ({"positions": np.array([4, 4], np.int32)}, "position 4 comes after 4"),
        ({"positions": np.array([4, 1], np.int32)}, "position 1 comes after 4"),
        ({"positions": np.array([1, 3], np.int32)}, "checksum"),
        ({"new": np.array([7, 5], np.uint16)}, "checksum"),
        ({"old": np.array([6, 8], np.uint16)}, "checksum"),
        ({"new": np.array([7], np.uint16)}, "as many"),
        ({"new": np.array([7, 4], np.uint32)}, "values of 2 bytes"),
        ({"positions": CHANGE.positions[:, None]}, "one dimension"),
        ({"positions": CHANGE.positions.astype(">i4")}, "integers of 4 or 8 bytes"),
        ({"positions": CHANGE.positions.astype("i1")}, "integers of 4 or 8 bytes"),
    ],
)
def test_a_bad_change_is_refused_with_the_tensors_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(CorruptPatchError, match=f"tensor a: .*{words}"):
        check("a", replace(CHANGE, **bad), "BF16", (5,))


def test_of_another_tensor_it_is_refused() -> None:
    check("a", CHANGE, "BF16", (5,))
    with pytest.raises(ValueError, match=r"a: got BF16 \(5,\), the engine serves BF16 \(6,\)"):
        check("a", CHANGE, "BF16", (6,))


def places_of(held: torch.Tensor) -> list[Place]:
    """Two ranks' columns of it, and a copy that is transposed."""
    copy = held.t().contiguous()
    left, right = held[:, :2].clone(), held[:, 2:].clone()
    return [
        plain(left, held.shape),
        plain(right, held.shape, (0, 2)),
        plain(copy.t(), held.shape),
    ]


def numbers(place: Place) -> list[int]:
    return [int(x) for x in place.memory]


def test_what_is_written_lies_in_every_place_or_in_none() -> None:
    before, after = tensor([[1, 2, 3], [4, 5, 6]]), tensor([[1, 9, 3], [4, 5, 8]])
    held = torch.from_numpy(before.data).view(torch.bfloat16).view(2, 3)
    places, change = places_of(held), between(before, after)
    writing = Writing([("a", change, places)])
    writing.write()
    assert [numbers(place) for place in places] == [[1, 9, 4, 5], [3, 8], [1, 4, 9, 5, 3, 8]]
    places[2].memory[5] = 7
    back = replace(between(after, before))
    with pytest.raises(DigestMismatchError, match=r"tensor a: element 5 in the engine's memory is"):
        Writing([("a", back, places)]).write()
    assert [numbers(place) for place in places] == [[1, 9, 4, 5], [3, 8], [1, 4, 9, 5, 3, 7]]


@pytest.mark.parametrize("threads", [1, 3])
def test_large_changes_are_written_by_threads_piece_by_piece(threads: int) -> None:
    size = 5 * PIECE // 2
    rng = np.random.default_rng(2)
    before = tensor(rng.integers(0, 1 << 16, size))
    after = tensor(np.where(rng.random(size) < 0.9, rng.integers(0, 1 << 16, size), 7))
    held = torch.from_numpy(before.data.copy()).view(torch.bfloat16)
    change = between(before, after)
    writing = Writing([("a", change, [plain(held, (size,))])], threads)
    writing.write()
    bits = held.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bits, after.data.view(np.uint16))
    last = int(change.positions[-1])
    writing.take_back()
    bits[last] ^= 1
    with pytest.raises(DigestMismatchError, match=f"tensor a: element {last} .* was made for"):
        writing.write()
    bits[last] ^= 1
    assert np.array_equal(bits, before.data.view(np.uint16)), (
        "what other threads wrote is taken back"
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [4, 3 * scatter.BLOCK])
def test_what_does_not_lie_there_once_written_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, count: int, on_device: bool
) -> None:
    """The place has room for one element where it seems to have room for two: the second write
    finds what it was made for, and the first is gone."""
    if on_device:  # whose way any tensor can go
        monkeypatch.setattr(Place, "find", Place._found_on_device)
    before = np.arange(count)
    before[-1] -= on_device  # there all is compared before anything is written
    after = np.arange(1, count + 1)
    held = torch.from_numpy(tensor(before).data).view(torch.bfloat16)
    place = plain(held, (count,))
    place.columns[-1] = place.columns[-2]
    writing = Writing([("a", between(tensor(before), tensor(after)), [place])])
    with pytest.raises(DigestMismatchError, match=rf"element {count - 2} .* does not hold"):
        writing.write()
    assert numbers(place) == before.tolist()


def test_a_change_piece_by_piece_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PIECE", 2)
    before, after = tensor([[1, 2, 3], [4, 5, 6]]), tensor([[9, 2, 3], [4, 7, 8]])
    pieces = list(piecewise(before, after))
    assert [piece.positions.tolist() for piece in pieces] == [[0], [], [4, 5]]
    for piece in pieces:
        check("a", piece, "BF16", (2, 3))
        before = patched(before, piece)
    assert np.array_equal(before.data, after.data)


def test_merged_keeps_what_lay_there_first() -> None:
    first = between(tensor([1, 2, 3, 4]), tensor([1, 7, 3, 8]))
    second = between(tensor([1, 7, 3, 8]), tensor([6, 5, 3, 8]))
    both: TensorChange = merged(first, second)
    assert both.positions.tolist() == [0, 1, 3]
    assert (both.old.tolist(), both.new.tolist()) == ([1, 2, 4], [6, 5, 8])
