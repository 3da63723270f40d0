"""How weights travel changes nothing: patches or whole weights, through Ray or through files, the run is the same."""

from __future__ import annotations

import pytest
from small_system import Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow

SHORT = ("sft.steps=20", "schedule.steps=3", "model.dtype=bfloat16", "optim.lr=1e-5", "eval.every=0")


def test_patches_and_whole_weights_train_the_same_model(emberl: Emberl) -> None:
    emberl.train(*SHORT, "sync.mode=dense", "run_dir=dense")
    emberl.train(
        *SHORT, "sync.mode=patch", "sync.transport=collective", "sync.anchor_every=2", "checkpoint.history=true",
        "run_dir=patch",
    )  # fmt: skip
    dense, patch = emberl.folder / "dense", emberl.folder / "patch"
    assert (dense / "model/model.safetensors").read_bytes() == (patch / "model/model.safetensors").read_bytes()
    rows = read_metrics(patch)
    assert timeless(read_metrics(dense)) == timeless(rows)
    sent = [row for row in rows if "sync/wire_bytes" in row]
    assert len(sent) == 3
    assert all(row["sync/ratio"] > 3 and 0 < row["sync/changed_fraction"] < 0.5 for row in sent)
    assert [row["sync/digest_failures"] for row in sent] == [0, 0, 0]
    assert [row["sync/replays"] for row in sent] == [0, 0, 0], "nobody had to catch up"
    assert all(row["sync/ratio"] < 1.01 for row in read_metrics(dense) if "sync/ratio" in row)
    names = sorted(path.name for path in (patch / "history").iterdir())
    assert names[0] == "00000000.anchor" and names[-1] == "00000004-from-00000003.patch"
