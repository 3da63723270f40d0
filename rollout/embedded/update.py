"""One update of a decoder's weights: all that can be checked and found while the old ones decode,
and the writing, for which decoding stands still.

What came whole is proved by digest once it lies there. What came as positions and values was proved
by the digest of the tensor that it gives when it was found; here it is written only where what it
was made for lies, bit for bit, in each copy of the tensor, and read back before a token is decoded
with it. What does not change is proved by digest beforehand.
"""

from __future__ import annotations

from ..weights.changes import check, patched
from ..weights.in_place import Writing
from ..weights.patch import WeightPatch, check_names, digest, verify
from .matrix import Matrix
from .model import Decoder


class Update:
    """Made beside what is served; written at a token boundary."""

    def __init__(self, decoder: Decoder, patch: WeightPatch, threads: int = 1) -> None:
        """Finds all that can be wrong with what came, and with what is held, and where to write.

        threads: that write. ValueError: what is not of this model. CorruptPatchError:
        `changes.check`. DigestMismatchError: it would not give what the learners hold, or what is
        multiplied is not what is held (`Decoder.audit`).
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
        arrived = {name: found for name, found in patch.digests.items() if name not in kept}
        if not patch.verified:
            arrived = {name: digest(tensor.data) for name, tensor in patch.tensors.items()} | {
                name: digest(patched(decoder.tensor_bytes(name), change).data)
                for name, change in patch.changes.items()
            }
        verify(arrived | {name: decoder.digest(name) for name in kept}, patch)
        if patch.base_version is not None:  # else all copies are made anew
            decoder.audit(patch.version)

    def _find(self) -> None:
        """Where to write."""
        self._found_at = self._decoder.packings
        self._stale: list[Matrix] = []
        found = []
        for name, change in self._patch.changes.items():
            places, stale = self._decoder.places(name)
            found.append((name, change, places))
            self._stale += [matrix for matrix in stale if matrix not in self._stale]
        self._writing = Writing(found, self._threads)

    def write(self) -> None:
        """Nothing may be decoded meanwhile. DigestMismatchError: what lies there is not what it has
        to be, before or after."""
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
