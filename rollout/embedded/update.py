"""One update of a decoder's weights: checks and the search for the places to write, which run while
the old weights decode, and the write, for which decoding pauses.

Whole tensors are verified by digest after they are written. Changes (positions and values) are
verified beforehand by the digest of the tensor that they give; the write requires the expected old
bytes at every position of every copy, and reads the new ones back before a token is decoded with
them. Tensors without a change are verified by digest beforehand.
"""

from __future__ import annotations

from ..weights.changes import check, patched
from ..weights.in_place import Writing
from ..weights.patch import WeightPatch, check_names, digest, verify
from .matrix import Matrix
from .model import Decoder


class Update:
    """A verified update, made while the old weights are served, and written at a token boundary."""

    def __init__(self, decoder: Decoder, patch: WeightPatch, threads: int = 1) -> None:
        """Checks the patch and the held weights, and finds the places to write.

        threads: number of threads that write. Raises ValueError for a tensor that does not fit the
        model; CorruptPatchError as `changes.check` does; DigestMismatchError if the result would
        differ from the learners' weights, or a packed copy differs from the held ones
        (`Decoder.audit`).
        """
        self._decoder = decoder
        self._patch = patch
        self._threads = threads
        for name, tensor in patch.tensors.items():
            decoder.check(name, tensor)
        for name, change in patch.changes.items():
            decoder.check(name, change)
            check(name, change, change.dtype, change.shape)
        check_names(patch, decoder.weights)
        self._find()
        kept = decoder.weights.keys() - patch.tensors.keys() - patch.changes.keys()
        arrived = {name: proved for name, proved in patch.digests.items() if name not in kept}
        if not patch.verified:
            arrived = {name: digest(tensor.data) for name, tensor in patch.tensors.items()} | {
                name: digest(patched(decoder.tensor_bytes(name), change).data)
                for name, change in patch.changes.items()
            }
        verify(arrived | {name: decoder.digest(name) for name in kept}, patch)
        if patch.base_version is not None:  # else all copies are made anew
            decoder.audit(patch.version)

    def _find(self) -> None:
        """Finds every place of the changed elements, and the matrices to pack anew."""
        self._found_at = self._decoder.packings
        self._stale: list[Matrix] = []
        located = []
        for name, change in self._patch.changes.items():
            places, stale = self._decoder.places(name)
            located.append((name, change, places))
            self._stale += [matrix for matrix in stale if matrix not in self._stale]
        self._writing = Writing(located, self._threads)

    def write(self) -> None:
        """Writes the update; nothing may be decoded meanwhile. Raises DigestMismatchError if the
        bytes there are not the expected ones, before or after."""
        if self._decoder.packings != self._found_at:  # copies were made anew meanwhile
            self._find()
        self._writing.write()
        for matrix in self._stale:
            matrix.repack()
        if not self._patch.tensors:
            return
        for name, tensor in self._patch.tensors.items():
            self._decoder.load(name, tensor)
        self._decoder.pack()
        whole = self._patch.tensors.keys()
        verify({name: self._decoder.digest(name) for name in whole}, self._patch.of(whole))
