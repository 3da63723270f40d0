"""Where a model's files are on this machine."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files that are fetched of a repository: weights, configuration, tokenizer; not the same weights
in other formats."""


def model_directory(name: str) -> Path:
    """A local directory as it is; for a Hub id its snapshot in Hugging Face's cache, fetched where
    it is not there yet.

    OSError and ValueError are huggingface_hub's, where there is no such repository or no way to it.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
