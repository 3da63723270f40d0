"""Where vLLM runs with graphs, and tensors that an update made anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emberl.kernels import platform
from emberl.rollout.vllm_backend import compat, graphs
from emberl.rollout.vllm_backend.graphs import (
    captures,
    check_in_place,
    choice,
    has_rl_config,
    moved,
    places,
)

SHOWS = {
    "graphs only where an update writes in place or rl_config is there (made-up sources, torch on a CPU)": (
        "test_the_table, test_refused_only_where_graphs_read_the_old,"
        " test_rl_config_is_used_where_the_installed_version_has_it"
    ),
}
SETTINGS = compat.EngineSettings(
    model="m", dtype="bfloat16", device="npu", threads=1, max_num_seqs=8, max_model_len=64
)


@pytest.mark.parametrize(
    ("device", "rl_config", "eager"),
    [("cpu", False, False), ("cuda", False, False), ("npu", False, True), ("npu", True, False)],
)
def test_the_table(
    device: str, rl_config: bool, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "has_rl_config", lambda: rl_config)
    found = choice(device)
    assert found.eager == eager and found.device == device and found.reason


def test_eager_is_chosen_and_a_user_may_choose_otherwise() -> None:
    assert compat.engine_arguments(SETTINGS, {})["enforce_eager"] is True
    own = replace(SETTINGS, engine_args={"enforce_eager": False})
    assert compat.engine_arguments(own, {})["enforce_eager"] is False
    assert "enforce_eager" not in compat.engine_arguments(replace(SETTINGS, device="cpu"), {})


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 6))
        self.derived = torch.zeros(6, 4)
        self.register_buffer("table", torch.zeros(3))


def worker(device: str, *, eager: bool, mode: str) -> Any:
    return SimpleNamespace(
        device=SimpleNamespace(type=device),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=eager),
            compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode)),
        ),
    )


def test_what_is_made_anew_is_named_whatever_it_is() -> None:
    model = torch.nn.Sequential(Layer(), Layer())
    before = places(model)
    assert sorted(before) == sorted(
        f"{i}.{n}" for i in (0, 1) for n in ("weight", "derived", "table")
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(4, 6))
    assert moved(before, places(model)) == []
    kept = model[0].weight.data, model[0].derived  # else their memory may be taken again
    model[0].derived = torch.ones(6, 4)
    model[1].weight.data = model[1].weight.data.reshape(6, 4)
    del model[1].table
    found = moved(before, places(model))
    assert sorted(found) == ["0.derived (pointer)", "1.table (gone)", "1.weight (shape)"]
    model[1].weight.data = model[1].weight.data.reshape(4, 6).as_strided((4, 6), (1, 4))
    assert "1.weight (stride)" in moved(before, places(model)) and kept


@pytest.mark.parametrize(
    ("device", "eager", "mode", "graphs"),
    [
        ("cpu", False, "FULL", False),
        ("cuda", False, "FULL_AND_PIECEWISE", True),
        ("cuda", True, "FULL", False),
        ("npu", False, "NONE", False),
    ],
)
def test_refused_only_where_graphs_read_the_old(
    device: str, eager: bool, mode: str, graphs: bool
) -> None:
    model = Layer()
    before = places(model)
    old, model.derived = model.derived, torch.ones(6, 4)
    assert captures(worker(device, eager=eager, mode=mode)) == graphs and old is not None
    if graphs:
        with pytest.raises(RuntimeError, match=r"1 tensors .* e\.g\. derived \(pointer\).*eager"):
            check_in_place(worker(device, eager=eager, mode=mode), before, places(model))
    else:
        check_in_place(worker(device, eager=eager, mode=mode), before, places(model))


def test_rl_config_is_used_where_the_installed_version_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_rl_config()
    package = tmp_path / "vllm_ascend"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "ascend_config.py").write_text("class AscendConfig:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not has_rl_config()
    assert compat.prepare(SETTINGS, {})[1] == {"additional_config": {"weight_nz_mode": 0}}
    (package / "ascend_config.py").write_text(
        "@config\nclass RlConfig:\n    enabled: bool = False\n"
    )
    assert has_rl_config()
    sleeps = replace(SETTINGS, engine_args={"enable_sleep_mode": True})
    expandable = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}  # it takes that out itself
    assert compat.prepare(sleeps, expandable)[1] == {
        "additional_config": {"rl_config": {"enabled": True, "sleep_mode_extra_cleanup": True}}
    }
    own = {"rl_config": {"enable_batch_invariant": True}}
    found = compat.prepare(replace(SETTINGS, engine_args={"additional_config": own}), {})[1]
    assert found["additional_config"]["rl_config"] == {
        "enabled": True, "sleep_mode_extra_cleanup": False, "enable_batch_invariant": True,
    }  # fmt: skip
    assert platform.NPU.device == "npu"
