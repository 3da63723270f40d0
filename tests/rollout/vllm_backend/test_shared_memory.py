"""The mirror: what is refused before a byte changes, and what another process reads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from emberl.rollout.vllm_backend.shared_memory import ALIGNMENT, Mirror, read_mirror
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    DigestMismatchError,
    TensorBytes,
    WeightPatch,
    dense_patch,
    digest,
)


def floats(*values: float) -> TensorBytes:
    return TensorBytes(
        dtype="F32", shape=(len(values),), data=np.array(values, np.float32).view(np.uint8)
    )


WEIGHTS = {"a": floats(1, 2, 3), "b": floats(4), "c": floats(5, 6)}


def filled() -> Mirror:
    mirror = Mirror("F32")
    mirror.write(WEIGHTS)
    return mirror


def values(mirror: Mirror) -> dict[str, list[float]]:
    return {
        n: t.data.view(np.float32).tolist()
        for n, t in read_mirror(mirror.path, list(mirror.entries.items()))
    }


def partial(version: int = 2, **tensors: TensorBytes) -> WeightPatch:
    """A patch of some tensors on WEIGHTS, with the digests of all."""
    whole = dense_patch("run", version, (WEIGHTS | tensors).items())
    return replace(whole, tensors=tensors, base_version=version - 1)


def test_a_patch_of_some_tensors_leaves_the_others() -> None:
    mirror = filled()
    patch = partial(b=floats(-4))
    mirror.check(patch)
    mirror.write(patch.tensors)
    assert values(mirror) == {"a": [1, 2, 3], "b": [-4], "c": [5, 6]}
    assert mirror.digests() == patch.digests
    assert {name: entry.start % ALIGNMENT for name, entry in mirror.entries.items()} == {
        "a": 0,
        "b": 0,
        "c": 0,
    }
    assert mirror.num_bytes == 24


BAD: list[tuple[WeightPatch, type[Exception], str]] = [
    (partial(d=floats(1)), ValueError, "d is not a tensor of this model"),
    (partial(a=floats(1, 2)), ValueError, r"a: got F32 \(2,\), the engine serves F32 \(3,\)"),
    (
        partial(b=replace(floats(1), dtype="BF16")),
        ValueError,
        r"b: got BF16 \(1,\), the engine serves F32 \(1,\)",
    ),
    (partial(b=replace(floats(1, 2), shape=(1,))), ValueError, "b: F32 .* is 4 bytes, got 8"),
    (
        replace(partial(b=floats(1)), tensors={"b": floats(2)}),
        DigestMismatchError,
        "tensor b of version 2",
    ),
    (
        replace(
            dense_patch("run", 2, {"a": floats(1, 2, 3), "b": floats(4)}.items()), verified=True
        ),
        DigestMismatchError,
        "tensor c of version 2: the engine holds a tensor, the learners hold nothing",
    ),
    (
        replace(partial(b=floats(1)), changes={"b": between(floats(4), floats(1))}),
        ValueError,
        "b comes twice in patch 2",
    ),
    (
        replace(partial(b=floats(1), c=floats(7, 8)), tensors={"b": floats(1)}),
        DigestMismatchError,
        "tensor c",
    ),
]


@pytest.mark.parametrize(("patch", "error", "words"), BAD)
def test_what_is_wrong_is_found_before_anything_changes(
    patch: WeightPatch, error: type[Exception], words: str
) -> None:
    mirror = filled()
    before = mirror.digests()
    with pytest.raises(error, match=words):
        mirror.check(patch)
    assert mirror.digests() == before


def test_the_first_patch_must_be_of_the_dtype_that_is_served_too() -> None:
    with pytest.raises(ValueError, match=r"got F32 .* the engine serves BF16"):
        Mirror("BF16").check(dense_patch("run", 0, WEIGHTS.items()))


def test_another_process_reads_it_and_nothing_is_left_of_it() -> None:
    mirror = filled()
    code = (
        "import sys, json\n"
        "from emberl.rollout.vllm_backend.shared_memory import Entry, read_mirror\n"
        "from emberl.rollout.weights.patch import digest\n"
        "entries = [(n, Entry(d, tuple(s), a, b)) for n, d, s, a, b in json.loads(sys.argv[2])]\n"
        "print(*(f'{n}={digest(t.data)}' for n, t in read_mirror(sys.argv[1], entries)))"
    )
    import json

    entries = json.dumps([[name, *entry] for name, entry in mirror.entries.items()])
    command = [sys.executable, "-c", code, mirror.path, entries]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed.split() == [f"{name}={digest(tensor.data)}" for name, tensor in WEIGHTS.items()]
    path = mirror.path
    mirror.close()
    mirror.close()
    with pytest.raises(OSError):
        open(path, "rb").close()


def test_what_was_read_shares_nothing_with_the_mirror() -> None:
    mirror = filled()
    read = dict(read_mirror(mirror.path, list(mirror.entries.items())))
    mirror.write({"b": floats(9)})
    assert read["b"].data.view(np.float32).tolist() == [4]
