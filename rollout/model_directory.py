"""Local directories of models, given as a path or as a Hugging Face Hub id."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files to download from a repository: weights, configuration and tokenizer, but not the same
weights in other formats."""


def model_directory(name: str) -> Path:
    """`name` itself if it is a local directory, else the Hub repository's snapshot in Hugging
    Face's cache, downloaded if needed.

    Raises huggingface_hub's OSError or ValueError if the repository does not exist or cannot be
    reached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
