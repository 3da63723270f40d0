"""Where a checkpoint's tensors lie, learnt from a model's loaders: fused matrices, a rank's slices,
a tied head, and what has to be loaded whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.vllm_backend.placed import AUDIT, NotPlacedError, PlacedModel, layer_of
from emberl.rollout.vllm_backend.shared_memory import SharedChanges, read_changes
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    TensorChange,
)
from torch import Tensor, nn


class UnquantizedLinearMethod:
    pass


class FP8LinearMethod:
    pass


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int, method: Any = None) -> None:
        super().__init__()
        self.quant_method = method or UnquantizedLinearMethod()
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)


class OneRank(nn.Module):
    """The second of two ranks: of q and k (4 rows each) it has the last two, of `out` (6 columns)
    the last three, all of the rest. The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = Linear(8, 4), Linear(8, 4)
        self.head.weight = self.embed.weight
        self.qk, self.out = Linear(4, 4), Linear(4, 3)
        self.turned, self.small = Linear(4, 5), Linear(2, 2, FP8LinearMethod())
        self.scaled = Linear(2, 2)
        self.norm = nn.Parameter(torch.zeros(4), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name in ("q", "k"):
                start = 2 * "qk".index(name)
                self.qk.weight.data.narrow(0, start, 2).copy_(tensor.narrow(0, 2, 2))
            elif name == "out":
                self.out.weight.data.copy_(tensor.narrow(1, 3, 3))
            elif name == "turned":
                self.turned.weight.data.copy_(tensor.t())
            elif name == "scaled":
                self.scaled.weight.data.copy_(tensor * 2)
            elif name == "norm":
                self.norm.data.copy_(tensor)
            elif name in ("embed", "small"):
                getattr(self, name).weight.data.copy_(tensor)
        return {name for name, _ in weights} if isinstance(weights, list) else set()


SHAPES = {
    "embed": (8, 4),
    "q": (4, 4),
    "k": (4, 4),
    "out": (4, 6),
    "turned": (5, 4),
    "small": (2, 2),
    "scaled": (2, 2),
    "norm": (4,),
    "stray": (3,),
}
RNG = np.random.default_rng(0)


def tensor(values: Any) -> TensorBytes:
    array = np.asarray(values, "<f4")
    return TensorBytes(dtype="F32", shape=array.shape, data=array.reshape(-1).view(np.uint8).copy())


def loaded() -> tuple[OneRank, dict[str, TensorBytes], PlacedModel]:
    model = OneRank()
    tensors = {name: tensor(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
    for name, held in tensors.items():
        model.load_weights([(name, values(held))])
    return model, tensors, PlacedModel(model, tensors)


def values(held: TensorBytes) -> Tensor:
    return torch.from_numpy(held.data.view("<f4").copy()).view(held.shape)


def changed(held: TensorBytes, every: int = 3) -> tuple[TensorBytes, TensorChange]:
    row = held.data.view("<f4").copy()
    row[::every] += 1
    after = tensor(row.reshape(held.shape))
    return after, between(held, after)


def test_what_changed_is_written_where_the_loaders_would_have_written_it() -> None:
    model, tensors, placed = loaded()
    assert placed.places.keys() == {"embed", "q", "k", "out", "norm"}
    made = {name: changed(tensors[name]) for name in placed.places}
    written = placed.find({name: change for name, (_, change) in made.items()})
    written.write()
    written.prove(1)
    other = OneRank()
    for name, held in tensors.items():
        other.load_weights([(name, values(made[name][0] if name in made else held))])
    for name, parameter in other.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.head.weight is model.embed.weight


def test_what_cannot_be_placed_has_a_reason() -> None:
    _, tensors, placed = loaded()
    reasons = placed.reasons
    assert reasons.keys() == {"turned", "small", "scaled", "stray"}
    assert "turns it round" in reasons["turned"] or "copies" in reasons["turned"]
    assert "quantised or packed (FP8LinearMethod)" in reasons["small"]
    assert "other values" in reasons["scaled"]
    assert "writes nothing" in reasons["stray"]
    for name in (*reasons, "unknown"):
        _, change = changed(tensors.get(name, tensors["norm"]))
        with pytest.raises(NotPlacedError, match=f"{name} cannot be written in place"):
            placed.find({name: change})


def test_a_loader_that_seems_to_write_elsewhere_is_not_believed() -> None:
    class Two(OneRank):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            names = super().load_weights(weights)
            if "norm" in names:
                self.norm.data[:] += 1  # after the copy, which is all that is seen
            return names

    model = Two()
    tensors = {"norm": tensor([1, 2, 3, 4])}
    model.load_weights([("norm", values(tensors["norm"]))])
    placed = PlacedModel(model, tensors)
    assert placed.reasons == {"norm": "it does not lie where its loader seems to write it"}


def test_bad_changes_are_refused_by_name_and_change_nothing() -> None:
    model, tensors, placed = loaded()
    _, good = changed(tensors["embed"])
    _, late = changed(tensors["q"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cases: list[tuple[dict[str, TensorChange], type[Exception], str]] = [
        ({"q": replace(late, positions=late.positions + 16)}, CorruptPatchError, "outside"),
        ({"q": replace(late, positions=late.positions[::-1].copy())}, CorruptPatchError, "ascend"),
        ({"q": replace(late, checksum=late.checksum ^ 1)}, CorruptPatchError, "checksum"),
    ]
    moved = between(*reversed([tensors["q"], changed(tensors["q"], 1)[0]]))
    cases.append(({"q": moved}, DigestMismatchError, "element 8 .*not what the change was made"))
    for changes, error, words in cases:
        with pytest.raises(error, match=f"tensor q: .*{words}"):
            placed.find({"embed": good, **changes}).write()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name


def test_a_copy_that_goes_wrong_elsewhere_is_found_within_some_updates() -> None:
    model, tensors, placed = loaded()
    model.out.weight.data[0, 0] += 1
    held, found = tensors["norm"], []
    for version in range(AUDIT):
        held, change = changed(held)
        written = placed.find({"norm": change})
        written.write()
        try:
            written.prove(version)
        except DigestMismatchError as error:
            found.append(str(error))
    assert torch.equal(model.norm, values(held))
    assert len(found) == 1 and found[0].startswith("tensor out: ")


def test_a_layer_is_loaded_as_one() -> None:
    """Where one of its tensors has to come whole, all do; experts belong together."""
    assert layer_of("model.layers.3.self_attn.q_proj.weight") == "model.layers.3.self_attn"
    assert layer_of("model.layers.3.mlp.experts.7.up_proj.weight") == "model.layers.3.mlp"
    assert layer_of("model.layers.3.input_layernorm.weight") == "model.layers.3.input_layernorm"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("lm_head.weight") == "lm_head" and layer_of("norm") == "norm"
    model = OneRank()
    names = {"layers.0.attn.norm": "norm", "layers.0.attn.turned": "turned", "layers.1.attn.q": "q"}
    load = model.load_weights

    def renamed(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return load([(names[name], tensor) for name, tensor in weights])

    model.load_weights = renamed  # type: ignore[assignment]
    tensors = {name: tensor(RNG.normal(size=SHAPES[short])) for name, short in names.items()}
    for name, held in tensors.items():
        model.load_weights([(name, values(held))])
    placed = PlacedModel(model, tensors)
    assert placed.places.keys() == {"layers.1.attn.q"}
    assert "layers.0.attn.turned, which cannot, is loaded" in placed.reasons["layers.0.attn.norm"]
    placed.loaded(["layers.1.attn.q"])
    assert not placed.places, "of a layer that was loaded nobody knows where it lies"


def test_a_tensor_that_was_made_anew_is_found_before_anything_is_written() -> None:
    model, _, placed = loaded()
    assert placed.moved() == []
    model.out.weight = nn.Parameter(model.out.weight.clone(), requires_grad=False)
    assert placed.moved() == ["out.weight (pointer)"]


def test_a_parcel_holds_the_changes_for_other_processes() -> None:
    changes = {name: changed(tensor(RNG.normal(size=SHAPES[name])))[1] for name in ("q", "norm")}
    nothing = between(tensor([1.0]), tensor([1.0]))
    parcel = SharedChanges(changes | {"same": nothing})
    found = read_changes(parcel.path, parcel.entries)
    assert found.keys() == {"q", "norm", "same"} and not len(found["same"].positions)
    for name, change in changes.items():
        assert found[name].positions.tolist() == change.positions.tolist()
        assert found[name].old.tolist() == change.old.tolist()
        assert found[name].new.tolist() == change.new.tolist()
        assert (found[name].checksum, found[name].shape) == (change.checksum, SHAPES[name])
    del found
    parcel.close()
    parcel.close()
