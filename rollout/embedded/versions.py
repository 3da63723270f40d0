"""The version that an embedded engine serves, the check of the next one, and the change to it."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

from ..weights.canary import Canary, altered, written_in_place
from ..weights.changes import piecewise
from ..weights.in_place import Writing
from ..weights.patch import (
    DigestMismatchError,
    MovedError,
    RefusedError,
    VersionError,
    Views,
    WeightPatch,
    Weights,
    check_base,
    dense_patch,
    is_next,
    verify,
)
from .continuous_batch import ContinuousBatch
from .update import Update


class ServedVersion:
    """The served version of one engine. Methods that change it run between two steps of the
    batch."""

    def __init__(self, batch: ContinuousBatch, run_id: str, threads: int) -> None:
        """threads: number of threads that write updates."""
        self._batch = batch
        self._decoder = batch.decoder
        self._threads = threads
        self.run_id = run_id
        self.corrupt: str | None = None
        """The reason why nothing is served; None while weights are."""
        self.pause_s = 0.0
        """Seconds for which the last update paused decoding."""
        self._held: Weights | None = None
        self._canary: Canary | None = None
        self._places = self._where()

    @property
    def version(self) -> int:
        return self._batch.version

    @property
    def held(self) -> Weights | None:
        """`Engine.held`; None while a canary is loaded."""
        return None if self._canary is not None else self._held

    def check_serving(self) -> None:
        if self.corrupt is not None:
            raise DigestMismatchError(f"the embedded engine serves nothing: {self.corrupt}")

    def check(self, patch: WeightPatch) -> Update | None:
        """The verified update, made while decoding goes on; None if its version is served already.
        An error leaves everything as it was."""
        if not self._is_new(patch):
            return None
        check_base(patch, None if self._held is None else self._held.root)
        self._check_in_place(patch.version)
        return Update(self._decoder, patch, self._threads)

    def apply(self, patch: WeightPatch, update: Update | None) -> None:
        """Writes the update, for which decoding waits."""
        if update is None or not self._is_new(patch):
            verify(self._decoder.digests(), patch)
            return
        self._check_in_place(patch.version)
        start = time.perf_counter()
        held = self._held
        self._held = None
        try:
            update.write()
        except BaseException as error:  # not before: what is asked meanwhile waits for the update
            if isinstance(error, RefusedError) and held is not None and self._is_intact(held):
                self._held = held  # nothing was written: it is the patch that is wrong
            else:
                self.corrupt = f"the update to version {patch.version} did not complete"
            raise
        self.corrupt = None
        self.run_id = patch.run_id
        self._batch.weights_changed(patch.version)
        self._held = Weights(
            run_id=patch.run_id,
            version=patch.version,
            tensors=Views(self._decoder.weights, self._decoder.tensor_bytes),
            digests=patch.digests,
        )
        self.pause_s = time.perf_counter() - start

    def _is_intact(self, held: Weights) -> bool:
        """Whether the held weights and their packed copies are still the verified ones."""
        copies = all(matrix.intact() for matrix in self._decoder.matrices)
        return copies and self._decoder.digests() == held.digests

    def load_canary(self, canary: Canary | None) -> None:
        """`Engine.canary`. To load one, some tensors are written in place and the others whole; to
        take it back, all are written whole. A write of either kind that did not reach the weights
        that decode would show."""
        change, held = canary or self._canary, self._held
        if change is None:
            return
        assert held is not None, "there is a canary of what was proved only"
        assert self._batch.idle, "a canary is decoded by itself"
        back = canary is None
        self._check_in_place(self.version)
        try:
            # also compares packed copies with the weights, if that was not done yet
            written = [] if back else self._written_in_place(change)
            for name in self._decoder.weights.keys() - set(written):
                before = self._decoder.tensor_bytes(name)
                self._decoder.load(name, altered(name, before, change, back=back))
            self._decoder.pack()
            for name in written:  # last: to pack anew would hide where they did not arrive
                self._write_canary(name, change)
            self._batch.weights_changed(self.version)
            if back:
                patch = dense_patch(held.run_id, held.version, {}.items())
                verify(self._decoder.digests(), replace(patch, digests=held.digests))
        except BaseException:
            self.corrupt = f"version {self.version} could not be taken back after a canary"
            raise
        self._canary = canary

    def _written_in_place(self, canary: Canary) -> list[str]:
        weights = self._decoder.weights
        known = {
            name: t.numel() for name, t in weights.items() if not self._decoder.places(name)[1]
        }
        return written_in_place(known, canary)

    def _write_canary(self, name: str, canary: Canary) -> None:
        before = self._decoder.tensor_bytes(name)
        places, _ = self._decoder.places(name)
        for change in piecewise(before, altered(name, before, canary)):
            Writing([(name, change, places)], self._threads).write()

    def _is_new(self, patch: WeightPatch) -> bool:
        """Whether the patch has to be loaded. Raises VersionError if it may not come now."""
        if self._canary is not None:
            raise VersionError("a canary is being decoded")
        return is_next(patch, self.run_id, self.version, served=self.corrupt is None)

    def _where(self) -> dict[str, tuple[Any, ...]]:
        """name -> (address, shape, stride) of the tensor that updates write and of the one that
        passes read, which must be the same memory."""
        written, read = self._decoder.weights.items(), self._decoder.read()
        places: dict[str, tuple[Any, ...]] = {}
        for name, tensor in itertools.chain(written, read):
            place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
            places[name] = (*places.get(name, ()), place)
        return places

    def _check_in_place(self, version: int) -> None:
        """Raises MovedError if a tensor was reallocated since the start: decoding still reads the
        old memory."""
        now = self._where()
        for name, place in self._places.items():
            if now.get(name) != place:
                raise MovedError(
                    f"version {version}: {name} lies elsewhere than it did (pointer, shape and"
                    f" stride, as written and as read: {now.get(name)} instead of {place}), so an"
                    " update would not reach what decodes"
                )
