"""Files of weight patches: inspection of one, and the weights that a chain of them leads to."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...rollout.weights.apply import advance, materialise, tensor_stats
from ...rollout.weights.codec import check_chunk
from ...rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    VersionError,
    WeightPatch,
    Weights,
    digest,
    element_bytes,
)
from ...rollout.weights.tensors import WEIGHTS, read_model, write_model
from ...rollout.weights.transport import list_patches
from ...rollout.weights.wire_format import from_bytes

BROKEN = (CorruptPatchError, DigestMismatchError, VersionError, ValueError, OSError, MemoryError)
"""Errors of a file, or of the order of several; each message names the file or the tensor."""


def examine(file: Path) -> dict[str, Any]:
    """A patch's header and its changes to each tensor, as JSON values. Verifies every checksum, and
    of an anchor also the digests of its weights. Raises one of `BROKEN`."""
    patch = from_bytes(file.read_bytes())
    for name, delta in patch.deltas.items():
        for number, chunk in enumerate(delta.chunks):
            try:
                check_chunk(chunk)
            except CorruptPatchError as error:
                raise CorruptPatchError(f"tensor {name}, chunk {number}: {error}") from error
    if patch.base_version is None:
        materialise(patch, None)
    stats, size = tensor_stats(patch), file.stat().st_size
    num_bytes = sum(each.elements * element_bytes(each.name, each.dtype) for each in stats)
    return {
        "status": "ok",
        "run_id": patch.run_id,
        "version": patch.version,
        "base_version": patch.base_version,
        "root": patch.root,
        "base_root": patch.base_root,
        "file_bytes": size,
        "weight_bytes": num_bytes,
        "ratio": num_bytes / size,
        "changed": sum(each.changed for each in stats),
        "unchanged_tensors": len(patch.digests) - len(stats),
        "tensors": [asdict(each) for each in stats],
    }


def describe(patch: dict[str, Any]) -> Iterator[str]:
    """The result of `examine` as lines of text."""
    anchor = patch["base_version"] is None
    kind = "anchor" if anchor else f"patch on version {patch['base_version']}"
    yield f"{kind} to version {patch['version']} of run {patch['run_id']}"
    yield f"root {patch['root']}" + ("" if anchor else f", of the base {patch['base_root']}")
    yield (
        f"{patch['file_bytes']:,} bytes for {patch['weight_bytes']:,} bytes of weights in"
        f" {len(patch['tensors'])} tensors ({patch['ratio']:.1f}x); {patch['changed']:,} elements"
        f" change; {patch['unchanged_tensors']} tensors stay as they are"
    )
    for row in patch["tensors"]:
        share = row["changed"] / max(1, row["elements"])
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(row["modes"].items()))
        shape = " x ".join(map(str, row["shape"]))
        yield (
            f"  {row['name']}  {row['dtype']} {shape}: {share:.2%} changed, {row['wire_bytes']:,}"
            f" bytes in chunks: {modes}"
        )
    yield "verified: every checksum" + (" and the digest of every tensor" if anchor else "")


def rebuild(
    given: Sequence[Path], out: Path, *, version: int | None = None, model: Path | None = None
) -> Weights:
    """Writes the checkpoint that the files lead to; returns its weights. model: the directory from
    which config and tokenizer are copied. Raises one of `BROKEN`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name a new directory")
    weights = replay(given, version)
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / WEIGHTS, weights.tensors)
    source = model or (given[0] if (given[0] / "config.json").exists() else None)
    for file in [] if source is None else source.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.name != "progress.json":
            shutil.copy(file, out / file.name)
    return weights


def replay(given: Sequence[Path], version: int | None = None) -> Weights:
    """The weights after the last of these patches, or at `version`. The first path may be a model's
    directory; a directory of patches stands for all its files. Raises one of `BROKEN`."""
    base, *others = given
    weights = _model(base) if base.is_dir() and not list_patches(base) else None
    files = list(_expand(others if weights is not None else given))
    patches = [(path, from_bytes(path.read_bytes())) for path in files]
    wanted = [
        (path, patch) for path, patch in patches if version is None or patch.version <= version
    ]
    newest = max(
        (i for i, (_, patch) in enumerate(wanted) if patch.base_version is None), default=0
    )
    for path, patch in wanted[newest:]:
        try:
            weights = _follow(weights, patch)
        except BROKEN as error:
            raise ValueError(f"{path}: {error}") from error
    here = "nothing" if weights is None or weights.version < 0 else f"version {weights.version}"
    if (
        weights is None
        or weights.version < 0
        or (version is not None and weights.version != version)
    ):
        raise ValueError(
            f"the patches lead to {here}"
            + ("" if version is None else f", not to version {version}")
        )
    return weights


def _follow(weights: Weights | None, patch: WeightPatch) -> Weights:
    if patch.base_version is None:
        return advance(None, materialise(patch, None))
    # a model's files have no version: it is taken for the patch's base, which the digests verify
    if weights is not None and weights.version < 0:
        weights = Weights(
            run_id=patch.run_id,
            version=patch.base_version,
            tensors=weights.tensors,
            digests=weights.digests,
        )
    return advance(weights, materialise(patch, weights))


def _model(folder: Path) -> Weights:
    tensors = read_model(folder)
    digests = {name: digest(tensor.data) for name, tensor in tensors.items()}
    return Weights(run_id="", version=-1, tensors=tensors, digests=digests)


def _expand(given: Iterable[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from list_patches(path)
        else:
            yield path


__all__ = ["BROKEN", "describe", "examine", "rebuild", "replay"]
