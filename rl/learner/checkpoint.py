"""Checkpoints of the learner: a Hugging Face directory that anybody can load, and the exact state that training goes on from.

The exact state is saved by torch.distributed.checkpoint in sharded form, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .policy import Policy

NOT_WEIGHTS = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template", "generation_config")


def full_tensors(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, under its Hugging Face name, tied ones once; a collective on all ranks."""
    for name, parameter in policy.model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        yield name, whole.detach().to(dtype)


def save_model(policy: Policy, folder: Path, dtype: torch.dtype, origin: str, *, write: bool) -> None:
    """Writes weights (in the bytes that engines serve), config and the tokenizer's files; all ranks take part, one writes."""
    tensors = {name: tensor.cpu() for name, tensor in full_tensors(policy, dtype)}
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


def save_state(policy: Policy, optimizer: Any, scheduler: Any, folder: Path, rank: int) -> None:
    """Float32 masters, the optimizer's moments and the schedule's position."""
    model, moments = get_state_dict(policy, optimizer)
    state_dict_saver.save({"model": model, "optimizer": moments}, checkpoint_id=str(folder))
    if rank == 0:
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def load_state(policy: Policy, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """The inverse of `save_state`."""
    model, moments = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": moments}
    state_dict_loader.load(state, checkpoint_id=str(folder))
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
