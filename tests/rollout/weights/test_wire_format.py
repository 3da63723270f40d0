"""The bytes of a weight patch: read by a decoder written from the specification alone, fixed by
hand, and broken at will."""

from __future__ import annotations

import inspect
import math
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from emberl.rollout.weights.apply import advance, materialise
from emberl.rollout.weights.diff import Shard, diff, encode, join
from emberl.rollout.weights.patch import (
    ELEMENT_BYTES,
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    Weights,
    dense_patch,
)
from emberl.rollout.weights.wire_format import from_bytes, to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

Whole = dict[str, tuple[int, tuple[int, ...], bytes]]
"""name -> (dtype's number in the format, shape, bytes)."""


# An independent decoder: what the docstring of `emberl.rollout.weights.wire_format` says, and
# nothing of the codec.

WIDTHS = (2, 2, 4, 8, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8)


class Stream:
    """The bits of a sparse chunk."""

    def __init__(self, payload: bytes) -> None:
        self.bits = int.from_bytes(payload, "little")

    def field(self, size: int) -> int:
        value, self.bits = self.bits & (1 << size) - 1, self.bits >> size
        return value

    def number(self) -> int:
        return self.field(self.field(6))

    def numbers(self, k: int) -> Iterator[int]:
        m = 32 << k
        while True:
            q = next((q for q in range(24) if not self.field(1)), 24)
            v = (q << k) + self.field(k) if q < 24 else self.number()
            yield v
            m += min(v, 24 << k) - m // 32
            while k < 38 and m // 32 >> k > 1:
                k += 1
            while k > 0 and m // 32 >> k == 0:
                k -= 1

    def apply(self, old: list[int], width: int) -> list[int]:
        new, changes, modulus = list(old), self.number(), 256**width
        thresholds = [self.field(8 * width - 1) for _ in range(self.field(2))]
        assert thresholds == sorted(set(thresholds))
        for number in range(len(thresholds) + 1):
            members = [
                i
                for i, x in enumerate(old)
                if sum(x % (modulus // 2) >= t for t in thresholds) == number
            ]
            marked, unchanged, at, marks = self.number(), self.field(1), -1, set[int]()
            changes -= marked
            if unchanged:
                marked = self.number()
            gaps = self.numbers(self.field(6) if marked else 0)
            for _ in range(marked):
                at += 1 + next(gaps)
                marks.add(members[at])
            touched = [i for i in members if (i in marks) != bool(unchanged)]
            if touched:
                wide, runs, excesses = (
                    self.field(1),
                    self.numbers(self.field(6)),
                    self.numbers(self.field(6)),
                )
                run = 0 if wide else next(runs)
            for i in touched:
                sign, d, run = -1 if self.field(1) else 1, 1, run - 1
                if wide or run < 0:
                    d, run = next(excesses) + 2 - wide, 0 if wide else next(runs)
                new[i] = (old[i] + sign * d) % modulus
        assert changes == 0 and self.bits == 0
        return new


def independent(data: bytes, held: Whole) -> Whole:
    """name -> (dtype's number, shape, bytes) of all tensors after applying a patch to `held`."""
    magic, version, _, _, base, root, _, size, _, body, _, crc = struct.unpack(
        "<4sHHqq16s16sIIQII", data[:80]
    )
    assert (magic, version, len(data)) == (b"EMWP", 2, 80 + size + body)
    assert zlib.crc32(data[:76] + data[80 : 80 + size]) == crc
    at, name = 80, b""

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    def varint() -> int:
        byte = take(1)[0]
        return byte if byte < 128 else byte - 128 + 128 * varint()

    take(varint())
    entries = []
    for _ in range(varint()):
        first, last = varint(), varint()
        name = name[:first] + take(varint()) + name[len(name) - last :]
        dtype, shape, chunks = take(1)[0], (), []
        if dtype != 255:
            shape = tuple(varint() for _ in range(varint()))
            chunks = [(varint(), varint(), varint()) for _ in range(varint())]
        entries.append((name.decode(), dtype, shape, chunks))
    digests = [take(16).hex() for _ in entries]
    lines = "\n".join(
        f"{entry[0]} {digest}" for entry, digest in zip(entries, digests, strict=True)
    )
    assert xxhash.xxh3_128_digest(lines.encode()) == root
    crcs = [struct.unpack("<I", take(4))[0] for entry in entries for _ in entry[3]][::-1]
    found = Whole()
    for (key, dtype, shape, chunks), digest in zip(entries, digests, strict=True):
        new, width = (held[key][2], 1) if dtype == 255 else (b"", WIDTHS[dtype])
        for mode, count, length in chunks:
            old = (
                bytes(count * width)
                if base < 0
                else held[key][2][len(new) : len(new) + count * width]
            )
            payload = take(length)
            assert zlib.crc32(payload) == crcs.pop()
            if mode == 1:
                numbers = [
                    int.from_bytes(old[i : i + width], "little") for i in range(0, len(old), width)
                ]
                changed = Stream(payload).apply(numbers, width)
                payload = b"".join(x.to_bytes(width, "little") for x in changed)
            elif mode == 2:
                planes = zstandard.ZstdDecompressor().decompress(payload)
                payload = bytes(
                    x ^ planes[i % width * count + i // width] for i, x in enumerate(old)
                )
            new += payload if mode else old
        found[key] = held[key] if dtype == 255 else (dtype, shape, new)
        assert xxhash.xxh3_128_hexdigest(new) == digest
    return found


# What is tested with it.

Arrays = dict[str, TensorBytes]


@st.composite
def changes(draw: st.DrawFn) -> tuple[Arrays, Arrays]:
    """Tensors before and after: every dtype, shapes down to 0-d and empty, every bit pattern, all
    densities."""
    names = draw(st.lists(st.text(max_size=12), max_size=4, unique=True))
    pairs = {name: draw(tensor_change()) for name in names}
    return {name: old for name, (old, _) in pairs.items()}, {
        name: new for name, (_, new) in pairs.items()
    }


@st.composite
def tensor_change(draw: st.DrawFn) -> tuple[TensorBytes, TensorBytes]:
    dtype = draw(st.sampled_from(sorted(ELEMENT_BYTES)))
    width = ELEMENT_BYTES[dtype]
    few = st.lists(st.integers(0, 40), max_size=3).filter(lambda dims: math.prod(dims) <= 700)
    shape = tuple(draw(few | st.lists(st.integers(100, 700), min_size=1, max_size=1)))
    size = math.prod(shape) * width
    if size <= 16:  # small enough to search every pattern
        old, new = (
            np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8) for _ in range(2)
        )
    else:
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        bits = draw(st.sampled_from(["random", "weights", "special"]))
        old = patterns(rng, bits, size // width, width)
        kind = draw(st.sampled_from(["one", "few", "random", "constant", "sign"]))
        new = changed(rng, old, width, kind, draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])))
    return (
        TensorBytes(dtype=dtype, shape=shape, data=old.view(np.uint8)),
        TensorBytes(dtype=dtype, shape=shape, data=new.view(np.uint8)),
    )


def patterns(rng: np.random.Generator, bits: str, count: int, width: int) -> np.ndarray[Any, Any]:
    """[count] unsigned integers: any, those of normal weights, or zeros, negative zeros, denormals,
    infinities and NaNs."""
    if bits == "weights" and width in (2, 4, 8):
        values = rng.normal(0, 0.02, count)
        return {
            2: (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
            4: values.astype(np.float32).view(np.uint32),
            8: values.view(np.uint64),
        }[width]
    any_bits = rng.integers(0, 256, count * width, dtype=np.uint8).view(f"u{width}")
    if bits == "special":
        top = 8 * width - 1
        specials = [
            0,
            1 << top,
            1,
            (1 << top) + 1,
            (1 << top) - 1,
            (1 << 8 * width) - 1,
            0x7F80 % 256**width,
        ]
        return np.where(
            rng.random(count) < 0.9,
            np.array(specials, f"u{width}")[rng.integers(0, 7, count)],
            any_bits,
        )
    return any_bits


def changed(
    rng: np.random.Generator, old: np.ndarray[Any, Any], width: int, kind: str, density: float
) -> np.ndarray[Any, Any]:
    count = len(old)
    any_bits = rng.integers(0, 256, count * width, dtype=np.uint8).view(f"u{width}")
    sign = rng.choice(np.array([1, 256**width - 1], f"u{width}"), count)
    new = {
        "one": old + sign,
        "few": old + sign * rng.geometric(0.3, count).astype(f"u{width}"),
        "random": any_bits,
        "constant": old ^ any_bits[:1],
        "sign": old ^ np.array(1 << 8 * width - 1, f"u{width}"),
    }[kind]
    return np.where(rng.random(count) < density, new, old).astype(f"u{width}")


def weights(tensors: Arrays, version: int = 3) -> Weights:
    return advance(None, materialise(dense_patch("run", version, tensors.items()), None))


def plain(tensors: Mapping[str, TensorBytes]) -> Whole:
    return {
        name: (list(ELEMENT_BYTES).index(t.dtype), tuple(t.shape), t.data.tobytes())
        for name, t in tensors.items()
    }


@settings(deadline=None, max_examples=150)
@given(pair=changes())
def test_both_decoders_agree(pair: tuple[Arrays, Arrays]) -> None:
    old, new = pair
    held = weights(old)
    for patch in (
        encode(held, new, run_id="run", version=4),
        encode(None, new, run_id="run", version=4),
        dense_patch("run", 4, new.items()),
    ):
        data = to_bytes(patch)
        assert independent(data, plain(old)) == plain(new)
        after = advance(held, materialise(from_bytes(data), held))
        assert plain(after.tensors) == plain(new) and after.version == 4
        dense = sum(tensor.data.nbytes for tensor in new.values())
        room = (
            128 + len("run") + sum(48 + len(n.encode()) + 6 * len(t.shape) for n, t in new.items())
        )
        assert len(data) <= 1.002 * dense + room


def test_the_independent_decoder_is_short() -> None:
    assert sum(len(inspect.getsource(part).splitlines()) for part in (Stream, independent)) <= 120


@settings(deadline=None, max_examples=60)
@given(pair=tensor_change(), cuts=st.lists(st.integers(0, 700), max_size=4), order=st.randoms())
def test_parts_of_several_ranks_make_one_patch(
    pair: tuple[TensorBytes, TensorBytes], cuts: list[int], order: Any
) -> None:
    old, new = pair
    width, count = ELEMENT_BYTES[new.dtype], math.prod(new.shape)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = []
    for start, stop in pairwise(edges):
        part = slice(start * width, stop * width)
        shard = Shard(dtype=new.dtype, shape=new.shape, start=start, data=new.data[part])
        parts.append(diff({"w": old.data[part]}, {"w": shard}))
    order.shuffle(parts)
    held = weights({"w": old})
    data = to_bytes(join(parts, held, run_id="run", version=4))
    assert independent(data, plain({"w": old})) == plain({"w": new})
    assert plain(advance(held, materialise(from_bytes(data), held)).tensors) == plain({"w": new})


def test_a_patch_written_by_hand() -> None:
    """One bfloat16 tensor of four ones, of which the second becomes the next larger number. Its
    stream, bit by bit:

    number of changes 1: 100000 1; thresholds: 00, of which a 0                -> 10000010 = 41
    .. the other 0; changed in the one class 1: 100000 1                      -> 01000001 = 82
    those are marked: 0; k of the gaps, floor(log2(3 / 1)) = 1: 100000; a gap
    of 1 = 0 * 2 + 1: 01, of which a 0                                        -> 01000000 = 02
    .. the other 1; wide: 0; k of the runs: 000000                            -> 10000000 = 01
    k of the excesses: 000000; a run of 1: 10                                 -> 00000010 = 40
    negative: 0                                                               -> 00000000 = 00
    """
    one, next_to_one = b"\x80\x3f", b"\x81\x3f"
    old, new = one * 4, one + next_to_one + one * 2
    held = weights({"w": TensorBytes(dtype="BF16", shape=(4,), data=np.frombuffer(old, np.uint8))})
    after = {"w": TensorBytes(dtype="BF16", shape=(4,), data=np.frombuffer(new, np.uint8))}
    root = {
        data: xxhash.xxh3_128_digest(f"w {xxhash.xxh3_128_hexdigest(data)}".encode())
        for data in (old, new)
    }
    stream = bytes.fromhex("41 82 02 01 40 00")
    directory = (
        bytes.fromhex("03 72 75 6e  01  00 00 01 77  00  01 04  01  01 04 06")
        + xxhash.xxh3_128_digest(new)
        + zlib.crc32(stream).to_bytes(4, "little")
    )
    header = (
        bytes.fromhex("45 4d 57 50  02 00 00 00  04 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00")
        + root[new]
        + root[old]
        + bytes.fromhex("24 00 00 00  00 00 00 00  06 00 00 00 00 00 00 00  00 00 00 00")
    )
    crc = zlib.crc32(header + directory).to_bytes(4, "little")
    assert (
        to_bytes(encode(held, after, run_id="run", version=4)) == header + crc + directory + stream
    )


def golden() -> tuple[Arrays, Arrays]:
    """Fixed tensors: one with enough changes for classes, one with a few wide ones, one that stays,
    an empty one, and one whose bytes are best sent raw. (None that zstd would code: its bytes
    depend on its version.)"""
    i = np.arange(1500, dtype=np.uint32)
    mixed = i * np.uint32(2654435761) >> 12 & 0xFFFF
    sizes = (15360 + (mixed & 0x83FF)).astype(np.uint16)
    steps = np.where(mixed % 3 == 0, np.where(mixed % 2, 1, -1), 0) + np.where(
        mixed % 67 == 0, 5, 0
    )
    old = {
        "layers.0.up.weight": sizes,
        "layers.1.up.weight": sizes[::-1],
        "norm": sizes[:40].astype(np.uint32),
    }
    new = {
        "layers.0.up.weight": (sizes + steps).astype(np.uint16),
        "layers.1.up.weight": sizes[::-1],
        "norm": old["norm"] + np.where(np.arange(40) % 13 == 5, 70000, 0).astype(np.uint32),
    }
    old |= {"empty": sizes[:0], "raw": (mixed[:9] >> 3).astype(np.uint8)}
    new |= {"empty": sizes[:0], "raw": (mixed[50:59] >> 5).astype(np.uint8)}
    dtypes = {1: "U8", 2: "BF16", 4: "F32"}
    before, after = (
        {
            name: TensorBytes(
                dtype=dtypes[a.itemsize], shape=a.shape, data=np.ascontiguousarray(a).view(np.uint8)
            )
            for name, a in side.items()
        }
        for side in (old, new)
    )
    return before, after


def test_the_format_stays_what_it_is() -> None:
    """A new format needs a new number, and a golden digest of its own."""
    old, new = golden()
    data = to_bytes(encode(weights(old), new, run_id="run", version=4))
    assert {
        chunk.mode.name for delta in from_bytes(data).deltas.values() for chunk in delta.chunks
    } == {"SPARSE", "RAW"}
    assert independent(data, plain(old)) == plain(new)
    assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (573, "831ede44150a9293a898a8f3828aa91b")


def broken(data: bytes, held: Weights) -> str:
    """Why these bytes are refused."""
    with pytest.raises((CorruptPatchError, DigestMismatchError)) as refusal:
        materialise(from_bytes(data), held)
    assert refusal.type is CorruptPatchError
    return str(refusal.value)


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    old, new = golden()
    held = weights(old)
    patch = encode(held, new, run_id="run", version=4)
    data = to_bytes(patch)
    body = len(data) - sum(delta.num_bytes for delta in patch.deltas.values())
    owners = [
        f"tensor {name}, chunk {i}"
        for name in sorted(patch.deltas)
        for i, chunk in enumerate(patch.deltas[name].chunks)
        for _ in range(chunk.payload.nbytes)
    ]
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        said = broken(bytes(flipped), held)
        assert said.startswith(owners[at - body]) if at >= body else "weight patch" in said
        if at % 7 == 0 or at > len(data) - 40:
            assert "weight patch" in broken(data[:at], held)
    assert "bytes instead of" in broken(data + b"\0", held)
    assert plain(held.tensors) == plain(old)
    assert plain(advance(held, materialise(from_bytes(data), held)).tensors) == plain(new)


@settings(deadline=None, max_examples=60)
@given(pair=changes(), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_wrong_weights(
    pair: tuple[Arrays, Arrays], at: float, bit: int
) -> None:
    old, new = pair
    held = weights(old)
    data = bytearray(to_bytes(encode(held, new, run_id="run", version=4)))
    data[int(at * len(data))] ^= 1 << bit
    broken(bytes(data), held)


def attempt(data: bytes, held: Weights) -> Weights | str:
    """The weights, or why there are none."""
    try:
        return advance(held, materialise(from_bytes(data), held))
    except (CorruptPatchError, DigestMismatchError) as refusal:
        return str(refusal)


@settings(deadline=None, max_examples=80)
@given(pair=changes(), seed=st.integers(0, 2**32))
def test_payloads_that_lie_with_the_right_crc_are_refused(
    pair: tuple[Arrays, Arrays], seed: int
) -> None:
    """What no CRC finds, the digest does; and a stream that makes no sense reads and writes nothing
    beyond its arrays."""
    old, new = pair
    held, rng = weights(old), np.random.default_rng(seed)
    patch = encode(held, new, run_id="run", version=4)
    for name, delta in patch.deltas.items():
        for i, chunk in enumerate(delta.chunks):
            if not chunk.payload.nbytes:
                continue
            lie = chunk.payload.copy()
            where = rng.integers(len(lie), size=rng.integers(1, 4))
            lie[where] ^= rng.integers(1, 256, len(where), dtype=np.uint8)
            if rng.random() < 0.3:
                lie = lie[: rng.integers(len(lie) + 1)]
            if lie.tobytes() == chunk.payload.tobytes():
                continue
            chunks = [
                *delta.chunks[:i],
                replace(chunk, payload=lie, crc=zlib.crc32(lie)),
                *delta.chunks[i + 1 :],
            ]
            lying = replace(
                patch, deltas={**patch.deltas, name: replace(delta, chunks=tuple(chunks))}
            )
            outcome = attempt(to_bytes(lying), held)
            if isinstance(outcome, str):
                assert f"tensor {name}" in outcome
            else:  # another stream of the same meaning: parameters that nothing uses, say
                assert plain(outcome.tensors) == plain(new)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (0, b"PK", "not a weight patch"),
        (4, b"\1", "format 1; this emberl reads format 2"),
        (8, b"\5", "damaged"),
        (24, b"\0\1", "damaged"),
        (56, b"\0", "damaged"),
    ],
)
def test_a_damaged_header_is_named(field: int, value: bytes, words: str) -> None:
    old, new = golden()
    held = weights(old)
    data = bytearray(to_bytes(encode(held, new, run_id="run", version=4)))
    data[field : field + len(value)] = value
    assert words in broken(bytes(data), held)


def test_a_directory_that_was_written_wrongly_is_refused() -> None:
    old, new = golden()
    held = weights(old)
    patch = encode(held, new, run_id="run", version=4)
    name = "layers.0.up.weight"
    delta = patch.deltas[name]
    short = replace(delta, chunks=(replace(delta.chunks[0], count=1499),))
    other = replace(patch, digests={**patch.digests, name: "0" * 32})
    assert f"chunks of {name}" in broken(
        to_bytes(replace(patch, deltas={**patch.deltas, name: short})), held
    )
    with pytest.raises(DigestMismatchError, match=rf"{name} of version 4"):
        materialise(from_bytes(to_bytes(other)), held)
    data = bytearray(to_bytes(patch))
    size = int.from_bytes(data[56:60], "little")
    data[24] ^= 1
    data[76:80] = zlib.crc32(data[:76] + data[80 : 80 + size]).to_bytes(4, "little")
    assert "do not have the root" in broken(bytes(data), held)
    with pytest.raises(ValueError, match="without a digest: strange"):
        to_bytes(replace(patch, deltas={**patch.deltas, "strange": delta}))


# Files whose checksums are right and whose author means no good.


def number(value: int) -> bytes:
    out = bytearray()
    while value >> 7:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def hostile(directory: bytes, names: list[str], digest: bytes = bytes(16)) -> bytes:
    lines = "\n".join(f"{name} {digest.hex()}" for name in names)
    root = xxhash.xxh3_128_digest(lines.encode())
    head = struct.pack(
        "<4sHHqq16s16sIIQI", b"EMWP", 2, 0, 1, -1, root, bytes(16), len(directory), 0, 0, 0
    )
    return head + struct.pack("<I", zlib.crc32(head + directory)) + directory


def skips(elements: int, at_once: int) -> bytes:
    """One float64 tensor of chunks that say nothing changes."""
    count = elements // at_once
    chunks = b"".join(b"\0" + number(at_once) + number(0) for _ in range(count))
    head = number(1) + b"r" + number(1) + number(0) + number(0) + number(1) + b"w"
    shape = bytes([WIDTHS.index(8)]) + number(1) + number(elements)
    return head + shape + number(count) + chunks + bytes(16) + bytes(4 * count)


def prefixes(count: int) -> tuple[bytes, list[str]]:
    """Names that each repeat the one before it."""
    names = ["a" * (i + 1) for i in range(count)]
    entries = b"".join(number(i) + number(0) + number(1) + b"a\xff" for i in range(count))
    return number(1) + b"r" + number(count) + entries + bytes(16 * count), names


def long_name(size: int) -> tuple[bytes, list[str]]:
    entry = number(0) + number(0) + number(size) + b"a" * size + b"\xff"
    return number(1) + b"r" + number(1) + entry + bytes(16), ["a" * size]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (hostile(skips(1 << 30, 1 << 30), ["w"]), "a chunk of w has more than"),
        (hostile(skips(1 << 40, 1 << 40), ["w"]), "a chunk of w has more than"),
        (hostile(skips(1 << 32, 1 << 17), ["w"]), "would make 34359738368 bytes of weights of 0"),
        (hostile(*prefixes(3000)), "names are longer than"),
        (hostile(*long_name(5000)), "is longer than 4096 bytes"),
        (hostile(number(1) + b"r" + b"\xff" * 300_000 + b"\1", []), "more than ten bytes"),
    ],
)
def test_what_a_hostile_file_costs_is_bounded(file: bytes, reason: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(CorruptPatchError, match=reason):
            materialise(from_bytes(file), None)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(file) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5
