"""LoRA (arXiv 2106.09685) through peft: adapters inside the model, and the merged weights that
engines serve.

peft renames an adapted weight `x.weight` to `x.base_layer.weight` and puts
`x.lora_A.default.weight` [r, in] and `x.lora_B.default.weight` [out, r] beside it; everywhere else
the model keeps its Hugging Face name, W + scale * B A.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config.load import LoraConfig

_BASE = ".base_layer."


def inject_adapters(model: Any, settings: LoraConfig, seed: int = 0) -> None:
    """Puts adapters, drawn from the seed, into every layer that `settings.targets` names, and
    freezes everything else.

    Raises:
        ValueError: peft is not installed, no layer has such a name, or one that has it is not
            linear or shares its weight.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "model.lora needs peft; pip install 'emberl[lora]', or leave model.lora empty"
        ) from error
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"model.lora.targets={targets!r} cannot be adapted: {error}") from error
    _check_adapted(model)


def _check_adapted(model: nn.Module) -> None:
    """Raises ValueError for an adapted layer whose merged weight could not be served in place of
    the plain one."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"model.lora.targets: {name} is of type {type(base).__name__}; only linear layers"
                " are adapted"
            )
        if uses[id(base.weight)] > 1:
            raise ValueError(
                f"model.lora.targets: {name} shares its weight with another layer"
                " (tie_word_embeddings), which an adapter of one of the two would take apart;"
                " leave it out"
            )


@torch.no_grad()
def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight whole, under its Hugging Face name, adapters merged in, tied ones once; a
    collective on all ranks."""
    for name, parameter, update in _merging(model):
        tensor = _whole(parameter)
        yield name, tensor if update is None else tensor + update


@torch.no_grad()
def merged_shards(
    model: nn.Module, rank: int, world: int
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """(name, shape of the whole, this rank's rows) of every weight, bit for bit those of
    `merged_tensors`. Only adapters are gathered; where there are none it is no collective."""
    for name, parameter, update in _merging(model):
        local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if update is not None:
            rows = -(-parameter.shape[0] // world)
            local = local + update[rank * rows :][:rows]
        yield name, tuple(parameter.shape), local.detach()


def _merging(model: nn.Module) -> Iterator[tuple[str, Any, Tensor | None]]:
    """(name, parameter, the sum of its adapters' products for the whole weight, None without)."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        update: Tensor | None = None
        if name.endswith(f"{_BASE}weight"):
            layer = modules[name.removesuffix(f"{_BASE}weight")]
            for adapter, scale in layer.scaling.items():
                added = scale * (
                    _whole(layer.lora_B[adapter].weight) @ _whole(layer.lora_A[adapter].weight)
                )
                update = added if update is None else update + added
        yield name.replace(_BASE, "."), parameter, update


def _whole(parameter: Any) -> Tensor:
    tensor: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor.detach()
