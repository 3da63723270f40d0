"""Coding chunks: the mode that is smallest, how small it is, and streams that are not streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zstandard
from emberl.kernels.patch_coding.delta import decode_changes, encode_changes
from emberl.rollout.weights.codec import CHUNK_BYTES, check_chunk, decode_chunk, encode_chunk
from emberl.rollout.weights.diff import Shard, diff
from emberl.rollout.weights.patch import ELEMENT_BYTES, CorruptPatchError, Mode
from hypothesis import given, settings
from hypothesis import strategies as st

BF16 = ELEMENT_BYTES["BF16"]
Array = np.ndarray[Any, Any]


def bf16(values: Array) -> Array:
    """Rounded to nearest, as bit patterns."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def optimizer_step(count: int, lr: float, seed: int = 0) -> tuple[Array, Array]:
    """Bit patterns of weights N(0, 0.02) around an AdamW step with noisy gradients, late enough to
    be steady: float32 masters of which bfloat16 copies are served."""
    rng = np.random.default_rng(seed)
    master = rng.normal(0, 0.02, count).astype(np.float32)
    # of betas (0.9, 0.95) with unit gradients
    momentum = np.sqrt((1 - 0.9) / (1 + 0.9)) * rng.normal(0, 1, count)
    return bf16(master), bf16(master - np.float32(lr) * momentum.astype(np.float32))


def flipped(old: Array, density: float, seed: int = 1) -> Array:
    """`old` with this share of elements moved to a neighbour."""
    rng = np.random.default_rng(seed)
    step = rng.choice(np.array([1, 65535], np.uint16), len(old))
    return np.where(rng.random(len(old)) < density, old + step, old).astype(np.uint16)


def entropy(counts: Array) -> float:
    """Bits of a sequence with these counts of symbols."""
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def independent_bound(old: Array, new: Array) -> float:
    """Bytes of any code that takes all elements alike: where changes are, and their differences."""
    differences = (new - old).view(np.int16)
    moved = differences[differences != 0]
    positions = entropy(np.array([len(moved), len(old) - len(moved)]))
    return (positions + entropy(np.unique(moved, return_counts=True)[1])) / 8


@pytest.mark.parametrize(("lr", "least"), [(0.9e-6, 225), (2.7e-6, 95)])
def test_a_patch_is_smaller_than_codes_that_know_no_magnitudes(lr: float, least: float) -> None:
    old, new = optimizer_step(CHUNK_BYTES // 2, lr)
    chunk = encode_chunk(old.view(np.uint8), new.view(np.uint8), BF16)
    density = np.mean(old != new)
    assert 0.0085 < density < 0.009 if lr < 1e-6 else 0.022 < density < 0.0235
    assert chunk.mode is Mode.SPARSE
    assert old.nbytes / chunk.payload.nbytes > least
    assert independent_bound(old, new) / chunk.payload.nbytes > 1.25


def test_each_mode_is_taken_where_it_is_smallest() -> None:
    rng = np.random.default_rng(0)
    old = bf16(rng.normal(0, 0.02, 20_000))
    noise = rng.integers(0, 65536, 20_000).astype(np.uint16)
    for new, mode, least, most in [
        (old.copy(), Mode.SKIP, 0, 0),
        (flipped(old, 0.01), Mode.SPARSE, 1, 400),
        # a sign for each, and where the few are that stay
        (flipped(old, 0.99), Mode.SPARSE, 1, 3200),
        (old ^ np.uint16(0x4000), Mode.DENSE, 1, 100),  # far for an integer, but the same for all
        (noise, Mode.RAW, 40_000, 40_000),
    ]:
        chunk = encode_chunk(old.view(np.uint8), new.view(np.uint8), BF16)
        assert chunk.mode is mode
        assert least <= chunk.payload.nbytes <= most
        out = np.empty_like(new)
        check_chunk(chunk)
        decode_chunk(chunk, old.view(np.uint8), out.view(np.uint8), BF16)
        assert out.tobytes() == new.tobytes()


def test_tensors_are_coded_in_chunks_and_threads_change_nothing() -> None:
    old, new = optimizer_step(3 * CHUNK_BYTES // 4, 1e-6)
    shard = Shard(dtype="BF16", shape=new.shape, start=0, data=new.view(np.uint8))
    one, three = (
        diff({"w": old.view(np.uint8)}, {"w": shard}, threads=threads)["w"] for threads in (1, 3)
    )
    assert [chunk.count for chunk in one.chunks] == [CHUNK_BYTES // 2, CHUNK_BYTES // 4]
    assert [c.payload.tobytes() for c in one.chunks] == [c.payload.tobytes() for c in three.chunks]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_the_largest_differences_survive(width: int, count: int) -> None:
    """From the smallest signed number to the largest, and all the way round: |difference| itself
    does not fit."""
    kind = np.dtype(f"u{width}")
    old = np.zeros(count, kind)
    for value in (1 << 8 * width - 1, (1 << 8 * width - 1) - 1, (1 << 8 * width) - 1, 1):
        new, out = np.full(count, value, kind), np.empty(count, kind)
        assert decode_changes(encode_changes(old, new), old, out)
        assert out.tobytes() == new.tobytes()


@pytest.mark.parametrize(
    "magnitudes", [(0,), (5,), (0, 5), (3, 5), (3, 4, 5), (0, 1, 2, 3), (1, 2, 3, 4, 5)]
)
@pytest.mark.parametrize("count", [4096, 4100])
def test_equal_magnitudes_make_fewer_classes(magnitudes: tuple[int, ...], count: int) -> None:
    rng = np.random.default_rng(len(magnitudes))
    old = (rng.choice(magnitudes, count) | rng.integers(0, 2, count) << 15).astype(np.uint16)
    new, out = flipped(old, 0.3), np.empty_like(old)
    assert decode_changes(encode_changes(old, new), old, out)
    assert (out == new).all()


@settings(deadline=None, max_examples=300)
@given(
    stream=st.binary(max_size=80) | st.binary(max_size=8).map(lambda some: some * 40),
    count=st.integers(0, 700),
    seed=st.integers(0, 9),
)
def test_any_bytes_are_refused_or_decoded_within_bounds(
    stream: bytes, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    old = bf16(rng.normal(0, 1, count))
    room = np.full(count + 256, 0xABCD, np.uint16)
    accepted = decode_changes(np.frombuffer(stream, np.uint8), old, room[128 : 128 + count])
    assert (room[:128] == 0xABCD).all() and (room[128 + count :] == 0xABCD).all()
    if accepted:  # then it means something: its own encoding says the same
        out = np.empty_like(old)
        assert decode_changes(encode_changes(old, room[128 : 128 + count].copy()), old, out)
        assert (out == room[128 : 128 + count]).all()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_streams_are_refused_or_decoded_within_bounds(data: st.DataObject) -> None:
    old, new = optimizer_step(
        700, data.draw(st.sampled_from([1e-5, 1e-4, 1e-2])), data.draw(st.integers(0, 9))
    )
    stream = encode_changes(old, new)
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    room = np.full(len(old) + 256, 0xABCD, np.uint16)
    decode_changes(stream[: data.draw(st.integers(0, len(stream)))], old, room[128:-128])
    assert (room[:128] == 0xABCD).all() and (room[-128:] == 0xABCD).all()


def test_a_stream_that_is_longer_or_shorter_is_refused() -> None:
    old, new = optimizer_step(700, 1e-3)
    stream, out = encode_changes(old, new), np.empty_like(old)
    assert decode_changes(stream, old, out) and (out == new).all()
    assert not decode_changes(np.append(stream, np.uint8(0)), old, out)
    assert not decode_changes(stream[:-1], old, out)


def bits(text: str) -> Array:
    """A stream from its bits as the specification writes them, the first one first."""
    text = text.replace(" ", "")
    return np.frombuffer(int(text[::-1], 2).to_bytes(-(-len(text) // 8), "little"), np.uint8)


def thresholds(*numbers: int) -> str:
    return " ".join(f"{number:015b}"[::-1] for number in numbers)


def test_strided_elements_are_refused() -> None:
    """Elements are read 64 at a time, side by side."""
    old, new = optimizer_step(700, 1e-3)
    with pytest.raises(AssertionError, match="side by side"):
        encode_changes(old[::2], new[::2])


def test_streams_written_by_hand() -> None:
    old, out = np.array([7, 7, 7, 7], np.uint16), np.empty(4, np.uint16)
    # how many changed: of all, and later of a class
    one, two, three = "100000 1", "010000 01", "010000 11"
    gap_0, nothing_else = "0", "0 000000 000000 10"  # k = 0; not wide, k = 0 twice, a run of one
    plus, minus, one_class = "0", "1", "00"
    good = bits(f"{one} {one_class}  {one} 0 000000 {gap_0}  {nothing_else} {minus}")
    assert decode_changes(good, old, out) and out.tolist() == [6, 7, 7, 7]
    run_of_two, run_of_three = "0 000000 000000 110", "0 000000 000000 1110"
    good = bits(f"{two} {one_class}  {two} 0 000000 {gap_0} 10  {run_of_two} {plus} {minus}")
    assert decode_changes(good, old, out) and out.tolist() == [8, 7, 6, 7]
    unchanged = (
        f"{three} {one_class}  {three} 1 {one} 000000 10  {run_of_three} {plus} {minus} {plus}"
    )
    assert decode_changes(bits(unchanged), old, out) and out.tolist() == [8, 7, 6, 8]

    # the highest bit is the sign, not part of the magnitude
    negative = np.array([9 | 1 << 15, 7, 8, 9], np.uint16)
    nine, eight = "100100000000000", "000100000000000"
    of_nines = f"{one} 0 000000 {gap_0}  {nothing_else} {plus}"
    by_class = f"{one} 10 {nine}  000000 0  {of_nines}"
    assert decode_changes(bits(by_class), negative, out) and out.tolist() == [10 | 1 << 15, 7, 8, 9]
    by_class = f"{one} 01 {eight} {nine}  000000 0 000000 0  {of_nines}"
    assert decode_changes(bits(by_class), negative, out) and out.tolist() == [10 | 1 << 15, 7, 8, 9]
    assert not decode_changes(
        bits(f"{one} 01 {nine} {nine}  000000 0 000000 0  {of_nines}"), negative, out
    )
    assert not decode_changes(bits(f"{one} 10 {nine}  000000 0  {of_nines}"), old, out), (
        "that class is empty"
    )

    # a gap that leads past the largest number to the smallest
    round_the_world = 24 * "1" + " 111111 " + 63 * "1"
    bad = bits(
        f"{two} {one_class}  {two} 0 000000 {gap_0} {round_the_world}  {run_of_two} {plus} {minus}"
    )
    assert not decode_changes(bad, old, out)
    largest = "111111" + 63 * "1"  # sums with it come out negative
    bad = bits(f"{one} {one_class}  {one} 1 {largest} 000000 {gap_0}  {nothing_else} {plus}")
    assert not decode_changes(bad, old, out)
    of_one = f"{one} 0 000000 {gap_0}  {nothing_else} {plus}"
    wrapped = f"{largest} 0 000000 {gap_0} {nothing_else} {plus}"
    bad = (
        f"{two} 11 {thresholds(1, 2, 3)}  {of_one} {wrapped} {wrapped}  {three} 0 000000 {gap_0} "
        f" {nothing_else} {plus}"
    )
    assert not decode_changes(bits(bad), np.arange(4, dtype=np.uint16), out)
    too_far = bits(f"{one} {one_class}  {one} 0 000000 11110  {nothing_else} {plus}")
    assert not decode_changes(too_far, old, out)


def test_a_compressed_payload_of_another_size_is_refused_before_it_is_unpacked() -> None:
    old = np.zeros(4000, np.uint16)
    chunk = encode_chunk(old.view(np.uint8), (old ^ np.uint16(0x4000)).view(np.uint8), BF16)
    assert chunk.mode is Mode.DENSE
    for payload, words in [
        (zstandard.compress(bytes(8001)), "another size than 8000"),
        (chunk.payload.tobytes()[:-3], "cannot be decompressed"),
        (b"no frame", "cannot be decompressed"),
    ]:
        wrong = type(chunk)(
            mode=Mode.DENSE, count=4000, payload=np.frombuffer(payload, np.uint8), crc=0
        )
        with pytest.raises(CorruptPatchError, match=words):
            decode_chunk(wrong, old.view(np.uint8), np.empty(8000, np.uint8), BF16)
