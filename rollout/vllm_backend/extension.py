"""emberl's methods in vLLM's worker processes (`worker_extension_cls`): loading weights from the
mirror, with digests of what was loaded.

vLLM makes this class a base of its own worker class, so its names must differ from the worker's.
Its methods are called by `collective_rpc`: arguments and results are plain lists, dicts, strings
and numbers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...kernels import platform
from ..weights.patch import (
    Bytes,
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    digest,
)
from ..weights.tensors import as_tensor
from .compat import OWNER, installed_version, labels_tokens, repack_tied_head
from .cpu_linear import install
from .graphs import MOVED, captures, check_in_place, places
from .placed import PlacedChanges, PlacedModel
from .shared_memory import Entry, read_changes, read_mirror, write_mirror
from .transfer_api import check_communicator, register_gloo, update_weights


class Work:
    """A function that runs in a thread beside vLLM's own, so that decoding goes on meanwhile."""

    def __init__(self, work: Callable[[], object]) -> None:
        """Starts `work`. Its outcome is "", or the text of its error, with the type unless that is
        CorruptPatchError, DigestMismatchError or ValueError."""
        self.outcome: str | None = None

        def run() -> None:
            try:
                work()
                self.outcome = ""
            except (CorruptPatchError, DigestMismatchError, ValueError) as error:
                self.outcome = str(error)
            except BaseException as error:  # nobody joins this thread, so none may be lost
                self.outcome = repr(error)

        threading.Thread(target=run, daemon=True, name="emberl-weights").start()


class WeightExtension:
    """Mixed into vLLM's worker; `self` is that worker."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int
    weight_transfer_engine: Any
    _emberl_placed: PlacedModel | None = None
    _emberl_changes: PlacedChanges | None = None
    _emberl_work: Work | None = None
    init_weight_transfer_engine: Callable[[dict[str, Any]], None]
    start_weight_update: Callable[[], None]
    finish_weight_update: Callable[[], None]

    def emberl_describe(self) -> dict[str, Any]:
        """The settings with which a running server was started, for `server.connect`."""
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "vllm": installed_version(),
            "labels_tokens": labels_tokens(),
            "chunks_on_cpu": self.device.type == "cpu" and bool(scheduler.enable_chunked_prefill),
        }

    def emberl_load(
        self, path: str, entries: Sequence[Sequence[Any]], part: bool = False
    ) -> dict[str, str]:
        """Loads these tensors of the mirror at `path` and returns name -> digest of the bytes that
        were loaded.

        entries: [name, dtype, shape, start, size] of each. part: they are those of some layers
        only. Otherwise raises RuntimeError if the model has a parameter that none of them filled,
        as it would go on serving old values.
        """
        if not part:
            self._emberl_placed = None
        with self._emberl_loading(part=part) as digests:
            self.model_runner.reload_weights(
                weights_iterator=_as_torch(read_mirror(path, _entries(entries).items()))
            )
        if self._emberl_placed is not None:
            self._emberl_placed.loaded(digests)
        return digests

    def emberl_place(self, path: str, entries: Sequence[Sequence[Any]]) -> dict[str, str]:
        """Finds the places in the model's memory of the tensors of the mirror at `path`, which were
        loaded; name -> reason, of those without, which have to be loaded whole."""
        if self._emberl_placed is None:
            tensors = dict(read_mirror(path, _entries(entries).items(), copied=False))
            self._emberl_placed = PlacedModel(self.model_runner.get_model(), tensors)
            platform.give_back_memory()
        return self._emberl_placed.reasons

    def emberl_find(self, path: str, entries: Sequence[Sequence[Any]]) -> str:
        """Begins, beside decoding, to check the changes of the file at `path` and to locate them.
        Returns "", or the reason why it cannot begin."""
        placed = self._emberl_placed
        if placed is None:
            return "this process does not know yet where its tensors lie"
        if elsewhere := placed.moved():
            self._emberl_placed = None
            if captures(self):
                return f"{MOVED}{elsewhere[0]} lies elsewhere than they read it"
            return f"{elsewhere[0]} lies elsewhere than it did"

        def find() -> None:
            changes = read_changes(path, entries)
            self._emberl_changes = placed.find(changes, torch.get_num_threads())

        self._emberl_work = Work(find)
        return ""

    def emberl_write(self) -> str:
        """Writes the changes of `emberl_find`. Returns "", or the problem with the tensor's name,
        in which case nothing was written."""
        assert self._emberl_changes is not None, "found before"
        try:
            self._emberl_changes.write()
        except DigestMismatchError as error:
            return str(error)
        return ""

    def emberl_prove(self, version: int) -> None:
        """Begins, beside decoding, to audit the weights after `emberl_write`."""
        changes = self._emberl_changes
        self._emberl_changes = None
        assert changes is not None, "written before"

        def prove() -> None:
            changes.prove(version)
            platform.give_back_memory()

        self._emberl_work = Work(prove)

    def emberl_outcome(self) -> str | None:
        """The outcome of the work that was begun: None while it runs, then the problem or ""."""
        assert self._emberl_work is not None, "begun before"
        return self._emberl_work.outcome

    def emberl_join(self, init_info: dict[str, Any]) -> None:
        """Joins the learners in the group of vLLM's weight-transfer engine."""
        self.init_weight_transfer_engine(init_info)
        check_communicator(self.weight_transfer_engine.model_update_group)

    def emberl_receive(
        self, path: str, entries: Sequence[Sequence[Any]], update: dict[str, Any]
    ) -> dict[str, str]:
        """Loads every tensor of a broadcast from the learners, by vLLM's weight-transfer engine;
        the engine's first process also writes them to the mirror. Otherwise as `emberl_load`."""
        listed = _entries(entries)
        self._emberl_placed = None

        def keep(name: str, data: Bytes) -> None:
            if self.rank == 0:
                write_mirror(path, listed[name], data)

        with self._emberl_loading(keep) as digests:
            self.start_weight_update()
            update_weights(self, update)
            self.finish_weight_update()
        return digests

    @contextmanager
    def _emberl_loading(
        self, keep: Callable[[str, Bytes], None] = lambda *_: None, *, part: bool = False
    ) -> Iterator[dict[str, str]]:
        """Around a reload: yields a dict that gets name -> digest of every loaded tensor; `keep` is
        called with each one's bytes. Raises RuntimeError if a parameter was left out (vLLM only
        warns), unless only a `part` of the model is loaded, and MovedError as of
        `graphs.check_in_place`."""
        model = self.model_runner.get_model()
        before = places(model)
        held, filled = {name for name, _ in model.named_parameters()}, set[str]()
        digests: dict[str, str] = {}
        load = model.load_weights

        def seen(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                digests[name] = digest(data)
                keep(name, data)
                yield name, tensor

        def load_seen(weights: Iterable[tuple[str, Tensor]]) -> Any:
            names = load(seen(weights))
            # None: this model's loader does not report what it filled
            filled.update(held if names is None else names)
            return names

        model.load_weights = load_seen
        try:
            yield digests
        finally:
            del model.load_weights
            platform.give_back_memory()  # that of the old layers, which were replaced one by one
        repack_tied_head(model)
        check_in_place(self, before, places(model))
        missing = [] if part else sorted(held - filled)
        if missing:
            raise RuntimeError(
                f"the update has nothing for {len(missing)} parameters of the engine, e.g."
                f" {missing[0]}"
            )


def _entries(listed: Sequence[Sequence[Any]]) -> dict[str, Entry]:
    return {
        str(name): Entry(dtype, tuple(shape), start, size)
        for name, dtype, shape, start, size in listed
    }


def _as_torch(tensors: Iterable[tuple[str, TensorBytes]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, as_tensor(tensor)


def end_with(owner: int) -> None:
    """Makes this process end within a second of process `owner`. vLLM's processes outlive an owner
    that was killed, and would hold its device for ever; when a worker ends, the rest of its engine
    follows."""

    def wait() -> None:
        while not _ended(owner):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="owner-watch").start()


def _ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            # a zombie: killed, but not yet reaped by its parent
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# at import: vLLM imports this file in its workers, before they load a model
register_gloo()
if OWNER in os.environ:
    end_with(int(os.environ[OWNER]))
install()
