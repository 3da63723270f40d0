"""A run over three machines that share neither a disk nor the meaning of a host name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from small_system import SMALL, Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow
STEPS = ("sft.steps=2", "schedule.steps=3", "eval.every=0", "checkpoint.every=2")
LEARNERS = ("cluster.learners=2", "sync.mode=dense")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nodes", Path(__file__).with_name("nodes.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nodes = _load()


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[list[nodes.Node]]:
    reason = nodes.why_not()
    if reason is not None:
        pytest.skip(reason)
    with nodes.machines(tmp_path / "boxes", 3) as made:
        yield made


def run(box: nodes.Node, *arguments: str) -> dict[str, object]:
    command = [str(nodes.BIN / "emberl"), "train", "small.yaml", f"run_dir={nodes.DISK}/run"]
    process = box.start("train.log", *command, *arguments)
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
    told = (box.folder / "train.log").read_text()
    assert process.returncode == 0, told[-4000:]
    result: dict[str, object] = json.loads(told.strip().splitlines()[-1])
    return result


def test_three_machines_train_what_one_does(boxes: list[nodes.Node], emberl: Emberl) -> None:
    """Each has room for one actor. The last step is done twice, by a run that goes on."""
    emberl.train(*STEPS, *LEARNERS)
    driver = boxes[0]
    (driver.folder / "small.yaml").write_text(SMALL)
    one_each = ("cluster.cpus_per_learner=1", "cluster.cpus_per_rollout=1")
    with nodes.ray_cluster(boxes, [1, 1, 1]) as address:
        arguments = (*STEPS, *LEARNERS, *one_each, f"cluster.address={address}")
        assert run(driver, *arguments)["steps"] == 3
        here = driver.folder / "run"
        shutil.rmtree(here / "checkpoints/rl-000003")
        assert run(driver, "--resume", *arguments)["steps"] == 3
    weights = (emberl.folder / "run/model/model.safetensors").read_bytes()
    assert (here / "model/model.safetensors").read_bytes() == weights
    assert timeless(read_metrics(here)) == timeless(read_metrics(emberl.folder / "run"))
    assert {p.name for p in (here / "checkpoints/rl-000002/learner").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }
    for box in boxes[1:]:
        assert not (box.folder / "run/checkpoints").exists(), "what was brought here is gone there"
