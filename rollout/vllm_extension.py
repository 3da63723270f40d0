"""The old name of `emberl.rollout.vllm_backend.extension`, for servers that were started with it;
it goes in the next release."""

from __future__ import annotations

import warnings

from .vllm_backend.extension import WeightExtension

warnings.warn(
    "emberl.rollout.vllm_extension is now emberl.rollout.vllm_backend.extension; start servers with"
    " --worker-extension-cls emberl.rollout.vllm_backend.extension.WeightExtension",
    FutureWarning,
    stacklevel=2,
)

__all__ = ["WeightExtension"]
