"""What a platform is asked before anything runs on it."""

from __future__ import annotations

import pytest
import torch
from emberl.kernels import platform


@pytest.mark.parametrize("fast", [True, False])
def test_who_asks_for_slow_bfloat16_is_warned(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "supports_bf16", lambda target: fast)
    cpu = platform.named("cpu")
    assert platform.compute_dtype("auto", cpu) is (torch.bfloat16 if fast else torch.float32)
    assert platform.compute_dtype("float32", cpu) is torch.float32
    assert not caplog.text
    assert platform.compute_dtype("bfloat16", cpu) is torch.bfloat16
    assert ("no bfloat16 products" in caplog.text) is not fast
