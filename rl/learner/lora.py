"""LoRA (arXiv 2106.09685) through peft: adapters inside the model, and the merged weights that engines serve.

peft renames an adapted weight `x.weight` to `x.base_layer.weight` and puts `x.lora_A.default.weight` [r, in] and
`x.lora_B.default.weight` [out, r] beside it; everywhere else the model keeps its Hugging Face name, W + scale * B A.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig

_BASE = ".base_layer."


def inject_adapters(model: Any, settings: LoraConfig, seed: int = 0) -> None:
    """Adapters in every layer that `settings.targets` names, drawn from the seed; everything else is frozen.

    Raises:
        ValueError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError("model.lora needs peft; pip install 'emberl[lora]', or leave model.lora empty") from error
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = PeftConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"model.lora.targets={targets!r} cannot be adapted: {error}") from error


@torch.no_grad()
def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, under its Hugging Face name, adapters merged in, tied ones once; a collective on all ranks."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        tensor = _whole(parameter)
        if name.endswith(f"{_BASE}weight"):
            layer = modules[name.removesuffix(f"{_BASE}weight")]
            for adapter, scale in layer.scaling.items():
                down, up = _whole(layer.lora_A[adapter].weight), _whole(layer.lora_B[adapter].weight)
                tensor = tensor + scale * (up @ down)
        yield name.replace(_BASE, "."), tensor


def _whole(parameter: Any) -> Tensor:
    tensor: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor.detach()
