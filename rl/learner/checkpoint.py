"""Checkpoints of the learner: a Hugging Face directory that anybody can load, and the exact state
that training goes on from.

The exact state is saved by torch.distributed.checkpoint in sharded form, so a run may go on with
another number of ranks.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora import merged_tensors
from .policy import Policy
from .shards import Shards

# torch.distributed.checkpoint is imported where it is used: it loads torch.distributed.tensor,
# which takes a second, in every process that only names a rank's class
DESCRIPTION = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
}
"""What the description of a checkpoint is made of, besides its own classes and torch's dtypes."""
MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_WEIGHTS = (
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
    "generation_config",
)


def full_tensors(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, under its Hugging Face name, tied ones once; a collective on all
    ranks."""
    for name, tensor in merged_tensors(policy.model):
        yield name, tensor.to(dtype)


def save_model(
    policy: Policy, folder: Path, dtype: torch.dtype, origin: str, *, write: bool
) -> None:
    """Writes weights (in the bytes that engines serve), config and the tokenizer's files; all ranks
    take part, one writes."""
    # storages of their own
    tensors = {name: tensor.cpu().clone() for name, tensor in full_tensors(policy, dtype)}
    if not write:
        return
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder)
    config = policy.model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config["architectures"] = [type(policy.model).__name__]
    type(policy.model.config)(**config).save_pretrained(folder)
    if Path(origin).is_dir():
        for file in Path(origin).iterdir():
            if file.name.startswith(NOT_WEIGHTS):
                shutil.copy(file, folder / file.name)
    else:
        AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def save_weights(shards: Shards, folder: Path) -> None:
    """The values of the shards alone, of a model that is not trained."""
    from torch.distributed.checkpoint import state_dict_saver

    state_dict_saver.save(
        {name: p.detach() for name, p in shards.parameters.items()}, checkpoint_id=str(folder)
    )


def load_weights(shards: Shards, folder: Path) -> None:
    """The inverse of `save_weights`, in place."""
    from torch.distributed.checkpoint import state_dict_loader

    state_dict_loader.load(
        {name: p.detach() for name, p in shards.parameters.items()}, storage_reader=_reader(folder)
    )


def save_state(shards: Shards, optimizer: Any, scheduler: Any, folder: Path, rank: int) -> None:
    """Float32 masters, the optimizer's moments and the schedule's position."""
    from torch.distributed.checkpoint import state_dict_saver

    state_dict_saver.save(_state(shards, optimizer), checkpoint_id=str(folder))
    if rank == 0:
        steps = [
            float(optimizer.state[p]["step"]) for p in shards.local if "step" in optimizer.state[p]
        ]
        torch.save(
            {"scheduler": scheduler.state_dict(), "optimizer_steps": steps[:1]},
            folder / "scheduler.pt",
        )


def load_state(shards: Shards, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """The inverse of `save_state`: everything is read into the tensors in place."""
    from torch.distributed.checkpoint import state_dict_loader

    saved = torch.load(folder / "scheduler.pt", weights_only=True)
    for parameter in shards.local if saved["optimizer_steps"] else []:
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(saved["optimizer_steps"][0]), **moments}
    state_dict_loader.load(_state(shards, optimizer), storage_reader=_reader(folder))
    scheduler.load_state_dict(saved["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def _state(shards: Shards, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Masters and moments by name, as sharded tensors that share the originals' memory."""
    state: dict[str, dict[str, Tensor]] = {
        "model": {name: p.detach() for name, p in shards.parameters.items()}
    }
    for moment in MOMENTS:
        pairs = zip(shards.parameters.items(), shards.local, strict=True)
        held = {name: (p, optimizer.state[local]) for (name, p), local in pairs}
        state[moment] = {
            name: shards.like(p, s[moment]) for name, (p, s) in held.items() if moment in s
        }
    return state


class _PlainUnpickler(pickle.Unpickler):
    """Makes what torch.distributed.checkpoint describes a checkpoint with, and nothing else: a
    pickle may otherwise run whatever its author likes."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) in DESCRIPTION
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not allowed:
            raise pickle.UnpicklingError(
                f"a checkpoint names {module}.{name}, which no checkpoint of emberl does"
            )
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    """Reads a checkpoint of `folder` without unpickling what is not plain."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                metadata = _PlainUnpickler(file).load()
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(str(folder))
