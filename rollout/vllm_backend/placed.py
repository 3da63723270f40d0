"""In a vLLM worker: the places of a checkpoint's tensors in the model's memory.

They are learnt from the model's own weight loaders, whatever those do with names, fused matrices
and a rank's slices: each tensor is loaded once as one without memory (torch's `meta`), and the
copies are recorded instead of done. That works for loaders that end in `Tensor.copy_` of a part of
the tensor, which vLLM's own sparse patches require too (`checkpoint_weight_patch`, 0.32; those make
a whole tensor of each patch and read every element of the model, go over NCCL alone, and know no
packed matrices). The places are verified by checksums of the memory there. Tensors without a place
are loaded whole, with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..embedded import packed as onednn
from ..weights.changes import check
from ..weights.dtypes import TORCH_NAMES
from ..weights.in_place import Place, Writing, part_checksum, plain, signed
from ..weights.patch import DigestMismatchError, TensorBytes, TensorChange
from ..weights.tensors import as_tensor
from .cpu_linear import Copy, copy_of
from .graphs import moved, places

AUDIT = 32
"""Updates in which every tensor's checksum is compared once."""
WHOLE_LAYERS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
"""vLLM's quantisation methods with which a layer uses its parameters as they were loaded."""


class NotPlacedError(ValueError):
    """The place of a tensor in the model's memory is not known; the message gives the reason."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Write:
    """A copy by a loader: of a part of the checkpoint's tensor into a part of a parameter."""

    into: Tensor
    source: Tensor


@dataclass(kw_only=True, slots=True, eq=False)
class Owners:
    """Packed copies of parameters, and parameters that cannot be written, by `_address` of their
    storage."""

    copies: dict[int, list[tuple[Copy, Any]]] = field(default_factory=dict)
    """oneDNN's copies of a parameter, each with its layer."""
    refused: dict[int, str] = field(default_factory=dict)
    """The reason why a parameter's elements cannot be written one by one."""


class PlacedModel:
    """The places of all tensors in a model's memory. To be made anew after each load of the whole
    model."""

    def __init__(self, model: Any, tensors: Mapping[str, TensorBytes]) -> None:
        """tensors: those that the model has loaded."""
        self.places: dict[str, list[Place]] = {}
        self.reasons: dict[str, str] = {}
        """name -> reason, of the tensors without places."""
        self.expected: dict[str, list[int]] = {}
        """name -> the checksum that each of its places must have."""
        self._model = model
        with _whole_shapes(model) as owners:
            for name, tensor in tensors.items():
                try:
                    self.places[name] = _places(model, owners, name, tensor)
                # anything: these are the loaders of any model; the tensor is then loaded whole
                except Exception as error:
                    self.reasons[name] = f"{type(error).__name__}: {error}"
        for name in list(self.places):
            held = as_tensor(tensors[name])
            self.expected[name] = [part_checksum(place, held) for place in self.places[name]]
            if self.checksums(name) != self.expected[name]:
                self._leave_out(name, "it does not lie where its loader seems to write it")
        self._leave_out_layers()
        self._tensors_lie = places(model)

    def _leave_out_layers(self) -> None:
        """Leaves out the other tensors of layers that have to be loaded: loading a layer allocates
        all of its memory anew."""
        whole = {layer_of(name): name for name in self.reasons}
        for name in list(self.places):
            if (other := whole.get(layer_of(name))) is not None:
                self._leave_out(name, f"{other}, which cannot, is loaded with its layer")

    def loaded(self, names: Iterable[str]) -> None:
        """Notes that all tensors of some layers were loaded, since another process cannot place
        some of them."""
        for name in self.places.keys() & set(names):
            self._leave_out(name, "another process loads its layer whole")
        self._tensors_lie = places(self._model)

    def _leave_out(self, name: str, why: str) -> None:
        self.reasons[name] = why
        del self.places[name], self.expected[name]

    def moved(self) -> list[str]:
        """Tensors of the model whose place has changed, as of `graphs.moved`."""
        return moved(self._tensors_lie, places(self._model))

    def find(self, changes: Mapping[str, TensorChange], threads: int = 1) -> PlacedChanges:
        """Checks and locates changes. Raises NotPlacedError or CorruptPatchError with the tensor's
        name."""
        for name, change in changes.items():
            if name not in self.places:
                why = self.reasons.get(name, "it is no tensor of this model")
                raise NotPlacedError(f"{name} cannot be written in place: {why}")
            check(name, change, change.dtype, change.shape)
        return PlacedChanges(self, changes, threads)

    def checksums(self, name: str) -> list[int]:
        return [place.checksum() for place in self.places[name]]


class PlacedChanges:
    """Located changes: made and audited beside decoding, written and read back while it is
    paused."""

    def __init__(
        self, placed: PlacedModel, changes: Mapping[str, TensorChange], threads: int
    ) -> None:
        self._placed = placed
        located = [(name, change, placed.places[name]) for name, change in changes.items()]
        self._writing = Writing(located, threads)
        self._expected = {
            name: [
                signed(before + place.change_checksum(change))
                for place, before in zip(there, placed.expected[name], strict=True)
            ]
            for name, change, there in located
        }

    def write(self) -> None:
        """As `Writing.write`."""
        self._writing.write()
        self._placed.expected.update(self._expected)

    def prove(self, version: int) -> None:
        """Compares the checksums of every `AUDIT`-th tensor, other ones for each version. Raises
        DigestMismatchError with the tensor's name if one differs."""
        for name in sorted(self._placed.places)[version % AUDIT :: AUDIT]:
            if self._placed.checksums(name) != self._placed.expected[name]:
                raise DigestMismatchError(
                    f"tensor {name}: what lies in the engine's memory does not have the checksum"
                    " of what was written"
                )


def layer_of(name: str) -> str:
    """The name of the layer that is loaded together with a tensor: of a decoder layer its
    attention, or its feed-forward network with all experts; else the module."""
    parts = name.split(".")
    for number, part in enumerate(parts[:-2]):
        if part.isdigit():
            return ".".join(parts[: number + 2])
    return ".".join(parts[:-1]) or name


def _places(model: Any, owners: Owners, name: str, tensor: TensorBytes) -> list[Place]:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    source = torch.empty(tensor.shape, dtype=dtype, device="meta")
    with _written_down(source) as writes:
        model.load_weights([(name, source)])
    locations = [
        place for write in writes for place in _of_write(owners, write, tuple(tensor.shape))
    ]
    if not locations and not _elsewhere(model):
        raise NotPlacedError("its loader writes nothing")
    return locations


def _elsewhere(model: Any) -> bool:
    """Whether other processes hold layers that this one lacks (pipeline parallelism)."""
    return any("PPMissingLayer" in type(layer).__name__ for layer in model.modules())


def _of_write(owners: Owners, write: Write, shape: tuple[int, ...]) -> list[Place]:
    into, source = write.into, write.source
    if into.dtype != source.dtype or into.shape != source.shape or into.dim() not in (1, 2):
        raise NotPlacedError(f"its loader copies {tuple(source.shape)} into {tuple(into.shape)}")
    steps = torch.empty(shape, device="meta").stride()
    if any(n > 1 and a != b for n, a, b in zip(source.shape, source.stride(), steps, strict=True)):
        raise NotPlacedError("its loader turns it round")
    first = divmod(int(source.storage_offset()), shape[-1])
    address = _address(into)
    if address in owners.refused:
        raise NotPlacedError(owners.refused[address])
    locations = [] if into.is_meta else [plain(into, shape, first)]
    for copy, _ in owners.copies.get(address, ()):
        locations.append(_in_copy(copy, into, shape, first))
    if not locations:
        raise NotPlacedError("its parameter has no memory that can be written to")
    return locations


def _in_copy(copy: Copy, into: Tensor, shape: tuple[int, ...], first: tuple[int, int]) -> Place:
    layout = onednn.layout(copy.shape, copy.dtype)
    row, column = divmod(int(into.storage_offset()), copy.shape[1])
    if layout is None or into.dim() != 2 or into.stride() != (copy.shape[1], 1):
        raise NotPlacedError("oneDNN's copy of its matrix has a layout that cannot be told")
    down, right = layout
    return Place(
        memory=onednn.memory(copy.packed),
        rows=down[row : row + into.shape[0]],
        columns=right[column : column + into.shape[1]],
        width=shape[1],
        first_row=first[0],
        first_column=first[1],
        keeps=copy.packed,
    )


@contextmanager
def _written_down(source: Tensor) -> Iterator[list[Write]]:
    """Within it, copies from `source` by this thread are recorded instead of done."""
    writes: list[Write] = []
    copy, me, address = torch.Tensor.copy_, threading.get_ident(), _address(source)

    def copy_(into: Tensor, what: Tensor, non_blocking: bool = False) -> Tensor:
        if threading.get_ident() != me:
            return copy(into, what, non_blocking)
        if not what.is_meta or _address(what) != address:
            raise NotPlacedError("its loader makes other values of it")
        writes.append(Write(into=into, source=what))
        return into

    torch.Tensor.copy_ = copy_  # type: ignore[assignment,method-assign]
    try:
        yield writes
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]


@contextmanager
def _whole_shapes(model: Any) -> Iterator[Owners]:
    """Within it, parameters that vLLM gave up for a packed copy have their shapes again, on `meta`,
    for the loaders to write to."""
    owners, given_up = Owners(), []
    for layer in model.modules():
        weight, copy = getattr(layer, "weight", None), copy_of(layer)
        method = type(getattr(layer, "quant_method", None)).__name__
        if method not in (*WHOLE_LAYERS, "NoneType"):
            for parameter in layer.parameters(recurse=False):
                owners.refused[_address(parameter)] = f"its layer is quantised or packed ({method})"
        if not isinstance(weight, Tensor):
            continue
        if weight.numel() == 0 and copy is not None:
            shape = _meta_parameter(layer)
            given_up.append((layer, weight))
            layer._parameters["weight"] = weight = shape
        if copy is not None:
            owners.copies.setdefault(_address(weight), []).append((copy, layer))
        elif hasattr(layer, "cpu_linear") and getattr(layer.cpu_linear, "__closure__", None):
            owners.refused[_address(weight)] = "vLLM packed it, and nobody can tell how"
    try:
        yield owners
    finally:
        for layer, weight in given_up:
            layer._parameters["weight"] = weight


def _meta_parameter(layer: Any) -> Any:
    """A layer's weight as it was before loading, on `meta`, with its own loader instead of the
    wrapper that a reload leaves."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    parameters, _ = get_layerwise_info(layer).restore_metadata
    made: Any = restore_layer_refs(to_meta_tensor(parameters["weight"]), layer)
    loader: Any = getattr(made, "weight_loader", None)
    while getattr(loader, "__name__", "") == "online_process_loader":
        loader = loader.__wrapped__
        made.weight_loader = loader
    return made


def _address(tensor: Tensor) -> int:
    # of the storage: meta tensors have no memory, but storages of their own
    return int(tensor.untyped_storage()._cdata)
