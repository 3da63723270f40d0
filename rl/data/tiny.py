"""A small Qwen3-architecture model and a character tokenizer, made from a seed and saved in Hugging
Face format. The models of transformers are not loaded for it: that alone takes as long as the rest
of what a run does before its actors start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..config.tiny import TinyConfig

PAD, EOS, THINK, END_THINK = "<pad>", "<eos>", "<think>", "</think>"
ARITHMETIC = "0123456789+-*=?,()x"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tiny(directory: str | Path, settings: TinyConfig, seed: int) -> Path:
    """Writes config, weights (float32), generation config and tokenizer; the same seed writes the
    same bytes."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(settings)
    tokenizer.save_pretrained(folder)
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    for name, content in (
        ("config.json", tiny_config(settings, len(tokenizer)) | ends),
        ("generation_config.json", ends),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = tiny_weights(settings, len(tokenizer), seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_tokenizer(settings: TinyConfig) -> PreTrainedTokenizerFast:
    """One token for each byte of the vocabulary, and four of its own: `<pad>` 0, `<eos>` 1,
    `<think>` 2, `</think>` 3.

    A character outside the vocabulary is an error, never a silent gap.
    """
    names = (
        pre_tokenizers.ByteLevel.alphabet() if settings.vocabulary == "bytes" else list(ARITHMETIC)
    )
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, THINK, END_THINK, *sorted(names)])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS])
    # not special: skip_special_tokens must leave the thinking's tags for the grader to see
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in (THINK, END_THINK)])
    wrap: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    tokenizer: PreTrainedTokenizerFast = wrap(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=settings.max_positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if settings.chat_template else None,
    )
    return tokenizer


def tiny_config(settings: TinyConfig, vocab_size: int) -> dict[str, Any]:
    """The architecture's keys of config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.head_dim,
        "max_position_embeddings": settings.max_positions,
        "initializer_range": settings.init_std,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * settings.layers,
        "use_sliding_window": False,
    }


def tiny_weights(settings: TinyConfig, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Parameter -> its initial values (float32), bit for bit those of `Qwen3ForCausalLM` by the
    same seed; the caller's random state is unchanged."""
    width, inner = settings.hidden, settings.intermediate
    queries, keys = settings.heads * settings.head_dim, settings.kv_heads * settings.head_dim
    parts = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    layers = [f"model.layers.{i}" for i in range(settings.layers)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # built all before `normal_`: as in transformers, their own initialisation draws first
        modules: dict[str, nn.Embedding | nn.Linear]
        modules = {"model.embed_tokens": nn.Embedding(vocab_size, width, padding_idx=0)}
        for layer in layers:
            for name, (takes, gives) in parts.items():
                modules[f"{layer}.{name}"] = nn.Linear(takes, gives, bias=False)
        for module in modules.values():
            module.weight.normal_(0.0, settings.init_std)
        modules["model.embed_tokens"].weight[0] = 0.0
    norms = {"model.norm": width}
    for layer in layers:
        norms |= {f"{layer}.self_attn.{name}_norm": settings.head_dim for name in "qk"}
        norms |= {f"{layer}.{at}_layernorm": width for at in ("input", "post_attention")}
    weights = {name: module.weight.detach() for name, module in modules.items()}
    weights |= {name: torch.ones(size) for name, size in norms.items()}
    return {f"{name}.weight": weight for name, weight in weights.items()}
