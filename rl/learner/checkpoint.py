"""Checkpoints of the learner: a Hugging Face directory that anybody can load, and the exact state
from which training resumes.

The exact state is saved by torch.distributed.checkpoint in sharded form, so a run may resume with
another number of ranks. A checkpoint is made in two steps: every rank copies its part (`Snapshot`)
between two training steps, and one of its threads writes the copy while training goes on.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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
"""(module, name) of the types that a checkpoint's metadata may contain, besides the classes of
torch.distributed.checkpoint and torch's dtypes."""
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


@dataclass(kw_only=True, slots=True, eq=False)
class Snapshot:
    """One rank's part of a checkpoint, copied to host memory, which a thread writes while training
    goes on. It takes 12 / ranks bytes for each trained parameter (master and two moments; as much
    for each of a critic's, 4 / ranks for each of a frozen reference's), and on rank 0 the whole
    model in the served dtype."""

    model: dict[str, Tensor] | None
    """The whole weights by their Hugging Face names, in the bytes that engines serve; only on rank
    0."""
    states: dict[str, dict[str, Any]]
    """Folder -> this rank's shards."""
    positions: dict[str, dict[str, Any]]
    """Folder -> contents of its `scheduler.pt`; only on rank 0."""

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that it takes on this rank."""
        whole = [] if self.model is None else list(self.model.values())
        held = [
            t for state in self.states.values() for part in state.values() for t in _local(part)
        ]
        return sum(t.numel() * t.element_size() for t in [*whole, *held])


def _local(part: Any) -> list[Tensor]:
    if isinstance(part, dict):
        return [tensor for each in part.values() for tensor in _local(each)]
    return [part.to_local() if hasattr(part, "to_local") else part]


def whole_model(policy: Policy, dtype: torch.dtype, *, keep: bool) -> dict[str, Tensor] | None:
    """A copy of every weight in host memory if `keep`, else None. A collective: all ranks take
    part."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in full_tensors(policy, dtype):
        if keep:
            tensors[name] = tensor.detach().to("cpu", copy=True)
    return tensors if keep else None


def aside(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of sharded tensors in host memory."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    copied: dict[str, Any] = BlockingAsyncStager(cache_staged_state_dict=False).stage(state)
    return copied


def write_model(
    policy: Policy, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype, origin: str
) -> None:
    """Writes a Hugging Face directory: `tensors`, a config with this dtype, and the tokenizer's
    files of `origin` (a directory or a Hub id)."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder)
    config = policy.model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config["architectures"] = [type(policy.model).__name__]
    type(policy.model.config)(**config).save_pretrained(folder)
    if Path(origin).is_dir():
        for file in Path(origin).iterdir():
            if file.name.startswith(NOT_WEIGHTS):
                shutil.copy(file, folder / file.name)
    else:
        AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes Hugging Face's safetensors files, readable by whom the user's umask allows."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder)
    probe = folder / ".mode"  # os.umask can be read only by setting it, for all threads
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.glob("*.safetensors"):  # which safetensors leaves to their owner alone
        file.chmod(mode)


def write_states(snapshot: Snapshot, folder: Path, group: Any) -> None:
    """Writes everything of a snapshot but the model under `folder`. A collective of all ranks of
    the process group `group`, which no other thread may use meanwhile."""
    from torch.distributed.checkpoint import state_dict_saver

    for name, state in snapshot.states.items():
        state_dict_saver.save(state, checkpoint_id=str(folder / name), process_group=group)
    for name, position in snapshot.positions.items():
        torch.save(position, folder / name / "scheduler.pt")


def weights_of(shards: Shards) -> dict[str, Any]:
    """name -> shard of every parameter: the state of a model that is not trained."""
    return {name: p.detach() for name, p in shards.parameters.items()}


def load_weights(shards: Shards, folder: Path) -> None:
    """Reads the state of `weights_of` in place."""
    from torch.distributed.checkpoint import state_dict_loader

    state_dict_loader.load(weights_of(shards), storage_reader=_reader(folder))


def position_of(shards: Shards, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """The positions of the learning-rate schedule and of AdamW's step counter."""
    steps = [
        float(optimizer.state[p]["step"]) for p in shards.local if "step" in optimizer.state[p]
    ]
    return {"scheduler": scheduler.state_dict(), "optimizer_steps": steps[:1]}


def load_state(shards: Shards, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Reads masters, moments and the schedule's position in place."""
    from torch.distributed.checkpoint import state_dict_loader

    saved = torch.load(folder / "scheduler.pt", weights_only=True)
    # a new optimizer has no moments, and only tensors that exist are read
    for parameter in shards.local if saved["optimizer_steps"] else []:
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(saved["optimizer_steps"][0]), **moments}
    state_dict_loader.load(state_of(shards, optimizer), storage_reader=_reader(folder))
    scheduler.load_state_dict(saved["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def state_of(shards: Shards, optimizer: Any) -> dict[str, dict[str, Tensor]]:
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
    """Unpickles a checkpoint's metadata and refuses any other type: a pickle may otherwise run its
    author's code."""

    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import metadata

        # only what that module defines: among what it imports is `os`
        own = getattr(metadata, name, None)
        allowed = (
            (module == metadata.__name__ and getattr(own, "__module__", "") == module)
            or (module, name) in DESCRIPTION
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not allowed:
            raise pickle.UnpicklingError(
                f"a checkpoint names {module}.{name}, which no checkpoint of emberl does"
            )
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    """A reader of the checkpoint in `folder` that unpickles with `_PlainUnpickler`."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                metadata = _PlainUnpickler(file).load()
            if metadata.storage_meta is not None:
                metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(str(folder))
