"""The shape of a Llama, Qwen2 or Qwen3 decoder from its Hugging Face config.json, checked before
any weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
ELSEWHERE = "use rollout.engine=vllm for it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of a decoder, e.g. 3 layers, hidden 128, 2 query heads on 1 key/value head
    of 64."""

    family: str
    """`llama`, `qwen2` or `qwen3`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    """The output head is the embedding."""
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """`rope_theta`, `rope_type`, and for `llama3` its factors."""


def read_architecture(path: Path) -> Architecture:
    """The architecture in `path`/config.json. Raises ValueError for one that this decoder does not
    support, or without that file."""
    file = path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} is no Hugging Face model directory: it has no config.json")
    return parse_architecture(json.loads(file.read_text()), str(path))


def parse_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The architecture in a parsed config.json of transformers 4 (`rope_theta`, `rope_scaling`) or
    5 (`rope_parameters`). Raises ValueError for one that this decoder does not support."""
    names = config.get("architectures") or ["(none)"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise ValueError(
            f"{where}: architecture {names[0]} is not one of {', '.join(FAMILIES)}; {ELSEWHERE}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {config['hidden_act']} is not silu; {ELSEWHERE}")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError(f"{where}: sliding-window attention is not supported; {ELSEWHERE}")
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        # 128 is the default of transformers' Qwen3Config
        head_dim=config.get("head_dim")
        or (128 if family == "qwen3" else config["hidden_size"] // heads),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope=_rope(config, where),
    )


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(
            f"{where}: rope type {rope['rope_type']} is not default or llama3; {ELSEWHERE}"
        )
    return rope


def inverse_frequencies(arch: Architecture) -> Tensor:
    """[D / 2] float32 angular speed of each pair, in radians per position.

    `llama3` slows the long waves down by `factor`, keeps the short ones, and blends in between
    (Llama 3.1).
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    speeds = 1.0 / torch.pow(arch.rope["rope_theta"], exponents)
    if arch.rope["rope_type"] == "default":
        return speeds
    low, high, factor = (
        float(arch.rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor")
    )
    turns = arch.rope["original_max_position_embeddings"] / (2 * math.pi / speeds)
    blend: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * speeds / factor + blend * speeds
