"""Loading of a learner rank's models: read from files, equipped with our layers and adapters, and
sharded over the ranks.

Parameters are float32 masters sharded by FSDP2 (float64 where the passes are); a pass gathers and
casts them to the compute dtype.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...kernels import platform
from ...rollout.actors import own_device
from ..config.load import CriticConfig, ModelConfig
from . import memory
from .critic import Critic
from .flops import COUNTED, ModelFlops, counted
from .fused_layers import fused_forward
from .layers import ATTENTION, replace_layers, use_packed_attention
from .lora import inject_adapters, merged_shards
from .policy import Policy, pick_attention, takes_packed
from .shards import Shards, keep_whole
from .shared_prompts import KEYS, share_in_attention
from .teachers import Teacher
from .trainable import shard

_log = logging.getLogger(__name__)

WORTH_PACKING = 4_000_000
"""FLOPs of a token's forward pass above which packing pays on a CPU in float32: shared prompts then
save more than attention sequence by sequence costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSpec:
    """The settings of one rank, known before it meets the others."""

    rank: int
    world: int
    device: str
    """A platform's name, as in `cluster.device`."""
    threads: int
    model: ModelConfig
    timeout: float
    """Seconds after which a collective gives up on a lost peer."""
    seed: int = 0
    """Seed of new adapters."""
    longest: int = memory.SMALLEST
    """Tokens of the longest sequence that a run may train on."""


class ModelLoader:
    """Loads the policy, its critic and its teachers. Sharding is a collective, so all ranks must
    load the same models in the same order."""

    def __init__(self, spec: RankSpec) -> None:
        self.spec = spec
        self.platform = platform.named(spec.device)
        self.device = own_device(self.platform)
        self.dtype = platform.compute_dtype(spec.model.dtype, self.platform)
        self.master = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.attention = spec.model.attention
        if self.attention == "auto":
            self.attention = pick_attention(self.platform, self.dtype)
        packing = spec.model.packing
        self.packed = takes_packed(self.attention) if packing == "auto" else packing == "on"
        self.shares_prompts = False
        """Whether passes compute a prompt once for all of its answers; decided as models are
        loaded."""
        self.copied_prompt = 1.0
        """The part of a prompt's token that a pass keeps for each further answer to it, over all
        models: `shared_prompts.KEYS` where every model's attention reads prompts where they
        stand."""
        own = self.platform.is_cpu or self.platform.fused_layers
        self.fused = own and self.dtype == torch.bfloat16 and spec.model.attention == "auto"
        """Whether the policy's layers are run by `layers.py`, on NPUs by `fused_layers.py`."""
        self.flops: ModelFlops | None = None
        """The policy's FLOPs; None before it is loaded, and for an unsupported architecture."""
        self.vocabulary = 0
        """Rows of the policy's output layer."""

    def open(self, model_path: str) -> None:
        """Fixes the directory of the policy's files and the mesh of all ranks, which must have
        joined the process group."""
        from torch.distributed.device_mesh import init_device_mesh

        self.model_path = model_path
        self.mesh: DeviceMesh = init_device_mesh(self.platform.device, (self.spec.world,))

    def load_policy(self, *, offload: bool = False) -> Policy:
        """A sharded policy with the weights of the model's files, and new adapters if
        `model.lora`."""
        from transformers import AutoModelForCausalLM

        model = self._read(AutoModelForCausalLM, self.model_path)
        try:
            self.flops = ModelFlops.of(model.config)
        except ValueError as error:  # an architecture that is not counted trains all the same
            self.flops = None
            _log.warning("no TFLOP/s and MFU will be logged: %s", error)
        self.vocabulary = len(model.get_output_embeddings().weight)
        if self.spec.model.lora is not None:
            inject_adapters(model, self.spec.model.lora, self.spec.seed)
        layers = getattr(model, model.base_model_prefix).layers
        if self.fused:
            self.fused = self._replace(model, layers)
            self.copied_prompt = KEYS if self.fused and self.platform.is_cpu else 1.0
        if self.fused or self._gains_by_packing():
            if not self.fused:
                use_packed_attention(model)
            self.attention = ATTENTION  # also of what is loaded later
            self.packed |= self.spec.model.packing == "auto"
        self.shares_prompts = self._may_share(model)
        policy = Policy(model).train()
        self._shard(policy, layers, offload=offload)
        return policy

    def _gains_by_packing(self) -> bool:
        """Whether to pack on a CPU in float32, because passes that compute a prompt once are faster
        there than padded ones."""
        model = self.spec.model
        return (
            self.platform.is_cpu
            and self.dtype == torch.float32
            and (model.attention, model.packing) == ("auto", "auto")
            and self.flops is not None
            and (model.share_prompts == "on" or self.flops.token >= WORTH_PACKING)
            and model.share_prompts != "off"
        )

    def _may_share(self, model: Any) -> bool:
        """Whether passes over a loaded model share prompts, by `model.share_prompts`.

        Raises:
            ValueError: it is on and cannot be.
        """
        wanted = self.spec.model.share_prompts
        # others take a mask, which transformers makes for the rows instead of the sequences
        unmasked = self.attention == ATTENTION or "flash" in self.attention
        can = self.packed and unmasked and counted(model.config)
        if wanted == "on" and not can:
            raise ValueError(
                "model.share_prompts=on needs packed passes (model.packing=auto) with flash"
                " attention or the learner's own (model.attention=auto), and a model whose layers"
                f" mix tokens by full attention alone ({', '.join(COUNTED)}), but"
                f" model.packing={self.spec.model.packing}, model.attention={self.attention} and"
                f" model_type={model.config.model_type!r}; set auto or off"
            )
        if can and wanted != "off":
            share_in_attention(self.attention)
            return True
        return False

    def load_critic(self, settings: CriticConfig, policy: Policy) -> Critic:
        """A sharded critic with the body of `critic.path`, or with a copy of the policy's current
        body, adapters merged in."""
        from transformers import AutoModel

        body = self._read(AutoModel, settings.path or self.model_path)
        self.shares_prompts &= counted(body.config)
        if self.fused and not self._replace(body, body.layers):
            self.copied_prompt = 1.0
        critic = Critic(body, self.master).train()
        # by itself, as it computes in the master dtype and the body does not
        self._shard(critic.value, [], dtype=self.master)
        self._shard(critic, critic.body.layers)
        if settings.path is None:
            prefix = f"{policy.model.base_model_prefix}."
            held = merged_shards(policy.model, self.spec.rank, self.spec.world)
            Shards.of(critic.body).copy_from(
                (name.removeprefix(prefix), part) for name, _, part in held
            )
        return critic

    def load_teacher(self, path: str) -> Teacher:
        """A frozen teacher, in host memory between its passes."""
        from transformers import AutoModelForCausalLM

        model = self._read(AutoModelForCausalLM, path)
        self.shares_prompts &= counted(model.config)
        layers = getattr(model, model.base_model_prefix).layers
        if self.fused and not self._replace(model, layers):
            self.copied_prompt = 1.0
        teacher = Teacher(model)
        self._shard(teacher, layers, offload=not self.platform.is_cpu)
        teacher.eval().requires_grad_(False)
        return teacher

    def _read(self, auto: Any, path: str) -> Any:
        # in host memory, on an accelerator in the dtype of the files: sharding moves one layer at
        # a time
        dtype = self.master if self.platform.is_cpu else "auto"
        model = auto.from_pretrained(path, dtype=dtype, attn_implementation=self.attention)
        if self.spec.model.gradient_checkpointing:
            new_name = getattr(model, "activation_checkpointing_enable", None)  # of transformers 5
            (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
        return model

    def _replace(self, model: Any, layers: Any) -> bool:
        if self.platform.is_cpu:
            return replace_layers(model, layers)
        return replace_layers(model, layers, fused_forward(self.device), self.device)

    def _shard(
        self, module: nn.Module, layers: Any, *, dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Shards `module`, its `layers` one by one, for passes in `dtype` (None: `self.dtype`)."""
        compute = dtype or self.dtype
        if self.spec.world == 1 and self.platform.is_cpu:
            keep_whole(module, self.mesh, compute)
            return
        shard(
            module,
            layers,
            self.mesh,
            compute,
            device=self.device,
            master=self.master,
            offload=offload,
            keep=self.platform.is_cpu,
        )
