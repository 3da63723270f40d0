"""vLLM's weight-transfer engines, with the differences between its versions.

The methods of vLLM's workers and the factory, into which vllm-ascend 0.23 puts its own engine, are
the same from 0.23 to 0.32. Differences are detected from the classes: since 0.28 packing of tensors
is announced at the start, before with each update; since 0.28 the trainer has an engine of its own,
before two static methods of the workers'. Importing this file loads neither vLLM nor torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels import platform
from .compat import installed_version


def register_gloo() -> None:
    """Adds the engine for CPUs to vLLM's factory, in one of vLLM's processes. Idempotent."""
    registry = _factory().WeightTransferEngineFactory
    if platform.CPU.weight_transfer not in registry._registry:
        registry.register_engine(
            platform.CPU.weight_transfer, f"{__package__}.gloo", "GlooWeightTransferEngine"
        )


def transfer_init(backend: str, host: str, port: int, rank: int, size: int) -> dict[str, Any]:
    """The argument of `init_weight_transfer_engine`. rank: that of the engine's first process.
    size: the number of all processes, the sender included."""
    meeting = {"master_address": host, "master_port": port, "rank_offset": rank, "world_size": size}
    return meeting | _packed(_worker_engine(backend).init_info_cls)


def transfer_update(
    backend: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, Any]:
    """The argument of `update_weights`. tensors: name -> (torch's name of the dtype, shape)."""
    dtypes, shapes = zip(*tensors.values(), strict=True)
    info = {
        "names": list(tensors),
        "dtype_names": list(dtypes),
        "shapes": [list(shape) for shape in shapes],
    }
    return info | _packed(_worker_engine(backend).update_info_cls)


def update_weights(worker: Any, update: dict[str, Any]) -> None:
    """Calls `update_weights` of one of vLLM's workers, or on a CPU, to 0.24, of its weight-transfer
    engine: the worker's own ends by waiting for an accelerator there."""
    to_024 = bool(inspect.signature(worker.start_weight_update).parameters)
    (
        worker.weight_transfer_engine if to_024 and worker.device.type == "cpu" else worker
    ).update_weights(update)


def check_communicator(communicator: Any) -> None:
    """Raises RuntimeError for a communicator without a library: vLLM's and vllm-ascend's then
    silently do nothing."""
    if getattr(communicator, "disabled", False):
        raise RuntimeError(
            f"{type(communicator).__name__} is disabled: this process could not load the library of"
            " the devices' collectives (or VLLM_DISABLE_PYNCCL is set); mend that, or leave"
            " rollout.engine_args.weight_transfer_config out"
        )


def check_sender(backend: str) -> None:
    """Raises ValueError if a learner cannot send through `backend`."""
    if backend not in ("", platform.CPU.weight_transfer) and installed_version() is None:
        raise ValueError(
            f"rollout.engine_args.weight_transfer_config.backend={backend}: learners send by vLLM's"
            " own communicator, so vLLM (on NPUs with vllm-ascend) must be installed for them too;"
            " install it, or leave weight_transfer_config out"
        )


def open_transfer(
    backend: str, host: str, port: int, size: int, device: Any
) -> Callable[[Mapping[str, Any]], None]:
    """Joins a group as the sender; returns a function that broadcasts a mapping name -> tensor, one
    tensor at a time by way of `device`."""
    check_sender(backend)
    worker = _worker_engine(backend)
    if hasattr(worker, "trainer_send_weights"):
        group = worker.trainer_init(
            {"master_address": host, "master_port": port, "world_size": size}
        )
        check_communicator(group)
        packed = {"group": group, "packed": True}
        return lambda tensors: worker.trainer_send_weights(iter(_Source(tensors, device)), packed)
    trainer, source = (
        _factory().WeightTransferTrainerFactory._registry[backend](),
        _Source({}, device),
    )
    info = trainer.init_info_cls(master_address=host, master_port=port, world_size=size, rank=0)
    sender = trainer.trainer_init(info, client=_NoClient(), source=source)
    check_communicator(sender.model_update_group)

    def send(tensors: Mapping[str, Any]) -> None:
        source.tensors = tensors
        sender.send_weights()

    return send


@dataclass
class _Source:
    """Implements vLLM's `WeightSource`; moves one tensor at a time to the device."""

    tensors: Mapping[str, Any]
    device: Any

    def metadata(self) -> list[Any]:
        param_meta = importlib.import_module("vllm.distributed.weight_transfer.base").ParamMeta
        return [
            param_meta(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, tensor.to(self.device)) for name, tensor in self.tensors.items())


class _NoClient:
    """Implements vLLM's `VLLMWeightSyncClient` by doing nothing: each rollout worker instructs its
    own engine."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_: None


def _factory() -> Any:
    # this attribute loads vllm-ascend, which changes the factory
    importlib.import_module("vllm.platforms").current_platform  # noqa: B018
    return importlib.import_module("vllm.distributed.weight_transfer.factory")


def _worker_engine(backend: str) -> Any:
    register_gloo()
    registry = _factory().WeightTransferEngineFactory._registry
    if backend not in registry:  # newer vllm-ascend registers its engine by a vLLM plugin
        importlib.import_module("vllm.plugins").load_general_plugins()
    return registry[backend]()


def _packed(info: Any) -> dict[str, Any]:
    return {"packed": True} if "packed" in info.__dataclass_fields__ else {}
