"""The commands as a user runs them, on a history of three versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rl.cli import app
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import TensorBytes, Weights, dense_patch, digest
from emberl.rollout.weights.tensors import write_model
from emberl.rollout.weights.transport import Directory
from emberl.rollout.weights.wire_format import pieces
from safetensors import safe_open
from typer.testing import CliRunner


def tensors(*values: int) -> dict[str, TensorBytes]:
    table = {
        "a.weight": np.array([values, [7] * len(values)], np.uint16),
        "b": np.array([1, 2], np.uint16),
    }
    return {
        name: TensorBytes(dtype="BF16", shape=array.shape, data=array.reshape(-1).view(np.uint8))
        for name, array in table.items()
    }


HISTORY = [tensors(16256, 16256, 16256), tensors(16257, 16256, 16256), tensors(16257, 16256, 16200)]


@pytest.fixture
def history(tmp_path: Path) -> Path:
    outbox, base = Directory(tmp_path / "history"), None
    for version, new in enumerate(HISTORY):
        digests = {name: digest(tensor.data) for name, tensor in new.items()}
        anchor = dense_patch("run", version, new.items())
        patch = anchor if base is None else encode(base, new, run_id="run", version=version)
        outbox.put(version, patch.base_version, pieces(patch))
        base = Weights(run_id="run", version=version, tensors=new, digests=digests)
    return outbox.folder


def emberl(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["patches", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def saved(folder: Path) -> list[int]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {"a.weight", "b"}
        import torch

        return [int(x) for x in file.get_tensor("a.weight")[0].view(torch.int16)]


def test_inspect(history: Path) -> None:
    anchor, first, second = sorted(history.iterdir())
    assert [p.name for p in (anchor, first)] == ["00000000.anchor", "00000001-from-00000000.patch"]
    record = json.loads(emberl("inspect", first, "--json"))
    assert (record["version"], record["base_version"], record["run_id"]) == (1, 0, "run")
    assert (record["changed"], record["unchanged_tensors"]) == (1, 1)
    (row,) = record["tensors"]
    assert (row["name"], row["shape"], row["elements"], row["changed"]) == (
        "a.weight",
        [2, 3],
        6,
        1,
    )
    text = emberl("inspect", second)
    assert "patch on version 1 to version 2 of run run" in text and "16.67% changed" in text
    assert "verified: every checksum and the digest of every tensor" in emberl("inspect", anchor)
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    assert (
        "tensor a.weight, chunk 0"
        in json.loads(emberl("inspect", first, status=1).splitlines()[-1])["error"]
    )
    assert "No such file" in emberl("inspect", history / "nothing", status=1)


def test_apply(history: Path, tmp_path: Path) -> None:
    anchor, first, second = sorted(history.iterdir())
    assert '"version": 2' in emberl("apply", anchor, first, second, tmp_path / "two", "--json")
    assert saved(tmp_path / "two") == [16257, 16256, 16200]
    emberl("apply", history, tmp_path / "one", "--version", 1)
    assert saved(tmp_path / "one") == [16257, 16256, 16256]

    model = tmp_path / "model"  # a checkpoint is a base too, if its digests are the patch's
    model.mkdir()
    write_model(model / "model.safetensors", HISTORY[1])
    (model / "config.json").write_text("{}")
    emberl("apply", model, second, tmp_path / "from_model")
    assert saved(tmp_path / "from_model") == [16257, 16256, 16200]
    assert (tmp_path / "from_model/config.json").exists()
    error = emberl("apply", model, first, tmp_path / "wrong", status=1)
    assert "00000001-from-00000000.patch: patch 1 builds on another version 0" in error
    assert not (tmp_path / "wrong").exists()
    assert "exists already" in emberl("apply", history, model, status=1)
    assert "not to version 9" in emberl(
        "apply", history, tmp_path / "nine", "--version", 9, status=1
    )
    assert "builds on version 1, but version 0 is held" in emberl(
        "apply", anchor, second, tmp_path / "gap", status=1
    )


def test_help_has_an_example() -> None:
    for command in ("inspect", "apply"):
        assert f"Example: emberl patches {command}" in emberl(command, "--help")
