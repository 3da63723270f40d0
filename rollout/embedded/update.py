"""One update of a decoder's weights: all that can be checked while the old ones decode, and the
writing, for which decoding stands still.

What came whole is proved by digest once it lies there. What came as positions and values was proved
by the digest of the tensor that it gives when it was found; here it is written only where what it
was made for lies, bit for bit, in each copy of the tensor, and read back. What does not change is
proved by digest beforehand.
"""

from __future__ import annotations

from dataclasses import replace

from ..weights.changes import check, patched
from ..weights.in_place import Place, write_all
from ..weights.patch import TensorChange, WeightPatch, digest, verify
from .matrix import Matrix
from .model import Decoder


class Update:
    """Made beside what is served; written at a token boundary."""

    def __init__(self, decoder: Decoder, patch: WeightPatch) -> None:
        """Finds all that can be wrong with what came, and with what is held, and where to write.

        ValueError: what is not of this model. CorruptPatchError: `changes.check`.
        DigestMismatchError: it would not give what the learners hold.
        """
        self._decoder = decoder
        self._patch = patch
        for name, tensor in patch.tensors.items():
            decoder.check(name, tensor)
        for name, change in patch.changes.items():
            decoder.check(name, change)
            check(name, change, change.dtype, change.shape)
        self._find()
        for _, _, places in self._changes[:1]:
            places[0].warm_up()
        kept = decoder.weights.keys() - patch.tensors.keys() - patch.changes.keys()
        arrived = {name: found for name, found in patch.digests.items() if name not in kept}
        if not patch.verified:
            arrived = {name: digest(tensor.data) for name, tensor in patch.tensors.items()} | {
                name: digest(patched(decoder.tensor_bytes(name), change).data)
                for name, change in patch.changes.items()
            }
        verify(arrived | {name: decoder.digest(name) for name in kept}, patch)

    def _find(self) -> None:
        """Where to write."""
        self._found_at = self._decoder.packings
        self._changes: list[tuple[str, TensorChange, list[Place]]] = []
        self._stale: list[Matrix] = []
        for name, change in self._patch.changes.items():
            places, stale = self._decoder.places(name)
            self._changes.append((name, change, places))
            self._stale += [matrix for matrix in stale if matrix not in self._stale]

    def write(self) -> None:
        """Nothing may be decoded meanwhile. DigestMismatchError: what lies there is not what it has
        to be."""
        if self._decoder.packings != self._found_at:  # copies were made anew meanwhile
            self._find()
        write_all(self._changes)
        for matrix in self._stale:
            matrix.repack()
        for name, tensor in self._patch.tensors.items():
            self._decoder.load(name, tensor)
        self._decoder.pack()
        whole = {name: self._patch.digests[name] for name in self._patch.tensors}
        digests = {name: self._decoder.digest(name) for name in whole}
        verify(digests, replace(self._patch, digests=whole))
