"""An engine that is a table of bytes, for tests of the way that weights take."""

from __future__ import annotations

from emberl.rollout.weights.changes import check
from emberl.rollout.weights.patch import (
    DigestMismatchError,
    TensorBytes,
    VersionError,
    Views,
    WeightPatch,
    Weights,
    digest,
    verify,
)


class TableEngine:
    """Loads into the bytes that it serves, as engines do, and proves them."""

    joined = None

    def __init__(self, *, takes_changes: bool = False) -> None:
        self.takes_changes = takes_changes
        self.version = -1
        self.run_id = ""
        self.tensors: dict[str, TensorBytes] = {}
        self.held: Weights | None = None

    def load(self, patch: WeightPatch) -> int:
        if patch.base_version not in (None, self.version):
            raise VersionError(
                f"patch {patch.version} builds on {patch.base_version}, {self.version} is served"
            )
        if patch.version == self.version and patch.run_id == self.run_id:
            return self.version
        self.held = None
        for name, change in patch.changes.items():
            elements = self.tensors[name].data.view(change.new.dtype)
            check(name, change, self.tensors[name].dtype, self.tensors[name].shape)
            if (elements[change.positions] != change.old).any():
                raise DigestMismatchError(f"tensor {name}: another change is meant")
            elements[change.positions] = change.new
        for name, tensor in patch.tensors.items():
            if name in self.tensors and self.tensors[name].data.nbytes == tensor.data.nbytes:
                self.tensors[name].data[:] = tensor.data
            else:
                self.tensors[name] = TensorBytes(
                    dtype=tensor.dtype, shape=tensor.shape, data=tensor.data.copy()
                )
        verify({name: digest(tensor.data) for name, tensor in self.tensors.items()}, patch)
        self.version, self.run_id = patch.version, patch.run_id
        self.held = Weights(
            run_id=patch.run_id,
            version=patch.version,
            tensors=Views(self.tensors, self.tensors.__getitem__),
            digests=patch.digests,
        )
        return self.version

    async def apply(self, patch: WeightPatch) -> int:
        return self.load(patch)
