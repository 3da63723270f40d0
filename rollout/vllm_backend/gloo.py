"""A weight-transfer engine for vLLM on a CPU, by gloo, beside the ones that vLLM has for devices.

vLLM loads this file in its workers if `weight_transfer_config` names the backend "gloo"
(`transfer_api.register_gloo`). It takes the same steps as vLLM's own for NCCL: a group with the
trainer as rank 0, one broadcast a tensor, each loaded as in a checkpoint, layer by layer. To vLLM
0.24 the worker itself begins and ends an update (`transfer_api.update_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ...kernels import platform

TIMEOUT = 60.0
"""Seconds for joining the group, and for one tensor; the rollout worker has a deadline of its
own."""


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """The address, size and first rank of the group; field names are those of vLLM's engine for
    NCCL."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The tensors that are sent, in this order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """The receiving end in one process of an engine."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo
    model_update_group: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        parallel = self.parallel_config
        rank = (
            init_info.rank_offset
            + parallel.data_parallel_index * parallel.world_size
            + parallel.rank
        )
        self.model_update_group = platform.meet(
            platform.CPU,
            init_info.master_address,
            init_info.master_port,
            rank,
            init_info.world_size,
            TIMEOUT,
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # not by super(): vLLM's own waits for an accelerator afterwards
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if self.model_update_group is None:
            raise RuntimeError("no trainer was joined yet")
        described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in described:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            platform.broadcast(self.model_update_group, tensor, TIMEOUT)
            self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.model_update_group = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not used, but vLLM to 0.27 requires it of every engine. Raises NotImplementedError."""
        raise NotImplementedError("learners send by `transfer.open_group`")
