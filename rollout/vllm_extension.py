"""What emberl adds to vLLM's worker processes (`worker_extension_cls`): loading weights from the mirror, with proof.

vLLM makes this class a base of its own worker class, so its names must be none of the worker's. Its methods are called by
`collective_rpc`: arguments and results are plain lists, dicts, strings and numbers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoder import DTYPE_NAMES
from .mirror import Entry, read_mirror
from .patches import TensorBytes, digest
from .vllm_compat import OWNER, repack_tied_head

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class WeightExtension:
    """Mixed into vLLM's worker; `self` is that worker."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def emberl_describe(self) -> dict[str, Any]:
        """What a server that already runs was started with."""
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "chunks_on_cpu": self.device.type == "cpu" and bool(scheduler.enable_chunked_prefill),
        }

    def emberl_load(self, path: str, entries: Sequence[Sequence[Any]]) -> dict[str, str]:
        """Loads every tensor of the mirror at `path` and returns name -> digest of the bytes that were loaded.

        entries: [name, dtype, shape, start, size] of each. RuntimeError if the model has a parameter that none of them
        filled: it would go on serving old values.
        """
        digests: dict[str, str] = {}
        listed = ((str(name), Entry(dtype, tuple(shape), start, size)) for name, dtype, shape, start, size in entries)
        model = self.model_runner.get_model()
        held = {name for name, _ in model.named_parameters()}
        filled = _recording(model, held)
        try:
            self.model_runner.reload_weights(weights_iterator=_as_torch(read_mirror(path, listed), digests))
        finally:
            del model.load_weights
        repack_tied_head(model)
        missing = sorted(held - filled)
        if missing:
            raise RuntimeError(f"the update has nothing for {len(missing)} parameters of the engine, e.g. {missing[0]}")
        return digests


def _as_torch(tensors: Iterable[tuple[str, TensorBytes]], digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        digests[name] = digest(tensor.data)
        yield name, torch.from_numpy(tensor.data).view(DTYPES[tensor.dtype]).view(tensor.shape)


def _recording(model: Any, held: set[str]) -> set[str]:
    """The set that will hold the parameters filled by the model's next `load_weights`; vLLM only warns of the others."""
    filled: set[str] = set()
    load = model.load_weights

    def recording(weights: Iterable[tuple[str, Tensor]]) -> Any:
        names = load(weights)
        filled.update(held if names is None else names)  # None: this model's loader does not say
        return names

    model.load_weights = recording
    return filled


def end_with(owner: int) -> None:
    """Ends this process within a second of process `owner`'s end. vLLM's processes outlive one that was killed, and would
    hold its device for good; when a worker ends, the rest of its engine follows."""

    def wait() -> None:
        while not _ended(owner):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="owner-watch").start()


def _ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"  # killed, and its parent has not asked yet
    except (FileNotFoundError, ProcessLookupError):
        return True


if OWNER in os.environ:  # vLLM imports this file in its workers, before they load a model
    end_with(int(os.environ[OWNER]))

__all__ = ["WeightExtension", "end_with"]
