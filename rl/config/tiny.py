"""The settings `model.tiny`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Settings


class TinyConfig(Settings):
    """A small Qwen3-architecture model with one token for each character, made here from a seed."""

    hidden: int = Field(default=128, ge=8, le=65_536)
    """Width of the model."""
    layers: int = Field(default=3, ge=1, le=1_000)
    """Layers of attention and feed-forward."""
    heads: int = Field(default=2, ge=1, le=4_096)
    """Heads of attention."""
    kv_heads: int = Field(default=1, ge=1)
    """Heads of keys and values; `heads` must be a multiple."""
    head_dim: int = Field(default=64, ge=2, le=4_096)
    """Width of a head, an even number."""
    intermediate: int = Field(default=384, ge=8, le=1_000_000)
    """Width of the feed-forward layers."""
    max_positions: int = Field(default=2048, ge=16, le=10_000_000)
    """Tokens of the longest sequence."""
    init_std: float = Field(default=0.06, gt=0, le=10)
    """Standard deviation of the initial weights. The usual 0.02 is meant for widths of thousands:
    at 128 a model learns more slowly from it (the built-in mix, 200 supervised steps of 128
    problems: loss 0.48, against 0.36 from 0.06)."""
    vocabulary: Literal["arithmetic", "bytes"] = "arithmetic"
    """`arithmetic`: the characters of the built-in problems; `bytes`: any text, one token for each
    UTF-8 byte."""
    chat_template: bool = False
    """Gives the tokenizer a plain `role: content` template; needs `vocabulary: bytes`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.tiny.heads={self.heads} must be a multiple of kv_heads={self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.tiny.head_dim={self.head_dim} must be even, for rotary positions"
            )
        if self.chat_template and self.vocabulary != "bytes":
            raise ValueError(
                "model.tiny.chat_template=true needs model.tiny.vocabulary=bytes, to spell the"
                " roles"
            )
        return self
