"""A model's tensors as safetensors files, byte for byte
(https://github.com/huggingface/safetensors: u64 length of a JSON header, the header, then the
tensors). Only `as_tensor` loads torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import TORCH_NAMES
from .patch import TensorBytes

if TYPE_CHECKING:
    import torch

LENGTH = struct.Struct("<Q")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_model(path: Path) -> dict[str, TensorBytes]:
    """The tensors of a safetensors file, or of those of a Hugging Face directory, as memory maps.
    Raises ValueError if there are none."""
    if path.is_dir():
        index = path / INDEX
        names = (
            {WEIGHTS}
            if not index.exists()
            else set(json.loads(index.read_text())["weight_map"].values())
        )
        if not all((path / name).is_file() for name in names):
            missing = (
                f"neither {WEIGHTS} nor {INDEX}" if not index.exists() else "not all of its shards"
            )
            raise ValueError(f"{path} has {missing}")
        return {
            key: tensor for name in sorted(names) for key, tensor in read_model(path / name).items()
        }
    data = np.memmap(path, np.uint8, "r")
    try:
        (length,) = LENGTH.unpack(data[: LENGTH.size].tobytes())
        start = LENGTH.size + length
        header: dict[str, Any] = json.loads(data[LENGTH.size : start].tobytes())
        header.pop("__metadata__", None)
        return {
            name: TensorBytes(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                data=data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            )
            for name, entry in header.items()
        }
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file") from error


def write_model(path: Path, tensors: Mapping[str, TensorBytes]) -> None:
    """Writes one file that `safetensors` and transformers read, atomically."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.data.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, so that tensors are aligned to 8 bytes
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.data).data)
    partial.rename(path)


def as_tensor(tensor: TensorBytes) -> torch.Tensor:
    """A view of a tensor's bytes as a torch tensor."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    if not tensor.data.size:  # torch cannot view an empty tensor as another dtype
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.from_numpy(tensor.data).view(dtype).view(tensor.shape)


def checkpoint_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of `read_model`, as a copy that may be written to."""
    for name, tensor in read_model(path).items():
        yield name, as_tensor(replace(tensor, data=np.array(tensor.data)))


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    spelt = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in TORCH_NAMES.items() if torch_name == spelt)


__all__ = ["as_tensor", "checkpoint_tensors", "dtype_name", "read_model", "write_model"]
