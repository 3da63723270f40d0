"""A small Qwen3-architecture model and a character tokenizer, made from a seed and saved in Hugging
Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
    model = tiny_model(settings, len(tokenizer), seed)
    model.save_pretrained(folder)
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
    # Not special: skip_special_tokens must leave the thinking's borders for the grader to see.
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


def tiny_model(settings: TinyConfig, vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """The randomly initialised model; the caller's random state is left as it was."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        initializer_range=settings.init_std,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    make_generation: Any = GenerationConfig
    model.generation_config = make_generation(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return model
