"""How weights travel changes nothing: patches or whole weights, through Ray or through files, the
run is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_system import Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow

SHORT = (
    "sft.steps=20",
    "schedule.steps=3",
    "model.dtype=bfloat16",
    "optim.lr=1e-5",
    "eval.every=0",
)
RECORDER = """\
import json
from pathlib import Path
from emberl.rewards import reward

@reward
def streams(row):
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps([row.prompt, row.token_ids]) + "\\n")
    return float(len(row.token_ids) % 2)
"""
"""A reward without sense gives every step a gradient."""


def train(emberl: Emberl, name: str, *overrides: str) -> list[tuple[str, list[int]]]:
    """Every prompt and answer that this run sampled, in token ids. They are marked in no particular
    order."""
    recorder = emberl.folder / f"{name}_streams.py"
    recorder.write_text(RECORDER)
    emberl.train(
        *SHORT,
        *overrides,
        f"run_dir={name}",
        "reward.parts.answer.use=math",
        "reward.parts.streams.isolation=inline",
        f"reward.parts.streams.use={recorder}:streams",
    )
    return sorted(
        json.loads(line) for line in recorder.with_suffix(".jsonl").read_text().splitlines()
    )


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = timeless(read_metrics(folder))
    # seconds
    return [{k: v for k, v in row.items() if not k.startswith("reward/streams/")} for row in rows]


def test_patches_and_whole_weights_train_the_same_model(emberl: Emberl) -> None:
    dense, patch = emberl.folder / "dense", emberl.folder / "patch"
    whole = train(
        emberl, "dense", "sync.mode=dense", "sync.transport=object_store", "checkpoint.history=true"
    )
    assert len(whole) > 3 * 16 * 4, "the evaluations' are among them"
    patched = train(
        emberl,
        "patch",
        "sync.mode=patch",
        "sync.transport=directory",
        "sync.anchor_every=2",
        "checkpoint.history=true",
    )
    assert patched == whole, "the same tokens"
    assert weights(patch) == weights(dense)
    assert metrics(patch) == metrics(dense)
    sent = [row for row in read_metrics(patch) if "sync/wire_bytes" in row]
    assert len(sent) == 3
    assert all(row["sync/ratio"] > 3 and 0 < row["sync/changed_fraction"] < 0.5 for row in sent)
    assert [row["sync/digest_failures"] for row in sent] == [0, 0, 0]
    assert [row["sync/replays"] for row in sent] == [0, 0, 0], "nobody had to catch up"
    sent = [row for row in read_metrics(dense) if "sync/ratio" in row]
    assert all(row["sync/ratio"] < 1.01 for row in sent), "patches are made for the history only"
    names = sorted(path.name for path in (patch / "history").iterdir())
    assert names[0] == "00000000.anchor" and names[-1] == "00000004-from-00000003.patch"


def test_merged_adapters_of_two_ranks_travel_as_patches(emberl: Emberl) -> None:
    """Every version is proved by digest, and its log-probs by the probe."""
    pytest.importorskip("peft", reason="peft (the extra `lora`) is not installed")
    lora = ("cluster.learners=2", "model.lora.rank=4", "model.lora.alpha=8", "optim.lr=1e-2")
    train(emberl, "run", *lora, "sft.steps=2", "sync.mode=patch", "eval.size=0")
    sent = [row for row in read_metrics(emberl.folder / "run") if "sync/wire_bytes" in row]
    assert len(sent) == 3
    assert all(
        0 < row["sync/changed_fraction"] < 1 and row["sync/digest_failures"] == 0 for row in sent
    )
    assert all(row["sync/ratio"] > 1.2 for row in sent), (
        "what no adapter touches, embeddings for one, does not travel"
    )
